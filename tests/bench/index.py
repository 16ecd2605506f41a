"""The index beside its peers, on one workload, in one table: ``python -m tests.bench.index``.

Needs the workload generator and driver beside the checkout (KVATLAS_SHARED), and for Dynamo's
column a Python that has ``ai-dynamo-runtime`` (--peer-python). Workloads are made once, into
--folder.
Every figure is the median of fresh processes; the machine is named, since only ratios travel.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SHARED = Path(os.environ.get("KVATLAS_SHARED", Path(__file__).parents[2].parent / "shared"))
ADAPTER = Path(__file__).with_name("peers_adapter.py")
LENGTHS = ("64", "512", "4096")


def workload(folder: Path, pods: int) -> Path:
    """Return the workload for a number of pods, made unless it is there."""
    path = folder / f"p{pods}.npz"
    if not path.exists():
        make = [sys.executable, str(SHARED / "bench/workload.py"), "--pods", str(pods)]
        _run([*make, "--out", str(path)])
    return path


def drive(python: str, backend: str, path: Path, reps: int) -> dict[str, Any]:
    """Run one backend over a workload by the driver; return its result."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        call = [python, str(SHARED / "bench/bench_peers.py"), "--workload", str(path)]
        call += ["--backend", backend, "--reps", str(reps), "--out", str(out)]
        _run(call)
        return json.loads(out.read_text())


def ours_alone(path: Path) -> dict[str, float]:
    """Measure in a fresh process what the driver does not ask."""
    call = [sys.executable, "-m", "tests.bench.index", "--alone", str(path)]
    return json.loads(_run(call).splitlines()[-1])


def _run(call: list[str]) -> str:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        call, check=True, stdout=subprocess.PIPE, text=True, env=env
    ).stdout  # our own scripts


def alone(path: Path) -> dict[str, float]:
    """Find from tokens, hash, clear, grow: seconds, rates and the longest pauses of ours."""
    began = time.perf_counter()
    from kvcore.hashing import hash_blocks  # noqa: PLC0415  # compiling is what is timed
    from kvcore.index import BlockIndex  # noqa: PLC0415

    found = {"compile_s": time.perf_counter() - began}
    sys.path.insert(0, str(SHARED / "bench"))
    from bench_peers import WL  # noqa: PLC0415  # type: ignore[import-not-found]  # path set above

    from tests.bench.peers_adapter import KvAtlas  # noqa: PLC0415

    wl, ours = WL(str(path)), KvAtlas()
    ours.prepare(wl)
    for i in np.flatnonzero(wl.ev_phase == 0).tolist():
        ours.apply(i)
    ours.flush()
    rng = np.random.default_rng(5)
    for length in LENGTHS:
        prompts = []
        for i in np.flatnonzero(wl.q_len == int(length)).tolist()[:200]:
            ids = wl.q_ids[wl.q_idoff[i] : wl.q_idoff[i + 1]]
            tail = rng.integers(0, 128000, (int(length) - len(ids)) * 16, dtype=np.uint32)
            prompts.append(np.concatenate([wl.tokens[ids].reshape(-1), tail]))
        times = [
            _seconds(lambda p=p: ours.index.match(hash_blocks(p, block_size=16))) for p in prompts
        ]
        found[f"tokens_{length}_us"] = statistics.median(times) * 1e6
    tokens = rng.integers(0, 128000, 65536, dtype=np.uint32)
    seconds = statistics.median(
        _seconds(lambda: hash_blocks(tokens, block_size=16)) for _ in range(9)
    )
    found["hash_mtok_s"] = tokens.size / seconds / 1e6
    began = time.perf_counter()
    found["cleared_blocks"] = ours.index.clear_pod("pod-0")
    found["clear_ms"] = (time.perf_counter() - began) * 1e3
    grown, pauses = BlockIndex(), []
    holder, run = grown.holder("pod"), np.arange(16, dtype=np.uint64)
    for n in range(150_000):  # 2.4 million blocks: the index doubles eleven times
        part = tokens[n % 4000 :][:256] + np.uint32(n)
        began = time.process_time()  # what waits for another process is not ours
        grown.store(holder, run + np.uint64(16 * n), None, part, block_size=16)
        pauses.append(time.process_time() - began)
    found["worst_pause_ms"] = max(pauses) * 1e3
    return found


