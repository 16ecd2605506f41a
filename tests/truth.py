"""Replay recorded engines through the real subscriber and compare predictions with the truth.

``python -m tests.truth FILE.jsonl…`` stands in for each recorded pod with a real PUB and a real
replay socket, publishes the recorded bytes in file order, and before every request predicts the
cached tokens that vLLM then reported. It prints ``FILE exact/total`` and every miss.
"""

import asyncio
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import numpy as np
import zmq

from deployments.settings import EventsSettings, PodEndpoint
from deployments.subscriber import Subscriber
from kvcore.hashing import hash_blocks, namespace_root
from kvcore.index import BlockIndex
from kvcore.scorer import score
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
    state: str


class Verdict(NamedTuple):
    """How well one recording was predicted."""

    total: int
    misses: list[Miss]
    n_concurrent: int  # requests left out

    @property
    def exact(self) -> int:
        """Requests predicted to the token."""
        return self.total - len(self.misses)


async def check(text: str) -> Verdict:
    """Replay one recording, JSON lines."""
    lines = [json.loads(line) for line in text.splitlines()]
    events = list(_events(lines))
    block_size = next(e["block_size"] for _, _, e in events if e.get("block_size"))
    adapters = {e["lora_name"] for _, _, e in events if e.get("lora_name")}
    ranks: dict[str, int] = {}
    for pod, rank, _ in events:
        ranks[pod] = max(ranks.get(pod, 1), rank + 1)
    answers = {line["id"]: line for line in lines if line["kind"] == "response"}

    def root(model: str, adapter: str | None, salt: str | None) -> int:
        return namespace_root("base", block_size=block_size, lora=adapter, salt=salt)

    index = BlockIndex()
    misses: list[Miss] = []
    total = n_concurrent = 0
    with tempfile.TemporaryDirectory() as folder, zmq.Context() as context:
        engines = {
            (pod, rank): RecordedEngine(context, f"ipc://{folder}/{number}", rank)
            for number, (pod, n_ranks) in enumerate(ranks.items())
            for rank in range(n_ranks)
        }
        subscriber = Subscriber(
            EventsSettings(
                block_size=block_size,
                probe_interval_s=0.05,
                pods=tuple(
                    PodEndpoint(
                        name=pod,
                        events=f"ipc://{folder}/{number}.events",
                        replay=f"ipc://{folder}/{number}.replay",
                        ranks=n_ranks,
                    )
                    for number, (pod, n_ranks) in enumerate(ranks.items())
                ),
            ),
            index,
            model_root=root,
        )
        await subscriber.start()
        try:
            for line in lines:
                if line["kind"] == "zmq":
                    topic, number, payload = map(bytes.fromhex, line["frames"])
                    engine = engines[line["pod"], _rank(payload)]
                    await engine.publish(topic, int.from_bytes(number, "big"), payload)
                elif line["kind"] == "control" and line.get("op") == "start":
                    for (pod, _), engine in engines.items():
                        if pod == line.get("pod"):
                            engine.restart()
                elif line["kind"] == "request" and line["id"] in answers:
                    if line["phase"] in CONCURRENT:
                        n_concurrent += 1
                        continue
                    total += 1
                    answer, rank = answers[line["id"]], _asked_rank(line)
                    await _fence(subscriber, engines, line["pod"])
                    body = line["body"]
                    model = body.get("model")
                    tokens = np.array(answer["prompt_token_ids"], dtype=np.uint32)
                    keys = hash_blocks(
                        tokens[:-1],  # the last token is always computed
                        block_size=block_size,
                        root=root("", model if model in adapters else None, body.get("cache_salt")),
                    )
                    found = score(index, keys, tier_weights={"gpu": 1.0}, pods=[line["pod"]])
                    blocks = max((s.blocks for s in found if rank in (None, s.rank)), default=0)
                    predicted, actual = blocks * block_size, answer["cached_tokens"] or 0
                    if predicted != actual:
                        state = next(s for s in subscriber.statuses() if s.pod == line["pod"])
                        misses.append(
                            Miss(line["id"], line["phase"], predicted, actual, state.state.value)
                        )
        finally:
            await subscriber.close()
            for engine in engines.values():
                engine.close()
    return Verdict(total, misses, n_concurrent)


def _events(lines: list[dict[str, Any]]) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yield (pod, rank, event as a map) by the library alone, to learn the recording's shape."""
    names = ["type", "block_hashes", "parent", "token_ids", "block_size", "lora_id", "medium"]
    names += ["lora_name"]
    for line in lines:
        if line["kind"] == "zmq":
            payload = bytes.fromhex(line["frames"][2])
            _, events, *_ = msgpack.unpackb(payload, strict_map_key=False)
            for event in events:
                if isinstance(event, list):
                    event = dict(zip(names, event, strict=False))  # noqa: PLW2901  # one shape
                if event.get("type") == "BlockStored":
                    yield line["pod"], _rank(payload), event


def _rank(payload: bytes) -> int:
    fields = msgpack.unpackb(payload, strict_map_key=False)
    return int(fields[2] or 0) if len(fields) > 2 else 0


def _asked_rank(line: dict[str, Any]) -> int | None:
    rank = (line.get("headers") or {}).get("X-data-parallel-rank")
    return None if rank is None else int(rank)


async def _fence(
    subscriber: Subscriber, engines: dict[tuple[str, int], RecordedEngine], pod: str
) -> None:
    """Wait until all that the pod has published is applied, as the recorder did."""
    deadline = asyncio.get_running_loop().time() + FENCE_S
    while True:
        behind = [
            status
            for status in subscriber.statuses()
            if status.pod == pod
            and (
                status.last_seq != engines[pod, status.rank].last_seq
                or (status.reason or "").startswith(("history", "the connection", "waiting"))
            )
        ]
        if not behind:
            return
        if asyncio.get_running_loop().time() > deadline:
            raise TimeoutError(f"not caught up: {behind}")
        await asyncio.sleep(0.001)


def main() -> None:
    """Check every file named on the command line; exit with 1 if one cannot be replayed."""
    for name in sys.argv[1:]:
        verdict = asyncio.run(check(Path(name).read_text()))
        print(f"{name} {verdict.exact}/{verdict.total}")
        for miss in verdict.misses:
            print(
                f"  {miss.id} {miss.phase}: predicted {miss.predicted}, was {miss.actual}"
                f" ({miss.state})"
            )
        if verdict.n_concurrent:
            print(f"  {verdict.n_concurrent} overlapping requests left out")


if __name__ == "__main__":
    main()
