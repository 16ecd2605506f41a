"""Sockets of every arrangement, pods that come and go, and a process that dies."""

import asyncio
import contextvars
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zmq
from pydantic import ValidationError

from deployments.settings import CurveSettings, EventsSettings, PodEndpoint
from deployments.sockets import parse_topic, rank_endpoint
from deployments.subscriber import Subscriber
from kvcore.errors import InvalidInputError
from kvcore.index import BlockIndex
from kvcore.stream_state import PodState
from tests.deployments.test_faults import QUICK, compare, is_exact, publish, status, until
from tests.engine import RecordedEngine, pack
from tests.made_cache import MadeCache, depths, root, truth
from tests.shared import shared


@pytest.fixture
def context():
    made = zmq.Context()
    yield made
    made.destroy(linger=0)


def make(**settings) -> Subscriber:
    made = EventsSettings.model_validate({**QUICK, **settings})
    return Subscriber(made, BlockIndex(), model_root=root)


def pod(tmp_path, name, **fields) -> PodEndpoint:
    base = f"ipc://{tmp_path}/{name}"
    return PodEndpoint.model_validate(
        {"name": name, "model": "m", "events": f"{base}.events", "replay": f"{base}.replay"}
        | fields
    )


def test_topics_name_pods_as_the_peers_read_them():
    """``kv@pod@model``, where a pod may be an address with a port; other text is the pod."""
    cases = json.loads(shared("vectors/event_decode.json").read_text())["cases"]
    for case in cases:
        if case.get("pod"):
            assert parse_topic(case["topic"].encode())[0] == case["pod"]
    assert parse_topic(b"kv@10.0.0.1:8000@org/model") == ("10.0.0.1:8000", "org/model")
    assert parse_topic(b"") == (None, None)


def test_ranks_count_ports_up():
    """As the engine derives them; names that have no port get a suffix."""
    assert rank_endpoint("tcp://10.0.0.1:5557", 2) == "tcp://10.0.0.1:5559"
    assert rank_endpoint("tcp://10.0.0.1:5557", 0) == "tcp://10.0.0.1:5557"
    assert rank_endpoint("inproc://x", 1) == "inproc://x_dp1"


def test_settings_refuse_what_they_do_not_know():
    """A misspelt key would silently keep its default."""
    with pytest.raises(ValidationError):
        EventsSettings.model_validate({"blocksize": 16})
    with pytest.raises(ValidationError):
        PodEndpoint(name="a", events="localhost:5557")


def test_bound_and_connected_pods_at_once(context, tmp_path):
    """One endpoint that pods push to, and one endpoint per pod that we pull from."""

    async def main() -> None:
        subscriber = make(bind="tcp://127.0.0.1:*", pods=(pod(tmp_path, "pod-a"),))
        pulled = RecordedEngine(context, f"ipc://{tmp_path}/pod-a")
        await subscriber.start()
        caches = {"pod-a": MadeCache(1), "pod-b": MadeCache(2), "10.0.0.1:8000": MadeCache(3)}
        pushing = {name: context.socket(zmq.XPUB) for name in list(caches)[1:]}
        for name, socket in pushing.items():
            socket.connect(subscriber.bound_endpoint)
            await until(lambda s=socket: s.poll(0))
            for _ in range(30):
                seq, payload = caches[name].step()
                topic = f"kv@{name}@m".encode()
                socket.send_multipart([topic, seq.to_bytes(8, "big"), payload])
        await publish(pulled, caches["pod-a"], 30)
        await until(lambda: is_exact(subscriber, caches["pod-a"]))
        await until(lambda: [s.last_seq for s in subscriber.statuses()] == [29, 29, 29])
        for name, cache in caches.items():
            prompts = cache.prompts()
            assert depths(subscriber._index, name, prompts) == truth(cache, prompts)
            assert subscriber.states()[name, 0] == (PodState.EXACT, None)
        for socket in pushing.values():
            socket.close(0)
        pulled.close()
        await subscriber.close()

    asyncio.run(main())


