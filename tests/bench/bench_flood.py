"""Scoring under a flood of events, and events under a flood of scores, on one loop.

``python -m tests.bench.bench_flood`` runs a subscriber and a scorer on one event loop, and an
engine in a process of its own that publishes 64-block events at a steady rate or as fast as it
can. It prints what a score waits for its turn and takes (ms), how old an event is when it is
applied (ms), and the process's memory.
"""

import argparse
import asyncio
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

from deployments.settings import EventsSettings, PodEndpoint
from deployments.subscriber import Subscriber
from kvcore.hashing import hash_blocks
from kvcore.index import BlockIndex
from kvcore.scorer import score
from tests.bench.bench_events import root
from tests.bench.flooder import BLOCK_SIZE
from tests.deployments.test_faults import until


def percentiles(found: list[float]) -> str:
    """Return p50, p99 and the maximum, in milliseconds."""
    if not found:
        return "-"
    cuts = statistics.quantiles(found, n=100) if len(found) > 1 else found * 99
    return f"p50 {cuts[49] * 1e3:6.2f}  p99 {cuts[98] * 1e3:6.2f}  max {max(found) * 1e3:6.2f}"


async def run(rate: float | None, scorers: int, seconds: float) -> None:
    """Measure one combination; ``rate`` None is no events, 0 as many as possible."""
    index = BlockIndex(capacity_bytes=256 << 20)
    keys = hash_blocks(
        np.arange(512 * BLOCK_SIZE, dtype=np.uint32),
        block_size=BLOCK_SIZE,
        root=root("m", None, None),
    )
    holder = index.holder("pod-b")
    names = np.arange(1, 513, dtype=np.uint64)
    tokens = np.arange(512 * BLOCK_SIZE, dtype=np.uint32)
    index.store(holder, names, None, tokens, block_size=BLOCK_SIZE, root=root("m", None, None))
    waits: list[float] = []
    ages: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        endpoint = f"ipc://{folder}/events"
        settings = EventsSettings(
            block_size=BLOCK_SIZE, pods=(PodEndpoint(name="pod-a", model="m", events=endpoint),)
        )
        subscriber = Subscriber(settings, index, model_root=root)
        await subscriber.start()
        process = None
        if rate is not None:
            arguments = [endpoint, str(rate), str(seconds + 1.0)]
            process = subprocess.Popen(  # noqa: ASYNC220  # our own code, and it runs along
                [sys.executable, "-m", "tests.bench.flooder", *arguments]
            )
            await until(lambda: subscriber.statuses()[0].counters["applied"])
        end = time.perf_counter() + seconds

        async def ask() -> None:
            while time.perf_counter() < end:
                asked = time.perf_counter()
                await asyncio.sleep(0)  # its turn on the loop, as a request's
                score(index, keys, tier_weights={"gpu": 1.0})
                waits.append(time.perf_counter() - asked)

        async def watch() -> None:
            while time.perf_counter() < end:
                await asyncio.sleep(0.001)
                status = subscriber.statuses()[0]
                if status.lag_s is not None:
                    ages.append(status.lag_s)

        before, worked = subscriber.statuses()[0].counters["applied"], time.thread_time()
        await asyncio.gather(watch(), *(ask() for _ in range(scorers)))
        status = subscriber.statuses()[0]
        applied, worked = status.counters["applied"] - before, time.thread_time() - worked
        await subscriber.close()
        if process is not None:
            process.wait()
    with open("/proc/self/statm", encoding="ascii") as statm:  # noqa: ASYNC230  # a moment
        resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
    said = "none" if rate is None else "flood" if rate == 0 else f"{rate:.0f}/s"
    print(
        f"events {said:7} scorers {scorers:2} | scores {len(waits) / seconds:8.0f}/s"
        f" {percentiles(waits)}"
        f" | applied {applied * 64 / seconds / 1e6:5.2f} M blocks/s, age {percentiles(ages)}"
        f" | loop used {worked / seconds:4.0%} of a core"
        f" | {status.state.value}, {status.counters['gaps']} gaps, {resident} MiB"
    )


def main() -> None:
    """Print a line for each combination."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0)
    args = parser.parse_args()
    gc.collect()
    gc.freeze()  # as the indexer does
    for rate, scorers in (
        (None, 1),
        (None, 8),
        (500.0, 0),
        (500.0, 1),
        (500.0, 8),
        (0.0, 0),
        (0.0, 1),
        (0.0, 8),
    ):
        asyncio.run(run(rate, scorers, args.seconds))


if __name__ == "__main__":
    main()
