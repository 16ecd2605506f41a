"""A service that ends and another that goes on: what is kept, and what nobody can vouch for."""

import asyncio
import logging
from contextlib import asynccontextmanager

import numpy as np
import pytest
import zmq

from deployments.index_service import IndexService
from deployments.schemas import ScoreQuery
from deployments.settings import PodEndpoint, Settings
from tests.deployments.test_faults import QUICK, publish, until
from tests.engine import RecordedEngine, pack
from tests.made_cache import BLOCK_SIZE, MadeCache

EVENTS = {name: value for name, value in QUICK.items() if name != "block_size"}


@pytest.fixture
def context():
    made = zmq.Context()
    yield made
    made.destroy(linger=0)


@pytest.fixture
def pod(tmp_path) -> dict:
    base = f"ipc://{tmp_path}/pod-a"
    return {"name": "pod-a", "model": "m", "events": f"{base}.events", "replay": f"{base}.replay"}


@asynccontextmanager
async def serving(tmp_path, pods, *, block_size=BLOCK_SIZE, **index):
    """Run a service that keeps a snapshot; leaving is an orderly end, which saves one."""
    args = {
        "model": "m",
        "block_size": block_size,
        "events": {**EVENTS, "pods": pods},
        "index": {"snapshot_path": str(tmp_path / "kept" / "index"), **index},
    }
    service = IndexService(Settings.model_validate(args))
    await service.start()
    try:
        yield service
    finally:
        await service.close()


def scores(service, cache):
    """Return each prompt's answer, as far as it is about blocks."""
    answers = [
        service.answer(ScoreQuery(np.array(p, np.uint32).tobytes(), "m", "r"))
        for p in cache.prompts()
    ]
    return [(answer.pod_scores(), answer.cached_tokens) for answer in answers]


def state(service):
    return [(pod["pod"], pod["state"]) for pod in service.pods()]


def counters(service):
    return service.pods()[0]["counters"]


async def exact(service, n_batches):
    await until(lambda: service.pods()[0]["last_seq"] == n_batches - 1)
    await until(lambda: state(service) == [("pod-a", "EXACT")])


def test_a_successor_goes_on_where_the_index_stood(context, tmp_path, pod):
    """Only what happened meanwhile is replayed; until then it says PARTIAL, never EXACT."""

    async def main() -> None:
        engine, cache = RecordedEngine(context, pod["events"][: -len(".events")]), MadeCache(1)
        async with serving(tmp_path, [pod]) as service:
            await publish(engine, cache, 60)
            await exact(service, 60)
        for _ in range(20):
            engine.keep(b"", *cache.step())
        async with serving(tmp_path, [pod]) as service:
            assert service.pods()[0]["blocks"] > 0
            assert state(service) != [("pod-a", "EXACT")]
            assert service.answer(ScoreQuery(bytes(4 * 8), "m", "r")).mode == "PARTIAL"
            await exact(service, 80)
            assert counters(service)["applied"] == 20
            restored = scores(service, cache)
        (tmp_path / "kept" / "index").unlink()
        async with serving(tmp_path, [pod]) as service:
            await exact(service, 80)
            assert counters(service)["applied"] == 80
            assert scores(service, cache) == restored
        engine.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda path: path.write_bytes(b"not an index"), "not a snapshot"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "damaged"),
        (None, "blocks have 4 tokens"),
    ],
)
def test_a_snapshot_of_no_use_is_said_aloud(tmp_path, pod, caplog, change, says):
    """It starts empty, which replays make good; it does not start wrong, nor refuse to start."""

    async def main() -> None:
        async with serving(tmp_path, [pod]):
            pass
        if change is not None:
            change(tmp_path / "kept" / "index")
        with caplog.at_level(logging.ERROR):
            async with serving(tmp_path, [pod], block_size=4 if change else 8) as service:
                assert service.pods()[0]["blocks"] == 0
        assert says in caplog.text

    asyncio.run(main())


