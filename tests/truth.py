"""Replay recorded engines through the real subscriber and compare predictions with the truth.

``python -m tests.truth FILE.jsonl…`` stands in for each recorded pod with a real PUB and a real
replay socket, publishes the recorded bytes in file order, and before every request predicts the
cached tokens that vLLM then reported. It prints ``FILE exact/total`` and every miss.
"""

import asyncio
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zmq

from deployments.settings import EventsSettings, PodEndpoint
from deployments.subscriber import Subscriber
from kvcore.events import BlockStored, decode_batch_by_library
from kvcore.hashing import hash_blocks, namespace_root
from kvcore.index import BlockIndex
from kvcore.scorer import score
from kvcore.stream_state import PodState
from tests.engine import RecordedEngine

# Requests of these phases overlap, so what is cached when one is scheduled is not in the file.
CONCURRENT = {"concurrent", "pressure", "throughput"}
FENCE_S = 30.0


class Miss(NamedTuple):
    """A request whose cached tokens were predicted wrongly."""

    id: str
    phase: str
    predicted: int
    actual: int
    state: PodState


class Verdict(NamedTuple):
    """How well one recording was predicted."""

    total: int
    misses: list[Miss]
    n_concurrent: int  # requests left out

    @property
    def exact(self) -> int:
        """Requests predicted to the token."""
        return self.total - len(self.misses)


class Shape(NamedTuple):
    """What a recording is about."""

    ranks: dict[str, int]  # pod -> data-parallel size
    block_size: int
    adapters: set[str]


class Replay:
    """One recording on real sockets, and the real subscriber that follows it."""

    def __init__(self, shape: Shape, folder: str, context: zmq.Context) -> None:
        self._shape, self._index = shape, BlockIndex()
        self._engines: dict[tuple[str, int], RecordedEngine] = {}
        pods = []
        for number, (pod, ranks) in enumerate(shape.ranks.items()):
            base = f"ipc://{folder}/{number}"
            for rank in range(ranks):
                self._engines[pod, rank] = RecordedEngine(context, base, rank)
            pods.append(
                PodEndpoint(name=pod, events=f"{base}.events", replay=f"{base}.replay", ranks=ranks)
            )
        settings = EventsSettings(
            block_size=shape.block_size, probe_interval_s=0.05, pods=tuple(pods)
        )
        self.subscriber = Subscriber(settings, self._index, model_root=self._root)

    def _root(self, _: str, adapter: str | None, salt: str | None) -> int:
        size = self._shape.block_size
        return namespace_root("base", block_size=size, lora=adapter, salt=salt)

    async def publish(self, pod: str, frames: list[str]) -> None:
        """Send recorded frames again."""
        topic, number, payload = map(bytes.fromhex, frames)
        engine = self._engines[pod, decode_batch_by_library(payload).rank or 0]
        seq = int.from_bytes(number, "big")
        if seq == 0 and engine.last_seq is not None:
            engine.restart()
        await engine.publish(topic, seq, payload)

    def restart(self, pod: str) -> None:
        """Do what the recorded pod did: come up with nothing."""
        for (name, _), engine in self._engines.items():
            if name == pod:
                engine.restart()

    async def predict(self, request: dict[str, Any], prompt: list[int]) -> tuple[int, PodState]:
        """Return the cached tokens to expect of a request's pod, and the pod's state."""
        pod, rank, body = request["pod"], _asked_rank(request), request["body"]
        await self._catch_up(pod)
        model = body.get("model")
        adapter = model if model in self._shape.adapters else None
        keys = hash_blocks(
            np.array(prompt[:-1], dtype=np.uint32),  # the last token is always computed
            block_size=self._shape.block_size,
            root=self._root("", adapter, body.get("cache_salt")),
        )
        found = score(self._index, keys, tier_weights={"gpu": 1.0}, pods=[pod])
        blocks = max((s.blocks for s in found if rank in (None, s.rank)), default=0)
        states = {
            state for (name, _), (state, _) in self.subscriber.states().items() if name == pod
        }
        worst = next((state for state in reversed(PodState) if state in states), PodState.SILENT)
        return blocks * self._shape.block_size, worst

    async def _catch_up(self, pod: str) -> None:
        """Wait until all that the pod has published is applied, as the recorder did."""
        deadline = asyncio.get_running_loop().time() + FENCE_S
        passing = ("history", "the connection broke;", "waiting", "nothing heard")
        while behind := [
            status
            for status in self.subscriber.statuses()
            if status.pod == pod
            and (
                status.last_seq != self._engines[pod, status.rank].last_seq
                or (status.reason or "").startswith(passing)
            )
        ]:
            if asyncio.get_running_loop().time() > deadline:
                raise TimeoutError(f"not caught up: {behind}")
            await asyncio.sleep(0.001)

    async def close(self) -> None:
        """Close every socket."""
        await self.subscriber.close()
        for engine in self._engines.values():
            engine.close()


async def check(text: str) -> Verdict:
    """Replay one recording, JSON lines."""
    lines = [json.loads(line) for line in text.splitlines()]
    answers = {line["id"]: line for line in lines if line["kind"] == "response"}
    misses: list[Miss] = []
    total = n_concurrent = 0
    with tempfile.TemporaryDirectory() as folder, zmq.Context() as context:
        replay = Replay(_learn(lines), folder, context)
        await replay.subscriber.start()
        try:
            for line in lines:
                if line["kind"] == "zmq":
                    await replay.publish(line["pod"], line["frames"])
                elif line["kind"] == "control" and line.get("op") == "start":
                    replay.restart(line["pod"])
                elif line["kind"] == "request" and line["id"] in answers:
                    if line["phase"] in CONCURRENT:
                        n_concurrent += 1
                        continue
                    total += 1
                    answer = answers[line["id"]]
                    predicted, state = await replay.predict(line, answer["prompt_token_ids"])
                    actual = answer["cached_tokens"] or 0
                    if predicted != actual:
                        misses.append(Miss(line["id"], line["phase"], predicted, actual, state))
        finally:
            await replay.close()
    return Verdict(total, misses, n_concurrent)


def _learn(lines: list[dict[str, Any]]) -> Shape:
    ranks: dict[str, int] = {}
    stored: list[BlockStored] = []
    for line in lines:
        if line["kind"] == "zmq":
            batch = decode_batch_by_library(bytes.fromhex(line["frames"][2]))
            ranks[line["pod"]] = max(ranks.get(line["pod"], 1), (batch.rank or 0) + 1)
            stored += [e for e in batch.events if isinstance(e, BlockStored)]
    # Full attention decides the prefix; the groups beside it may have blocks of another size.
    stored.sort(key=lambda event: event.kv_cache_spec_kind not in (None, "full_attention"))
    block_size = next((event.block_size for event in stored if event.block_size), 16)
    return Shape(ranks, block_size, {event.lora_name for event in stored if event.lora_name})


def _asked_rank(line: dict[str, Any]) -> int | None:
    rank = (line.get("headers") or {}).get("X-data-parallel-rank")
    return None if rank is None else int(rank)


def main() -> None:
    """Check every file named on the command line; exit with 1 if one cannot be replayed."""
    for name in sys.argv[1:]:
        verdict = asyncio.run(check(Path(name).read_text()))
        print(f"{name} {verdict.exact}/{verdict.total}")
        for miss in verdict.misses:
            print(
                f"  {miss.id} {miss.phase}: predicted {miss.predicted}, was {miss.actual}"
                f" ({miss.state.value})"
            )
        if verdict.n_concurrent:
            print(f"  {verdict.n_concurrent} overlapping requests left out")


if __name__ == "__main__":
    main()