@pytest.mark.parametrize("is_bound", [True, False])
def test_ranks_of_one_pod_are_apart(context, tmp_path, is_bound):
    """Each has its own numbers and its own cache; merged, 13 of 30 predictions were too high."""

    async def main() -> None:
        caches = [MadeCache(4, rank=0), MadeCache(5, rank=1)]
        if is_bound:
            subscriber = make(bind=f"ipc://{tmp_path}/bound")
        else:
            subscriber = make(pods=(pod(tmp_path, "pod-a", ranks=2),))
        await subscriber.start()
        engines = [
            RecordedEngine(
                context,
                f"ipc://{tmp_path}/pod-a",
                rank,
                connect=subscriber.bound_endpoint if is_bound else None,
            )
            for rank in (0, 1)
        ]
        for _ in range(30):
            for engine, cache in zip(engines, caches, strict=True):
                await publish(engine, cache, 1)
        await until(lambda: [s.last_seq for s in subscriber.statuses()] == [29, 29])
        await until(lambda: {s for s, _ in subscriber.states().values()} == {PodState.EXACT})
        for rank, cache in enumerate(caches):
            prompts = cache.prompts()
            ours = depths(subscriber._index, "pod-a", prompts, rank)
            assert ours == truth(cache, prompts, rank)
        for engine in engines:
            engine.close()
        await subscriber.close()

    asyncio.run(main())


def test_an_engine_that_names_its_own_rank_is_believed(context, tmp_path):
    """Behind an external balancer, each rank is a pod of one rank that is not 0."""

    async def main() -> None:
        subscriber = make(pods=(pod(tmp_path, "pod-a"),))
        await subscriber.start()
        engine, cache = RecordedEngine(context, f"ipc://{tmp_path}/pod-a"), MadeCache(6, rank=3)
        await publish(engine, cache, 10)
        await until(lambda: is_exact(subscriber, cache))
        assert [(s.pod, s.rank) for s in subscriber.statuses()] == [("pod-a", 3)]
        assert status(subscriber).blocks > 0
        engine.close()
        await subscriber.close()

    asyncio.run(main())


def test_batches_of_another_rank_are_refused_and_said(context, tmp_path):
    """They tell of another cache; a publisher of all ranks in turn must not fill the memory."""

    async def main() -> None:
        subscriber = make(pods=(pod(tmp_path, "pod-a", ranks=2), pod(tmp_path, "pod-b")))
        await subscriber.start()
        engines = [RecordedEngine(context, f"ipc://{tmp_path}/pod-a", rank) for rank in (0, 1)]
        engines.append(RecordedEngine(context, f"ipc://{tmp_path}/pod-b"))
        caches = [MadeCache(4, rank=0), MadeCache(5, rank=0)]  # the second is 0 to itself
        for _ in range(10):
            for engine, cache in zip(engines, caches, strict=False):
                await publish(engine, cache, 1)
        for rank in range(10):
            await engines[2].publish(b"", rank, pack([1.0, [["BlockRemoved", [1]]], 3 + rank]))
        await until(lambda: [s.last_seq for s in subscriber.statuses()] == [9, 9, 9])
        found = [(s.pod, s.rank, s.state.value, s.reason) for s in subscriber.statuses()]
        assert found == [
            ("pod-a", 0, "EXACT", None),
            ("pod-a", 1, "PARTIAL", "its batches are of rank 0, not 1"),
            ("pod-b", 3, "PARTIAL", "its batches are of rank 12, not 3"),
        ]
        assert [s.counters["refused_batches"] for s in subscriber.statuses()] == [0, 10, 9]
        prompts = caches[0].prompts()
        assert depths(subscriber._index, "pod-a", prompts) == truth(caches[0], prompts)
        assert {h.rank for h in subscriber._index.holders().values() if h.pod == "pod-b"} == {3}
        for engine in engines:
            engine.close()
        await subscriber.close()

    asyncio.run(main())


def test_the_bound_socket_does_not_speak_for_a_pod_that_we_connect_to(context, tmp_path):
    """Whoever may send to it could otherwise empty the blocks of every pod."""

    async def main() -> None:
        subscriber = make(bind=f"ipc://{tmp_path}/bound", pods=(pod(tmp_path, "pod-a"),))
        await subscriber.start()
        engine, cache = RecordedEngine(context, f"ipc://{tmp_path}/pod-a"), MadeCache(8, clears=0)
        await publish(engine, cache, 10)
        await until(lambda: is_exact(subscriber, cache))
        socket = context.socket(zmq.XPUB)
        socket.connect(f"ipc://{tmp_path}/bound")
        await until(lambda: socket.poll(0))
        forged = pack([1.0, [["AllBlocksCleared"]], None])
        socket.send_multipart([b"kv@pod-a@m", (10).to_bytes(8, "big"), forged])
        socket.send_multipart([b"kv@pod-a@m", (11).to_bytes(8, "big"), b"junk"])
        await until(lambda: subscriber.counters.refused_claims == 2)
        assert is_exact(subscriber, cache)
        assert status(subscriber).counters["damaged"] == 0
        socket.close(0)
        engine.close()
        await subscriber.close()

    asyncio.run(main())


