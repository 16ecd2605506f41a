"""From message bytes to applied blocks: our kernel, its library twin, and the index behind both.

``python -m tests.bench.bench_events`` prints, for events of 64 blocks of 16 tokens, the medians of
interleaved rounds: decoding alone, and all the way into the index as the subscriber does it, once
into an index whose tables have their size, once from an empty one on.
``--profile`` adds where the time goes.
"""

import argparse
import cProfile
import gc
import pstats
import statistics
import time
from collections.abc import Callable
from functools import partial

from kvcore.events import (
    BatchDecoder,
    BlockStored,
    EventBatch,
    decode_batch,
    decode_batch_by_library,
)
from kvcore.feed import Feed
from kvcore.hashing import namespace_root
from kvcore.index import BlockIndex
from kvcore.stream import Stream
from tests.bench.flooder import BLOCK_SIZE, BLOCKS, make


def root(model: str, adapter: str | None, salt: str | None) -> int:
    """Return a namespace as the indexer does."""
    return namespace_root(model, block_size=BLOCK_SIZE, lora=adapter, salt=salt)


def decode_all(payloads: list[bytes], decode: Callable[[bytes], EventBatch]) -> None:
    """Decode every payload."""
    for payload in payloads:
        decode(payload)


def apply_all(
    payloads: list[bytes], decode: Callable[[bytes], EventBatch], index: BlockIndex
) -> None:
    """Decode, order and index every payload, as for one pod."""
    feed = Feed(index, "pod-a", 0, model="m", block_size=BLOCK_SIZE, model_root=root)
    stream = Stream(has_replay=True)
    for seq, payload in enumerate(payloads):
        for step in stream.receive(seq, payload, decode(payload), 0.0):
            if isinstance(step, EventBatch):
                feed.apply(step)


def empty_index() -> BlockIndex:
    """Return an index that has to grow, and whose memory the system commits meanwhile."""
    return BlockIndex(capacity_bytes=1 << 30)


def used_index(payloads: list[bytes]) -> BlockIndex:
    """Return an index whose engine has evicted as many blocks as will come."""
    index = empty_index()
    apply_all(payloads, decode_batch, index)
    holder = index.holder("pod-a")
    for payload in payloads:
        for event in decode_batch(payload).events:
            if isinstance(event, BlockStored):
                index.remove(holder, event.block_hashes)
    return index


def main() -> None:
    """Print millions of blocks a second."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--vocabulary", type=int, default=150_000)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    payloads = make(args.batches, 1, args.vocabulary)
    gc.collect()
    gc.freeze()  # as the indexer does
    print(f"{args.batches} events of {BLOCKS} x {BLOCK_SIZE} tokens, {len(payloads[0])} bytes each")
    decode = BatchDecoder().decode
    by_library = decode_batch_by_library
    cases: dict[str, tuple[Callable[[], BlockIndex | None], Callable]] = {
        "decode, kernel": (lambda: None, lambda _: decode_all(payloads, decode)),
        "decode, library": (lambda: None, lambda _: decode_all(payloads, by_library)),
        "applied, index in use": (
            lambda: used_index(payloads), partial(apply_all, payloads, decode)
        ),
        "applied, from empty": (empty_index, partial(apply_all, payloads, decode)),
        "applied, library": (empty_index, partial(apply_all, payloads, by_library)),
    }  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(args.rounds):
        for name, (prepare, run) in cases.items():
            index = prepare()
            start = time.perf_counter()
            run(index)
            times[name].append(time.perf_counter() - start)
    for name, found in times.items():
        rate = args.batches * BLOCKS / statistics.median(found) / 1e6
        best = args.batches * BLOCKS / min(found) / 1e6
        print(f"{name:22} {rate:6.2f} M blocks/s (best {best:.2f})")
    if args.profile:
        profile = cProfile.Profile()
        profile.runcall(apply_all, payloads, decode, empty_index())
        pstats.Stats(profile).sort_stats("tottime").print_stats(14)


if __name__ == "__main__":
    main()
