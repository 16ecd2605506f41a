"""Scoring under a flood of events, and events under a flood of scores, on one loop.

``python -m tests.bench.bench_flood`` runs a subscriber and a scorer on one event loop, and an
engine in a process of its own that publishes 64-block events at a steady rate or as fast as it
can. It prints what a score waits for its turn and takes (ms), how old an event is when it is
applied (ms), and the process's memory.
"""

import argparse
import asyncio
import multiprocessing
import os
import statistics
import tempfile
import time

import numpy as np
import zmq

from deployments.settings import EventsSettings, PodEndpoint
from deployments.subscriber import Subscriber
from kvcore.hashing import hash_blocks
from kvcore.index import BlockIndex
from kvcore.scorer import score
from tests.bench.bench_events import BLOCK_SIZE, make, root
from tests.deployments.test_faults import until


def flood(endpoint: str, rate: float, seconds: float) -> None:
    """Publish for some time: ``rate`` events a second, 0 as fast as possible."""
    payloads = make(500, 1, 150_000)
    context = zmq.Context()
    socket = context.socket(zmq.XPUB)
    socket.set(zmq.SNDHWM, 10_000)
    socket.set(zmq.LINGER, 0)
    socket.bind(endpoint)
    socket.recv()
    start, seq = time.time(), 0
    rests = [payload[10:] for payload in payloads]
    stamp = np.empty(1, dtype=">f8")
    while (now := time.time()) < start + seconds:
        if rate and seq > (now - start) * rate:
            time.sleep(0.0005)
            continue
        stamp[0] = now
        payload = b"\x93\xcb" + stamp.tobytes() + rests[seq % len(rests)]
        socket.send_multipart([b"kv@pod-a@m", seq.to_bytes(8, "big"), payload])
        seq += 1
    context.destroy(linger=0)


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
            spawn = multiprocessing.get_context("spawn")
            process = spawn.Process(target=flood, args=(endpoint, rate, seconds + 1.0))
            process.start()
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

        before = subscriber.statuses()[0].counters["applied"]
        await asyncio.gather(watch(), *(ask() for _ in range(scorers)))
        status = subscriber.statuses()[0]
        applied = status.counters["applied"] - before
        await subscriber.close()
        if process is not None:
            process.join()
    with open("/proc/self/statm", encoding="ascii") as statm:  # noqa: ASYNC230  # a moment
        resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
    said = "none" if rate is None else "flood" if rate == 0 else f"{rate:.0f}/s"
    print(
        f"events {said:7} scorers {scorers:2} | scores {len(waits) / seconds:8.0f}/s"
        f" {percentiles(waits)}"
        f" | applied {applied * 64 / seconds / 1e6:5.2f} M blocks/s, age {percentiles(ages)}"
        f" | {status.state.value}, {status.counters['gaps']} gaps, {resident} MiB"
    )


def main() -> None:
    """Print a line for each combination."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0)
    args = parser.parse_args()
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