def test_a_discovered_pod_of_any_rank_may_be_configured(context, tmp_path):
    """What was followed without a replay is followed anew, and not twice."""

    async def main() -> None:
        subscriber = make(bind=f"ipc://{tmp_path}/bound", max_pods=1)
        await subscriber.start()
        engine = RecordedEngine(
            context, f"ipc://{tmp_path}/pod-a", connect=subscriber.bound_endpoint
        )
        cache = MadeCache(6, rank=3)
        await publish(engine, cache, 10)
        await until(lambda: [s.rank for s in subscriber.statuses()] == [3])
        engine.close()
        engine = RecordedEngine(context, f"ipc://{tmp_path}/pod-a")
        for seq, payload in enumerate(cache.batches):
            engine.keep(b"", seq, payload)
        subscriber.add_pod(pod(tmp_path, "pod-a"))
        await publish(engine, cache, 10)
        await until(lambda: is_exact(subscriber, cache))
        assert [(s.pod, s.rank) for s in subscriber.statuses()] == [("pod-a", 3)]
        prompts = cache.prompts()
        assert depths(subscriber._index, "pod-a", prompts, 3) == truth(cache, prompts, 3)
        engine.close()
        await subscriber.close()

    asyncio.run(main())


def test_an_empty_topic_is_known_by_its_endpoint(context, tmp_path):
    """An empty topic is vLLM's default."""

    async def main() -> None:
        subscriber = make(pods=(pod(tmp_path, "pod-a"),))
        await subscriber.start()
        engine, cache = RecordedEngine(context, f"ipc://{tmp_path}/pod-a"), MadeCache(7)
        for _ in range(10):
            await engine.publish(b"", *cache.step())
        await until(lambda: is_exact(subscriber, cache))
        engine.close()
        await subscriber.close()

    asyncio.run(main())


def test_pods_come_and_go_while_running(context, tmp_path):
    """A removed pod's blocks are gone at once, and so are its events; it may come back."""

    async def main() -> None:
        subscriber = make()
        await subscriber.start()
        engine, cache = RecordedEngine(context, f"ipc://{tmp_path}/pod-a"), MadeCache(8, clears=0)
        subscriber.add_pod(pod(tmp_path, "pod-a"))
        assert subscriber.states()["pod-a", 0] == (PodState.SILENT, "nothing heard yet")
        await publish(engine, cache, 20)
        await until(lambda: is_exact(subscriber, cache))
        n_blocks = status(subscriber).blocks
        assert subscriber.remove_pod("pod-a") == n_blocks > 0
        assert subscriber.statuses() == []
        assert sum(compare(subscriber, cache)[0]) == 0
        assert subscriber.remove_pod("pod-a") == 0
        subscriber.add_pod(pod(tmp_path, "pod-a"))
        await until(lambda: is_exact(subscriber, cache))
        ours, true = compare(subscriber, cache)
        assert ours == true
        engine.close()
        await subscriber.close()

    asyncio.run(main())


@pytest.mark.parametrize("field", ["events", "replay"])
def test_a_malformed_endpoint_is_an_error_at_once(tmp_path, field):
    """Not a log line at the first loss, and nothing half open stays behind."""

    async def main() -> None:
        with pytest.raises(zmq.ZMQError):
            await make(pods=(pod(tmp_path, "pod-a", **{field: "tcp://nowhere"}),)).start()
        subscriber = make()
        await subscriber.start()
        with pytest.raises(zmq.ZMQError):
            subscriber.add_pod(pod(tmp_path, "pod-a", **{field: "tcp://nowhere"}))
        assert (subscriber.statuses(), subscriber.pods()) == ([], [])
        await subscriber.close()

    asyncio.run(main())


def test_a_pod_without_a_way_to_us_is_refused():
    """It would stay silent for ever."""

    async def main() -> None:
        subscriber = make()
        await subscriber.start()
        with pytest.raises(InvalidInputError, match="no events endpoint"):
            subscriber.add_pod(PodEndpoint(name="pod-a"))
        assert subscriber.statuses() == []
        await subscriber.close()

    asyncio.run(main())


