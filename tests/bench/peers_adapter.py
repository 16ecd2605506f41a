"""Our index behind the peers' benchmark driver: six methods, as its reference adapter has."""

import sys
from pathlib import Path
from typing import Any

import numpy as np

# The driver loads this file by its path, from anywhere.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from kvcore.index import BlockIndex, EventRun  # after the path is set

BLOCK_SIZE = 16  # tokens, of the workload


class KvAtlas:
    """Events queue up in `apply` and are applied by `flush`, in one call."""

    def prepare(self, workload: Any) -> None:
        """Lay the workload out in our native form: flat arrays."""
        w = workload
        self.index = BlockIndex(capacity_bytes=1 << 30)
        ids = [self.index.holder(f"pod-{pod}") for pod in range(w.P)]
        self._pods = np.array([self.index.members.scopes[f"pod-{p}", 0, 0] for p in range(w.P)])
        self._pod_of_scope = {int(bit): pod for pod, bit in enumerate(self._pods)}
        blocks = np.concatenate([w.ev(i) for i in range(w.n_ev)])
        parents = np.where(w.ev_parent >= 0, w.seq[w.ev_parent], np.uint64(0))
        self._run = EventRun(
            holders=np.array(ids, dtype=np.int64)[w.ev_pod],
            is_store=(w.ev_kind == 0).astype(np.uint8),
            ends=np.cumsum(w.ev_len, dtype=np.int64),
            hashes=w.seq[blocks],
            follows=np.where(w.ev_parent >= 0, 2, 0).astype(np.uint8),
            parents=parents,
            tokens=w.tokens[blocks].reshape(-1),
        )
        self._queries = [np.ascontiguousarray(w.q(i, w.q_seq)) for i in range(w.n_q)]
        self._queue: list[int] = []
        self._warm_up()
        self.apply = self._queue.append

    def _warm_up(self) -> None:
        """Touch every kernel once; what a process does at its start."""
        index = BlockIndex(capacity_bytes=1 << 20)
        holder, tokens = index.holder("pod"), np.zeros(16, dtype=np.uint32)
        index.store(holder, np.ones(1, np.uint64), None, tokens, block_size=16)
        index.match(np.ones(1, np.uint64))
        index.remove(holder, np.ones(1, np.uint64))

    def flush(self) -> None:
        """Apply what has queued up."""
        first, last = self._queue[0], self._queue[-1]
        if last - first + 1 != len(self._queue):
            raise ValueError("the driver applies events in order")
        r = self._run
        start = int(r.ends[first - 1]) if first else 0
        end = int(r.ends[last])
        span = slice(first, last + 1)
        part = EventRun(
            r.holders[span],
            r.is_store[span],
            r.ends[span] - start,
            r.hashes[start:end],
            r.follows[span],
            r.parents[span],
            r.tokens[start * BLOCK_SIZE : end * BLOCK_SIZE],
        )
        self.index.apply(part, block_size=BLOCK_SIZE)
        self._queue.clear()

    def find(self, i: int) -> Any:
        """Answer a query: scopes and their leading blocks, as arrays."""
        return self.index.match(self._queries[i])

    def scores(self, result: Any) -> dict[int, int]:
        """Turn an answer into pod -> leading blocks."""
        return {self._pod_of_scope[int(s)]: int(n) for s, n in result.T}

    def close(self) -> None:
        """Nothing to close."""

    def index_rss(self) -> int:
        """Return the resident bytes of this process."""
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) * 1024


class KvAtlasEach(KvAtlas):
    """Every event is applied when it comes, by `BlockIndex.store` and `remove`."""

    def prepare(self, workload: Any) -> None:
        """Cut the arrays into events."""
        super().prepare(workload)
        r, starts = self._run, np.concatenate([[0], self._run.ends[:-1]])
        self._events = [
            (
                int(r.holders[i]),
                r.hashes[a:b],
                int(r.parents[i]) if r.follows[i] else None,
                r.tokens[a * BLOCK_SIZE : b * BLOCK_SIZE] if r.is_store[i] else None,
            )
            for i, (a, b) in enumerate(zip(starts.tolist(), r.ends.tolist(), strict=True))
        ]
        self.apply = self._apply_one

    def _apply_one(self, i: int) -> None:
        holder, hashes, parent, tokens = self._events[i]
        if tokens is None:
            self.index.remove(holder, hashes)
        else:
            self.index.store(holder, hashes, parent, tokens, block_size=BLOCK_SIZE)

    def flush(self) -> None:
        """Everything is applied."""