@pytest.mark.parametrize("lost", ["replay", "model", "pod"])
def test_blocks_that_nobody_can_vouch_for_are_dropped(context, tmp_path, pod, lost):
    """Without a replay an engine may have restarted unseen; another model has other keys."""

    async def main() -> None:
        engine, cache = RecordedEngine(context, pod["events"][: -len(".events")]), MadeCache(2)
        async with serving(tmp_path, [pod]) as service:
            await publish(engine, cache, 30)
            await exact(service, 30)
            assert service.pods()[0]["blocks"] > 0
        engine.close()
        changed = {"replay": [{**pod, "replay": None}], "model": [{**pod, "model": "n"}], "pod": []}
        async with serving(tmp_path, changed[lost]) as service:
            assert sum(pod["blocks"] for pod in service.pods()) == 0
            assert all(not pods for pods, _ in scores(service, cache))

    asyncio.run(main())


def test_pods_that_were_added_by_request_are_followed_again(tmp_path, pod):
    """The operator would not know that a crash forgot them."""

    async def main() -> None:
        added = PodEndpoint(name="pod-b", events=f"ipc://{tmp_path}/pod-b.events")
        async with serving(tmp_path, [pod]) as service:
            await service.add_pod(added)
        async with serving(tmp_path, [pod]) as service:
            assert [entry.name for entry in service.endpoints()] == ["pod-a", "pod-b"]
            await service.remove_pod("pod-b")
        async with serving(tmp_path, [pod]) as service:
            assert [entry.name for entry in service.endpoints()] == ["pod-a"]

    asyncio.run(main())


def test_events_and_scores_go_on_while_snapshots_are_written(context, tmp_path, pod):
    """Whatever moment a snapshot shows, its index and its positions are of that one moment."""

    async def main() -> None:
        engine, cache = RecordedEngine(context, pod["events"][: -len(".events")]), MadeCache(3)
        kept = b""
        async with serving(tmp_path, [pod]) as service:
            for n in range(1, 21):
                sending = asyncio.create_task(publish(engine, cache, 20))
                await service.save()
                kept = (tmp_path / "kept" / "index").read_bytes()
                await sending
                await exact(service, 20 * n)
            truth = scores(service, cache)
        (tmp_path / "kept" / "index").write_bytes(kept)  # as if it had been killed there
        async with serving(tmp_path, [pod]) as service:
            await exact(service, 400)
            assert scores(service, cache) == truth
        engine.close()

    asyncio.run(main())


def test_what_an_eviction_cost_is_forgiven_once(context, tmp_path, pod):
    """Blocks that the index had no room for are no reason for doubt after the engine's clear.

    Those that it has no room for after that are, be they fewer, and a restart forgets neither.
    """

    async def main() -> None:
        engine, n_sent = RecordedEngine(context, pod["events"][: -len(".events")]), 0

        async def send(*events) -> None:
            nonlocal n_sent
            await engine.publish(b"", n_sent, pack([1000.0 + n_sent, events, None]))
            n_sent += 1
            await until(lambda: service.pods()[0]["last_seq"] == n_sent - 1)

        tokens = [1] * (3 * BLOCK_SIZE)
        orphans = ["BlockStored", [1, 2, 3], 99, tokens, BLOCK_SIZE]
        async with serving(tmp_path, [pod], max_waiting_blocks=0) as service:
            await send(orphans)
            await until(lambda: service.pods()[0]["reason"] == "the index had no room for 3 blocks")
            await send(["AllBlocksCleared"])
            await until(lambda: state(service) == [("pod-a", "EXACT")])
            await send(["BlockStored", [1], 99, tokens[:BLOCK_SIZE], BLOCK_SIZE])
            await until(lambda: service.pods()[0]["reason"] == "the index had no room for 1 blocks")
        async with serving(tmp_path, [pod], max_waiting_blocks=0) as service:
            await until(lambda: service.pods()[0]["reason"] == "the index had no room for 1 blocks")
        engine.close()

    asyncio.run(main())


def test_a_snapshot_that_cannot_be_written_stops_nothing(tmp_path, pod, caplog):
    """A full disk costs the snapshot, not the service."""

    async def main() -> None:
        async with serving(tmp_path, [pod]) as service:
            (tmp_path / "kept" / "index").mkdir()
            with pytest.raises(OSError, match="directory"):
                await service.save()
            assert service.answer(ScoreQuery(bytes(32), "m", "r")).n_blocks == 2
        assert "last snapshot" in caplog.text
        assert list((tmp_path / "kept").glob("*.part")) == []

    asyncio.run(main())
