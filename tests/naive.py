"""Slow twins of the kernels and of the index: dictionaries and loops, as the definitions read."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import xxhash

from kvcore.holders import Holder, Scope

Name = int | bytes


def hash_bytes(data: bytes, seed: int) -> int:
    padded = len(data).to_bytes(4, "little") + data + bytes(-len(data) % 4)
    return xxhash.xxh3_64_intdigest(padded, seed)


def hash_blocks(
    tokens: Sequence[int],
    block_size: int,
    root: int | None = None,
    extras: Mapping[int, bytes] | None = None,
    seed: int = 1337,
) -> list[int]:
    keys: list[int] = []
    before = root
    for block in range(len(tokens) // block_size):
        words = tokens[block * block_size : (block + 1) * block_size]
        key = xxhash.xxh3_64_intdigest(np.array(words, dtype="<u4").tobytes(), seed)
        if extras and block in extras:
            key = _pair(key, hash_bytes(extras[block], seed), seed)
        if before is not None:
            key = _pair(before, key, seed)
        keys.append(key)
        before = key
    return keys


def _pair(first: int, second: int, seed: int) -> int:
    data = first.to_bytes(8, "little") + second.to_bytes(8, "little")
    return xxhash.xxh3_64_intdigest(data, seed)


class Index:
    """What `BlockIndex` must equal: copies per holder and name, and what names mean per scope."""

    def __init__(self, max_waiting_blocks: int = 65_536) -> None:
        self.max_waiting_blocks = max_waiting_blocks
        self.copies: dict[Holder, Counter[Name]] = {}
        self.keys: dict[Scope, dict[Name, int]] = {}
        self.windows: dict[Scope, int | None] = {}
        self.waiting: list[dict] = []
        self.dropped: Counter[Holder] = Counter()

    def holder(self, holder: Holder) -> None:
        self.copies.setdefault(holder, Counter())
        self.keys.setdefault(holder.scope, {})

    def held(self, holder: Holder) -> set[int]:
        return {self.keys[holder.scope][name] for name in self.copies[holder]}

    def store(self, holder, names, parent, tokens, *, block_size, root=None, extras=None):
        if not names:
            return
        run = {"holder": holder, "names": list(names), "parent": parent, "tokens": tokens}
        run |= {"block_size": block_size, "extras": extras}
        if parent is not None and parent not in self.keys[holder.scope]:
            self.waiting.append(run)
            while self.waiting_blocks() > self.max_waiting_blocks:
                oldest = self.waiting.pop(0)
                self.dropped[oldest["holder"]] += _alive(oldest)
            return
        self._place(run, root if parent is None else self.keys[holder.scope][parent])
        while ready := [r for r in self.waiting if r["parent"] in self.keys[r["holder"].scope]]:
            self.waiting.remove(ready[0])
            self._place(ready[0], self.keys[ready[0]["holder"].scope][ready[0]["parent"]])

    def _place(self, run, root) -> None:
        keys = hash_blocks(run["tokens"], run["block_size"], root, run["extras"])
        keys = keys[len(keys) - len(run["names"]) :]
        for name, key in zip(run["names"], keys, strict=True):
            if name is not None:
                self._hold(run["holder"], name, key)

    def _hold(self, holder, name, key) -> None:
        meant = self.keys[holder.scope]
        if meant.get(name, key) != key:
            for sibling in self._siblings(holder):
                self.copies[sibling].pop(name, None)
        meant[name] = key
        self.copies[holder][name] += 1

    def _siblings(self, holder) -> list[Holder]:
        return [h for h in self.copies if h.scope == holder.scope]

    def store_known(self, holder, names) -> int:
        known = [n for n in names if n in self.keys[holder.scope]]
        self.copies[holder].update(known)
        return len(names) - len(known)

    def remove(self, holder, names) -> int:
        return sum(not (self._take(holder, n) or self._cancel(holder, n)) for n in names)

    def _take(self, holder, name) -> bool:
        copies = self.copies[holder]
        if name not in copies:
            return False
        copies[name] -= 1
        if not copies[name]:
            del copies[name]
            if not any(name in self.copies[s] for s in self._siblings(holder)):
                del self.keys[holder.scope][name]
        return True

    def _cancel(self, holder, name) -> bool:
        for run in self.waiting:
            if run["holder"] == holder and name in run["names"]:
                run["names"][run["names"].index(name)] = None
                return True
        return False

    def clear(self, pod, rank=None) -> int:
        gone = [h for h in self.copies if h.pod == pod and rank in (None, h.rank)]
        blocks = sum(len(self.held(h)) for h in gone)
        for holder in gone:
            self.copies[holder].clear()
            self.keys[holder.scope].clear()
            self.dropped.pop(holder, None)
        self.waiting = [r for r in self.waiting if r["holder"] not in gone]
        return blocks

    def drop(self, pod) -> int:
        blocks = self.clear(pod)
        for holder in [h for h in self.copies if h.pod == pod]:
            del self.copies[holder]
            self.keys.pop(holder.scope, None)
        self.windows = {scope: w for scope, w in self.windows.items() if scope[0] != pod}
        return blocks

    def waiting_blocks(self) -> int:
        return sum(map(_alive, self.waiting))

    def leading(self, scope: Scope, keys: Sequence[int]) -> int:
        """Leading blocks that any tier of a scope holds."""
        held = set().union(*(self.held(h) for h in self.copies if h.scope == scope))
        return next((i for i, key in enumerate(keys) if key not in held), len(keys))

    def hit(self, pod: str, rank: int, keys: Sequence[int]) -> int:
        """Longest hit that every group of a rank can serve: tries every end."""
        groups = {h.scope for h in self.copies if (h.pod, h.rank) == (pod, rank)}
        held = {
            g: set().union(*(self.held(h) for h in self.copies if h.scope == g)) for g in groups
        }
        for end in range(len(keys), 0, -1):
            starts = {g: end - w if (w := self.windows.get(g)) else 0 for g in groups}
            if all(set(keys[max(0, starts[g]) : end]) <= held[g] for g in groups):
                return end
        return 0

    def stats(self) -> dict[Holder, tuple[int, int, int, int]]:
        """Blocks, copies, waiting and dropped per holder."""
        waiting: Counter[Holder] = Counter()
        for run in self.waiting:
            waiting[run["holder"]] += _alive(run)
        return {
            h: (len(self.held(h)), sum(c.values()), waiting[h], self.dropped[h])
            for h, c in self.copies.items()
        }


def _alive(run) -> int:
    return sum(name is not None for name in run["names"])