def test_more_pods_and_ranks_than_the_limits_are_refused(context, tmp_path):
    """A bound socket takes names from the network: they must not fill the memory."""

    async def main() -> None:
        subscriber = make(bind=f"ipc://{tmp_path}/bound", max_pods=3)
        await subscriber.start()
        socket = context.socket(zmq.XPUB)
        socket.connect(f"ipc://{tmp_path}/bound")
        await until(lambda: socket.poll(0))
        for number in range(10):
            _, payload = MadeCache(1).step()
            topic = f"kv@pod-{number}@m".encode()
            socket.send_multipart([topic, bytes(8), payload])
        _, payload = MadeCache(1, rank=5000).step()
        socket.send_multipart([b"kv@pod-0@m", bytes(8), payload])
        await until(lambda: subscriber.counters.refused_pods == 8)
        assert len(subscriber.statuses()) == 3
        socket.close(0)
        await subscriber.close()

    asyncio.run(main())


def test_nothing_runs_in_the_context_that_started_it(context, tmp_path):
    """Serve cancels what a request's context started; an admin request adds pods."""
    request = contextvars.ContextVar("request", default="none")
    seen = set()

    def spying_root(model, adapter, salt):
        seen.add(request.get())
        return root(model, adapter, salt)

    async def main() -> None:
        settings = EventsSettings.model_validate({**QUICK})
        subscriber = Subscriber(settings, BlockIndex(), model_root=spying_root)
        request.set("of a request")
        await subscriber.start()
        subscriber.add_pod(pod(tmp_path, "pod-a"))
        engine, cache = RecordedEngine(context, f"ipc://{tmp_path}/pod-a"), MadeCache(9)
        for _ in range(5):
            engine.keep(b"", *cache.step())
        await publish(engine, cache, 20)
        await until(lambda: is_exact(subscriber, cache))
        assert seen == {"none"}
        engine.close()
        await subscriber.close()

    asyncio.run(main())


def test_an_unexpected_error_stops_nothing(context, tmp_path, caplog):
    """It is logged and counted; the next message is handled."""
    is_broken = True

    def broken_root(model, adapter, salt):
        if is_broken:
            raise RuntimeError("a bug")
        return root(model, adapter, salt)

    async def main() -> None:
        nonlocal is_broken
        settings = EventsSettings.model_validate({**QUICK, "pods": (pod(tmp_path, "pod-a"),)})
        subscriber = Subscriber(settings, BlockIndex(), model_root=broken_root)
        await subscriber.start()
        engine = RecordedEngine(context, f"ipc://{tmp_path}/pod-a")
        cache = MadeCache(10, clears=0)
        await publish(engine, cache, 5)
        await until(lambda: status(subscriber).last_seq == 4)
        is_broken = False
        await publish(engine, cache, 20)
        await until(lambda: status(subscriber).last_seq == 24)
        assert status(subscriber).counters["failed_batches"] > 0
        assert status(subscriber).state is PodState.PARTIAL
        ours, true = compare(subscriber, cache)
        assert all(o <= t for o, t in zip(ours, true, strict=True))
        engine.close()
        await subscriber.close()

    asyncio.run(main())
    assert "a bug" in caplog.text


def test_a_flood_is_shed_and_made_good(context, tmp_path):
    """With short queues most of a flood is lost; replay brings it back, PARTIAL meanwhile."""

    async def main() -> None:
        settings = {"receive_hwm": 10, "max_held_batches": 20}
        subscriber = make(pods=(pod(tmp_path, "pod-a"),), **settings)
        await subscriber.start()
        engine = RecordedEngine(context, f"ipc://{tmp_path}/pod-a", send_hwm=10)
        cache = MadeCache(11)
        await publish(engine, cache, 1)
        for _ in range(3000):
            seq, payload = cache.step()
            engine.keep(b"", seq, payload)
            engine.send(b"", seq, payload)
        await until(lambda: status(subscriber).state is PodState.PARTIAL)
        await until(lambda: is_exact(subscriber, cache), 30.0)
        ours, true = compare(subscriber, cache)
        assert ours == true
        assert status(subscriber).counters["gaps"] > 0
        engine.close()
        await subscriber.close()

    asyncio.run(main())


