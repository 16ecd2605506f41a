"""From message bytes to applied blocks: our kernel, its library twin, and the index behind both.

``python -m tests.bench.bench_events`` prints, for events of 64 blocks of 16 tokens, the medians of
interleaved rounds: decoding alone, and all the way into the index as the subscriber does it.
``--profile`` adds where the time goes.
"""

import argparse
import cProfile
import pstats
import random
import statistics
import time
from collections.abc import Callable

from kvcore.events import EventBatch, decode_batch, decode_batch_by_library
from kvcore.feed import Feed
from kvcore.hashing import namespace_root
from kvcore.index import BlockIndex
from kvcore.stream import Stream
from tests.engine import pack

BLOCKS, BLOCK_SIZE = 64, 16


def make(n: int, seed: int, vocabulary: int) -> list[bytes]:
    """Return the payloads of ``n`` prefills in the shape of vLLM 0.32."""
    chance = random.Random(seed)
    return [
        pack(
            [
                1.0 + number,
                [
                    {
                        "type": "BlockStored",
                        "block_hashes": [chance.getrandbits(64) for _ in range(BLOCKS)],
                        "parent_block_hash": None,
                        "token_ids": [
                            chance.randrange(vocabulary) for _ in range(BLOCKS * BLOCK_SIZE)
                        ],
                        "block_size": BLOCK_SIZE,
                        "lora_id": None,
                        "medium": "GPU",
                        "lora_name": None,
                        "extra_keys": [None] * BLOCKS,
                        "group_idx": 0,
                        "kv_cache_spec_kind": "full_attention",
                    }
                ],
                0,
            ]
        )
        for number in range(n)
    ]


def root(model: str, adapter: str | None, salt: str | None) -> int:
    """Return a namespace as the indexer does."""
    return namespace_root(model, block_size=BLOCK_SIZE, lora=adapter, salt=salt)


def decode_all(payloads: list[bytes], decode: Callable[[bytes], EventBatch]) -> None:
    """Decode every payload."""
    for payload in payloads:
        decode(payload)


def apply_all(payloads: list[bytes], decode: Callable[[bytes], EventBatch]) -> None:
    """Decode, order and index every payload, as for one pod."""
    index = BlockIndex(capacity_bytes=1 << 30)
    feed = Feed(index, "pod-a", 0, model="m", block_size=BLOCK_SIZE, model_root=root)
    stream = Stream(has_replay=True)
    for seq, payload in enumerate(payloads):
        for step in stream.receive(seq, payload, decode(payload), 0.0):
            if isinstance(step, EventBatch):
                feed.apply(step)


def main() -> None:
    """Print millions of blocks a second."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--vocabulary", type=int, default=150_000)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    payloads = make(args.batches, 1, args.vocabulary)
    print(f"{args.batches} events of {BLOCKS} x {BLOCK_SIZE} tokens, {len(payloads[0])} bytes each")
    cases = {
        "decode, kernel": (decode_all, decode_batch),
        "decode, library": (decode_all, decode_batch_by_library),
        "applied, kernel": (apply_all, decode_batch),
        "applied, library": (apply_all, decode_batch_by_library),
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(args.rounds):
        for name, (run, decode) in cases.items():
            start = time.perf_counter()
            run(payloads, decode)
            times[name].append(time.perf_counter() - start)
    for name, found in times.items():
        rate = args.batches * BLOCKS / statistics.median(found) / 1e6
        best = args.batches * BLOCKS / min(found) / 1e6
        print(f"{name:18} {rate:6.2f} M blocks/s (best {best:.2f})")
    if args.profile:
        profile = cProfile.Profile()
        profile.runcall(apply_all, payloads, decode_batch)
        pstats.Stats(profile).sort_stats("tottime").print_stats(14)


if __name__ == "__main__":
    main()
