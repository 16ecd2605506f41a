"""Real sockets, and everything that can go wrong on them.

After each fault the index equals one that saw every batch, or the pod says PARTIAL and is never
said to hold more than it does.
"""

import asyncio
import pickle
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import pytest
import zmq

from deployments.settings import EventsSettings, PodEndpoint
from deployments.subscriber import PodStatus, Subscriber
from kvcore.index import BlockIndex
from kvcore.stream_state import PodState
from tests.engine import RecordedEngine, pack
from tests.made_cache import BLOCK_SIZE, MadeCache, depths, root, truth

TOPIC = b"kv@pod-a@m"
QUICK = {
    "block_size": BLOCK_SIZE,
    "probe_interval_s": 0.1,
    "reply_timeout_s": 0.15,
    "max_replay_attempts": 3,
    "gap_grace_s": 0.1,
    "rebuild_interval_s": 0.3,
}


@pytest.fixture
def context() -> Iterator[zmq.Context]:
    made = zmq.Context()
    yield made
    made.destroy(linger=0)


@pytest.fixture
def endpoint(tmp_path) -> str:
    return f"ipc://{tmp_path}/pod-a"


@asynccontextmanager
async def following(endpoint: str, *, replay: bool = True, **settings) -> AsyncIterator[Subscriber]:
    """Run a subscriber to one pod."""
    pod = PodEndpoint(
        name="pod-a",
        model="m",
        events=f"{endpoint}.events",
        replay=f"{endpoint}.replay" if replay else None,
    )
    made = EventsSettings.model_validate({**QUICK, "pods": (pod,), **settings})
    subscriber = Subscriber(made, BlockIndex(), model_root=root)
    await subscriber.start()
    try:
        yield subscriber
    finally:
        await subscriber.close()