def test_an_encrypted_pod_is_followed(context, tmp_path, monkeypatch):
    """CURVE when asked for: events carry the tokens of prompts."""
    server_public, server_secret = zmq.curve_keypair()
    public, secret = zmq.curve_keypair()
    monkeypatch.setenv("TEST_SECRET", secret.decode())
    curve = CurveSettings(
        public_key=public.decode(),
        secret_key_env="TEST_SECRET",  # noqa: S106  # the name of a variable
        server_key=server_public.decode(),
    )

    async def main() -> None:
        subscriber = make(pods=(pod(tmp_path, "pod-a", curve=curve),))
        await subscriber.start()
        engine = RecordedEngine(
            context, f"ipc://{tmp_path}/pod-a", curve=(server_public, server_secret)
        )
        cache = MadeCache(12)
        await publish(engine, cache, 10)
        await until(lambda: is_exact(subscriber, cache))
        engine.close()
        await subscriber.close()

    asyncio.run(main())


CHILD = """
import asyncio, pathlib, sys
from tests.deployments.test_subscriber import make, pod

async def main(folder):
    subscriber = make(pods=(pod(folder, "pod-a"), pod(folder, "pod-b")))
    await subscriber.start()
    while True:
        await asyncio.sleep(0.05)
        subscriber._index.snapshot(subscriber.positions()).write(folder / "index")
        print([s.last_seq for s in subscriber.statuses()], flush=True)

asyncio.run(main(pathlib.Path(sys.argv[1])))
"""


def test_a_killed_process_goes_on_from_its_snapshot(context, tmp_path):
    """After kill -9 the index equals one that never died, without a replay of everything.

    One of the two engines is killed as well, and has restarted meanwhile.
    """

    async def main() -> None:
        names = ("pod-a", "pod-b")
        engines = {name: RecordedEngine(context, f"ipc://{tmp_path}/{name}") for name in names}
        caches = {name: MadeCache(13 + number) for number, name in enumerate(names)}
        child = subprocess.Popen(  # noqa: ASYNC220  # our own code, and it runs along
            [sys.executable, "-c", CHILD, str(tmp_path)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        assert child.stdout is not None
        for name in names:
            await publish(engines[name], caches[name], 100)
        loop = asyncio.get_running_loop()
        while (await loop.run_in_executor(None, child.stdout.readline)).strip() != b"[99, 99]":
            pass
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        engines["pod-b"].restart()
        caches["pod-b"].restart()
        for name in names:
            for _ in range(50):
                engines[name].keep(b"", *caches[name].step())

        index, positions = BlockIndex.restore(tmp_path / "index")
        pods = tuple(pod(tmp_path, name) for name in names)
        settings = EventsSettings.model_validate({**QUICK, "pods": pods})
        subscriber = Subscriber(settings, index, model_root=root)
        subscriber.resume(positions)
        await subscriber.start()
        assert PodState.EXACT not in {state for state, _ in subscriber.states().values()}
        await until(lambda: [s.last_seq for s in subscriber.statuses()] == [149, 49])
        await until(lambda: {s for s, _ in subscriber.states().values()} == {PodState.EXACT})
        for name, cache in caches.items():
            prompts = cache.prompts()
            assert depths(index, name, prompts) == truth(cache, prompts)
        assert [s.counters["applied"] for s in subscriber.statuses()] == [50, 50]
        await subscriber.close()
        for engine in engines.values():
            engine.close()

    asyncio.run(main())


def test_a_snapshots_pods_that_are_no_longer_configured_are_dropped(tmp_path):
    """Nobody would ever tell that their blocks are gone."""

    async def main() -> None:
        index = BlockIndex()
        prompts = [list(range(8))]
        holder = index.holder("gone")
        tokens = np.arange(8, dtype=np.uint32)
        index.store(holder, [1, 2], None, tokens, block_size=4, root=root("m", None, None))
        settings = EventsSettings.model_validate(QUICK)
        subscriber = Subscriber(settings, index, model_root=root)
        gone = {"stream": [1, 1.0, [1, 1], [1, 1], None], "model": "m", "is_model_learned": False}
        gone |= {"rank": 0, "doubts": [[0, None]], "losses_forgiven": 0}
        subscriber.resume([["gone", 0, gone]])
        await subscriber.start()
        assert depths(index, "gone", prompts) == [0]
        await subscriber.close()

    asyncio.run(main())