def _seconds(call: Callable[[], object], repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def rows(pods: int, results: dict[str, dict[str, Any]], own: dict[str, float]) -> list[tuple]:
    """Lay the figures out: name, ours, Dynamo, dict, goal."""
    names = ("ours", "dynamo", "dict")

    def of(*path: str, scale: float = 1.0) -> list[float | None]:
        values = []
        for name in names:
            value: Any = results.get(name)
            for key in path if value else ():
                value = value[key]
            values.append(value * scale if value is not None else None)
        return values

    doubled = 1 if pods <= 64 else 2
    goals = {"64": 2.5, "512": 5, "4096": 20}, {"64": 5, "512": 25, "4096": 150}
    table = [
        (f"find from hashes, {n} blocks, µs", *of("queries", n, "p50_us"), goals[0][n] * doubled)
        for n in LENGTHS
    ]
    table += [
        (
            f"find from tokens, {n} blocks, µs",
            own[f"tokens_{n}_us"],
            None,
            None,
            goals[1][n] * doubled,
        )
        for n in LENGTHS
    ]
    rate = "block_ops_per_s"
    table.append(("store in batches, M blocks/s", *of("phases", "store", rate, scale=1e-6), 8))
    each = results["each"]["phases"]
    table.append(("store event by event", each["store"][rate] / 1e6, None, None, 3))
    table.append(
        ("remove in batches, M blocks/s", *of("phases", "remove_tail", rate, scale=1e-6), 8)
    )
    table.append(("remove event by event", each["remove_tail"][rate] / 1e6, None, None, None))
    table.append(("bytes per membership", *of("rss_bytes_per_membership"), 32))
    wrong = [
        sum(c["wrong_queries"] for c in results[n]["checks"].values()) if n in results else None
        for n in names
    ]
    checked = sum(c["checked"] for c in results["ours"]["checks"].values())
    table.append((f"wrong answers of {checked}", *wrong, 0))
    table.append((f"clear {own['cleared_blocks']:,.0f} blocks, ms", own["clear_ms"], None, None, 1))
    table.append(("longest store while growing, CPU ms", own["worst_pause_ms"], None, None, 20))
    table.append(("tokens to keys, M tokens/s", own["hash_mtok_s"], None, None, 400))
    table.append(("compile at import, s", own["compile_s"], None, None, 10))
    return table


def show(pods: int, table: list[tuple]) -> None:
    """Print a table of 88 columns."""
    title = f"{pods} pods; {platform.processor() or platform.machine()}, {os.cpu_count()} CPUs"
    print(f"\n{title:<38}{'ours':>10}{'Dynamo':>10}{'dict':>10}{'goal':>10}")
    for name, *values in table:
        cells = [f"{'–' if v is None else format(v, ',.4g'):>10}" for v in values]
        print(f"{name:<38}{''.join(cells)}")


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pods", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "kvatlas-bench"
    )
    parser.add_argument("--peer-python", default=os.environ.get("KVATLAS_PEER_PYTHON"))
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(alone(options.alone)))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    for pods in options.pods:
        path = workload(options.folder, pods)
        results = {
            "ours": drive(sys.executable, f"{ADAPTER}:KvAtlas", path, options.reps),
            "each": drive(sys.executable, f"{ADAPTER}:KvAtlasEach", path, options.reps),
            "dict": drive(sys.executable, "pydict", path, options.reps),
        }
        if options.peer_python:
            results["dynamo"] = drive(options.peer_python, "radix", path, options.reps)
        show(pods, rows(pods, results, ours_alone(path)))


if __name__ == "__main__":
    main()