async def until(holds: Callable[[], object], timeout_s: float = 15.0) -> None:
    """Wait until something becomes true."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    while not holds():
        assert asyncio.get_running_loop().time() < deadline, "it never became true"
        await asyncio.sleep(0.005)


def status(subscriber: Subscriber) -> PodStatus:
    return next(s for s in subscriber.statuses() if s.pod == "pod-a")


def is_exact(subscriber: Subscriber, cache: MadeCache) -> bool:
    now = status(subscriber)
    return now.state is PodState.EXACT and now.last_seq == len(cache.batches) - 1


def compare(subscriber: Subscriber, cache: MadeCache) -> tuple[list[int], list[int]]:
    """Return what the index says of every prompt, and what is true."""
    prompts = cache.prompts()
    return depths(subscriber._index, "pod-a", prompts), truth(cache, prompts)


async def publish(engine: RecordedEngine, cache: MadeCache, n: int) -> None:
    for _ in range(n):
        await engine.publish(TOPIC, *cache.step())


@pytest.mark.parametrize("percent", [1, 5, 20])
@pytest.mark.parametrize("is_old_protocol", [False, True], ids=["0.26", "before"])
def test_messages_dropped_repeated_and_reordered(context, endpoint, percent, is_old_protocol):
    """A lossy network costs nothing where the engine can be asked again."""
    chance = random.Random(percent)

    async def main() -> None:
        engine = RecordedEngine(context, endpoint, is_old_protocol=is_old_protocol)
        cache = MadeCache(percent)
        async with following(endpoint) as subscriber:
            await publish(engine, cache, 1)
            late = []
            for _ in range(300):
                seq, payload = cache.step()
                engine.keep(TOPIC, seq, payload)
                fate = chance.random() * 100
                if fate < percent:
                    continue
                if fate < 2 * percent:
                    late.append((seq, payload))
                    continue
                engine.send(TOPIC, seq, payload)
                if fate < 3 * percent:
                    engine.send(TOPIC, seq, payload)
                if late and chance.random() < 0.5:
                    engine.send(TOPIC, *late.pop())
            await until(lambda: is_exact(subscriber, cache))
            ours, true = compare(subscriber, cache)
            assert ours == true
            assert status(subscriber).counters["gaps"] > 0
        engine.close()

    asyncio.run(main())


def lossy(seed: int):
    chance = random.Random(seed)
    return lambda found: [m for m in found if chance.random() > 0.3]


@pytest.mark.parametrize("kind", ["loses", "stalls", "silent"])
def test_a_replay_socket_that_misbehaves_at_first(context, endpoint, kind):
    """Replies that lose messages, stop half-way or never come are asked for again."""

    async def main() -> None:
        calls = 0

        def answer(found):
            nonlocal calls
            calls += 1
            engine.is_stalling = kind == "stalls" and calls <= 2
            if kind == "loses":
                return lossy(calls)(found)
            return None if kind == "silent" and calls <= 2 else found

        engine = RecordedEngine(context, endpoint, answer=answer)
        cache = MadeCache(7)
        for _ in range(200):  # history before the subscriber is there
            engine.keep(TOPIC, *cache.step())
        async with following(endpoint) as subscriber:
            await publish(engine, cache, 50)
            await until(lambda: is_exact(subscriber, cache))
            ours, true = compare(subscriber, cache)
            assert ours == true
            assert calls >= 2
        engine.close()

    asyncio.run(main())


def test_a_replay_socket_that_never_answers(context, endpoint):
    """The pod goes on with what is live, says PARTIAL, and recovers when it can be asked."""

    async def main() -> None:
        is_up = False
        engine = RecordedEngine(context, endpoint, answer=lambda m: m if is_up else None)
        cache = MadeCache(8, clears=0)
        for _ in range(50):
            engine.keep(TOPIC, *cache.step())
        async with following(endpoint) as subscriber:
            await publish(engine, cache, 50)
            await until(lambda: status(subscriber).last_seq == 99)
            now = status(subscriber)
            assert now.state is PodState.PARTIAL
            assert now.reason == "batches 0 to 49 are lost"
            ours, true = compare(subscriber, cache)
            assert all(o <= t for o, t in zip(ours, true, strict=True))
            is_up = True
            await until(lambda: is_exact(subscriber, cache))
            ours, true = compare(subscriber, cache)
            assert ours == true
        engine.close()

    asyncio.run(main())


def test_a_gap_older_than_the_buffer(context, endpoint):
    """What nobody can replay is lost: PARTIAL and not above the truth, until the cache clears."""

    async def main() -> None:
        engine = RecordedEngine(context, endpoint, buffer=20)
        cache = MadeCache(9, clears=0)
        async with following(endpoint) as subscriber:
            await publish(engine, cache, 30)
            await until(lambda: is_exact(subscriber, cache))
            for _ in range(100):
                engine.keep(TOPIC, *cache.step())
            await publish(engine, cache, 1)
            await until(lambda: status(subscriber).last_seq == 130)
            now = status(subscriber)
            assert now.state is PodState.PARTIAL
            assert now.counters["lost"] > 0
            ours, true = compare(subscriber, cache)
            assert all(o <= t for o, t in zip(ours, true, strict=True))
            cleared = pack([9e9, [["AllBlocksCleared"]], None])
            cache.batches.append(cleared)
            await engine.publish(TOPIC, 131, cleared)
            await until(lambda: is_exact(subscriber, cache))
        engine.close()

    asyncio.run(main())


@pytest.mark.parametrize("replay", [True, False])
@pytest.mark.parametrize("n_before", [3, 40])
def test_an_engine_killed_and_restarted(context, endpoint, replay, n_before):
    """It starts again at 0 without a word; its old blocks are gone."""

    async def main() -> None:
        engine = RecordedEngine(context, endpoint)
        cache = MadeCache(10)
        async with following(endpoint, replay=replay) as subscriber:
            await publish(engine, cache, n_before)
            await until(lambda: is_exact(subscriber, cache))
            engine.restart()
            cache.restart()
            await publish(engine, cache, 20)
            await until(lambda: is_exact(subscriber, cache))
            ours, true = compare(subscriber, cache)
            assert ours == true
        engine.close()

    asyncio.run(main())


def test_an_engine_restarted_and_idle_is_cold(context, endpoint):
    """Before its first event, nothing but the probe can tell."""

    async def main() -> None:
        engine = RecordedEngine(context, endpoint)
        cache = MadeCache(11)
        async with following(endpoint) as subscriber:
            await publish(engine, cache, 20)
            await until(lambda: is_exact(subscriber, cache))
            engine.restart()
            await until(lambda: status(subscriber).last_seq is None)
            assert status(subscriber).blocks == 0
            await until(lambda: status(subscriber).state is PodState.EXACT)
        engine.close()

    asyncio.run(main())


def test_an_engine_that_is_gone_is_doubted_at_once(context, endpoint):
    """It says nothing more, and what it held is gone with it; silence alone tells after 30 s."""

    async def main() -> None:
        engine = RecordedEngine(context, endpoint)
        cache = MadeCache(16, clears=0)
        async with following(endpoint) as subscriber:
            await publish(engine, cache, 20)
            await until(lambda: is_exact(subscriber, cache))
            engine.close()
            await until(lambda: status(subscriber).state is PodState.PARTIAL)
            assert "connection broke" in (status(subscriber).reason or "")
            await until(lambda: status(subscriber).blocks == 0)
            assert status(subscriber).state is PodState.PARTIAL

    asyncio.run(main())


def test_a_late_joiner(context, endpoint):
    """A subscriber that comes 500 batches late knows all of them."""

    async def main() -> None:
        engine = RecordedEngine(context, endpoint)
        cache = MadeCache(12)
        for _ in range(500):
            engine.keep(TOPIC, *cache.step())
        async with following(endpoint) as subscriber:
            await until(lambda: is_exact(subscriber, cache))
            ours, true = compare(subscriber, cache)
            assert ours == true
        engine.close()

    asyncio.run(main())


def test_a_lost_tail(context, endpoint):
    """No later event shows that the last ones are missing."""

    async def main() -> None:
        engine = RecordedEngine(context, endpoint)
        cache = MadeCache(13)
        async with following(endpoint) as subscriber:
            await publish(engine, cache, 20)
            await until(lambda: is_exact(subscriber, cache))
            for _ in range(5):
                engine.keep(TOPIC, *cache.step())
            await until(lambda: is_exact(subscriber, cache))
            ours, true = compare(subscriber, cache)
            assert ours == true
        engine.close()

    asyncio.run(main())


NUMBER = (5).to_bytes(8, "big")
JUNK = {
    "no frames but the topic": [TOPIC],
    "two frames": [TOPIC, NUMBER],
    "four frames": [TOPIC, NUMBER, b"\x90", b""],
    "a hundred frames": [TOPIC] * 100,
    "a 7-byte number": [TOPIC, NUMBER[1:], pack([1.0, [], None])],
    "garbage": [TOPIC, NUMBER, b"\xff\xfe garbage"],
    "a pickle": [TOPIC, NUMBER, pickle.dumps({"type": "BlockStored"})],
    "a 4 GiB array": [TOPIC, NUMBER, b"\x93\xcb" + bytes(8) + b"\xdd\xff\xff\xff\xff"],
    "deep nesting": [TOPIC, NUMBER, b"\x91" * 100_000],
    "no utf-8": [b"\xff\xfe", NUMBER, b"\xc1"],
    "empty": [b"", b"", b""],
}


@pytest.mark.parametrize("replay", [True, False])
@pytest.mark.parametrize("frames", JUNK.values(), ids=JUNK)
def test_junk_between_the_messages(context, endpoint, frames, replay):
    """Bad bytes are counted; with a replay to ask they cost nothing, without one they are said."""

    async def main() -> None:
        engine = RecordedEngine(context, endpoint)
        cache = MadeCache(14, clears=0)
        async with following(endpoint, replay=replay) as subscriber:
            await publish(engine, cache, 10)
            await until(lambda: status(subscriber).last_seq == 9)
            engine._pub.send_multipart(frames)
            await publish(engine, cache, 10)
            await until(lambda: status(subscriber).last_seq == 19)
            assert status(subscriber).counters["damaged"] == 1
            ours, true = compare(subscriber, cache)
            if replay:
                await until(lambda: is_exact(subscriber, cache))
                assert ours == true
            else:
                assert status(subscriber).state is PodState.PARTIAL
                assert all(o <= t for o, t in zip(ours, true, strict=True))
            assert subscriber.counters.errors == 0
        engine.close()

    asyncio.run(main())


def test_a_batch_damaged_on_the_way_is_replayed(context, endpoint):
    """The number was used, so its batch is asked for again."""

    async def main() -> None:
        engine = RecordedEngine(context, endpoint)
        cache = MadeCache(15)
        async with following(endpoint) as subscriber:
            await publish(engine, cache, 5)
            seq, payload = cache.step()
            engine.keep(TOPIC, seq, payload)
            engine.send(TOPIC, seq, payload[:-3])
            await publish(engine, cache, 5)
            await until(lambda: is_exact(subscriber, cache))
            ours, true = compare(subscriber, cache)
            assert ours == true
        engine.close()

    asyncio.run(main())


def test_a_pod_that_claims_anothers_name(context, tmp_path):
    """Whom a socket belongs to is configured; what it says of itself must not hurt another."""

    async def main() -> None:
        engines = {n: RecordedEngine(context, f"ipc://{tmp_path}/{n}") for n in ("pod-a", "pod-b")}
        caches = {name: MadeCache(20 + i) for i, name in enumerate(engines)}
        pods = tuple(
            PodEndpoint(
                name=name,
                model="m",
                events=f"ipc://{tmp_path}/{name}.events",
                replay=f"ipc://{tmp_path}/{name}.replay",
            )
            for name in engines
        )
        settings = EventsSettings.model_validate({**QUICK, "pods": pods})
        subscriber = Subscriber(settings, BlockIndex(), model_root=root)
        await subscriber.start()
        for name, engine in engines.items():
            for _ in range(20):
                await engine.publish(f"kv@{name}@m".encode(), *caches[name].step())
        await until(lambda: is_exact(subscriber, caches["pod-a"]))
        for _ in range(20):
            seq, payload = caches["pod-b"].step()
            engines["pod-b"].send(TOPIC, seq, payload)
        await until(lambda: subscriber.counters.refused_claims == 20)
        ours, true = compare(subscriber, caches["pod-a"])
        assert ours == true
        states = subscriber.states()
        assert states["pod-a", 0] == (PodState.EXACT, None)
        assert states["pod-b", 0] == (PodState.PARTIAL, "its socket used the name of pod pod-a")
        await subscriber.close()
        for engine in engines.values():
            engine.close()

    asyncio.run(main())


def test_two_publishers_under_one_name_on_a_bound_socket(context, endpoint):
    """Nothing tells them apart but their numbers, which collide: PARTIAL, not a mixture."""

    async def main() -> None:
        settings = EventsSettings.model_validate({**QUICK, "bind": f"{endpoint}.bound"})
        subscriber = Subscriber(settings, BlockIndex(), model_root=root)
        await subscriber.start()
        caches = [MadeCache(30, clears=0), MadeCache(31, clears=0)]
        sockets = [context.socket(zmq.PUB) for _ in caches]
        for socket in sockets:
            socket.connect(f"{endpoint}.bound")
        n_sent = 0

        def send() -> bool:
            nonlocal n_sent
            for socket, cache in zip(sockets, caches, strict=True):
                seq, payload = cache.step()
                socket.send_multipart([TOPIC, seq.to_bytes(8, "big"), payload])
            n_sent += 1
            found = subscriber.states().get(("pod-a", 0))
            return n_sent > 50 and found is not None and found[0] is PodState.PARTIAL

        await until(send)
        for socket in sockets:
            socket.close(0)
        await subscriber.close()

    asyncio.run(main())
