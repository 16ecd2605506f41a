"""Which pod holds which KV block: exact, whatever the order of the events."""

import base64
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvcore.errors import InvalidInputError, SnapshotError
from kvcore.hashing import DEFAULT_SEED, BlockKeys, Tokens, check_block_size, hash_blocks

EngineHash = int | bytes
MAX_HASH_BYTES = 32


class Holder(NamedTuple):
    """Where a copy of a block is: one tier of one data-parallel rank of a pod, per cache group."""

    pod: str
    rank: int
    tier: str
    group: int


class StoreResult(NamedTuple):
    """What became of the blocks of one store."""

    stored: int  # blocks held now, copies included
    waiting: int  # blocks that wait for their parent
    joined: int  # blocks that had waited and were placed because of this store
    replaced: int  # engine hashes that named another block before; the old copies are gone


class HolderStats(NamedTuple):
    """Counters of one holder."""

    holder: Holder
    blocks: int  # distinct blocks held
    copies: int  # copies held, at least ``blocks``
    waiting: int  # blocks that wait for their parent
    dropped: int  # blocks dropped from the waiting area because it was full
    evicted: int  # blocks evicted to stay within the byte budget


class _Waiting(NamedTuple):
    holder: int
    hashes: list[EngineHash]
    parent: EngineHash
    keys_of: tuple  # tokens, block_size, extras


class BlockIndex:
    """All blocks of all pods (v1: plain dictionaries)."""

    def __init__(
        self,
        *,
        capacity_bytes: int = 1 << 30,
        max_waiting_blocks: int = 65_536,
        seed: int = DEFAULT_SEED,
    ) -> None:
        self.capacity_bytes, self.max_waiting_blocks, self.seed = (
            capacity_bytes,
            max_waiting_blocks,
            seed,
        )
        self._ids: dict[Holder, int] = {}
        self._holders: dict[int, Holder] = {}
        self._windows: dict[tuple[str, int, int], int | None] = {}
        self._keys: dict[tuple[str, int, int], dict[EngineHash, int]] = {}
        self._copies: dict[int, Counter[EngineHash]] = {}
        self._held: dict[int, Counter[int]] = {}
        self._waiting: list[_Waiting] = []
        self._dropped: Counter[int] = Counter()

    def holder(self, pod: str, rank: int = 0, tier: str = "gpu", group: int = 0) -> int:
        """Return the id of a holder, new or known.

        Raises:
            InvalidInputError: ``rank`` or ``group`` is negative or beyond 2**31.
        """
        if not (0 <= rank < 1 << 31 and 0 <= group < 1 << 31):
            raise InvalidInputError(f"rank {rank} or group {group} is out of range")
        name = Holder(pod, rank, tier.lower(), group)
        if name not in self._ids:
            number = next(i for i in range(len(self._ids) + 1) if i not in self._holders)
            self._ids[name], self._holders[number] = number, name
            self._copies[number], self._held[number] = Counter(), Counter()
        return self._ids[name]

    def _scope(self, holder: int) -> dict[EngineHash, int]:
        if holder not in self._holders:
            raise InvalidInputError(f"no holder has the id {holder}")
        pod, rank, _, group = self._holders[holder]
        return self._keys.setdefault((pod, rank, group), {})

    def _siblings(self, holder: int) -> list[int]:
        pod, rank, _, group = self._holders[holder]
        return [
            i for i, h in self._holders.items() if (h.pod, h.rank, h.group) == (pod, rank, group)
        ]

    def store(
        self,
        holder: int,
        hashes: Sequence[int] | Sequence[bytes] | NDArray,
        parent: EngineHash | None,
        tokens: Tokens,
        *,
        block_size: int,
        root: int | None = None,
        extras: Mapping[int, bytes] | None = None,
    ) -> StoreResult:
        """Add one copy of each block of a run that follows ``parent``.

        Fewer hashes than blocks are the hashes of the last ones: an engine does not name the
        blocks that a sliding window has left behind.

        Args:
            holder: From `holder`.
            hashes: The engine's name of each block: 64-bit ints of either sign, or bytes (≤ 32).
            parent: Engine hash of the block before; None is the start of a chain.
            tokens: [n_blocks * block_size] uint32.
            block_size: Tokens per block.
            root: Namespace of a chain that starts here; unused where there is a parent.
            extras: Block number -> bytes, as in `hash_blocks`.

        Raises:
            InvalidInputError: A value is out of range, or the tokens do not fit the hashes.
        """
        scope = self._scope(holder)
        names = _names(hashes)
        check_block_size(block_size)
        local = hash_blocks(tokens, block_size=block_size, extras=extras, seed=self.seed)
        if tokens.size % block_size or local.size < len(names):
            raise InvalidInputError(
                f"{len(names)} hashes of {block_size} tokens do not fit {tokens.size} tokens"
            )
        before = None if parent is None else _name(parent)
        if before is not None and before not in scope:
            kept = (tokens.copy(), block_size, dict(extras or {}))
            self._waiting.append(_Waiting(holder, names, before, kept))
            self._shed()
            return StoreResult(0, len(names), 0, 0)
        start = root if before is None else scope[before]
        keys = hash_blocks(
            tokens, block_size=block_size, root=start, extras=extras, seed=self.seed
        ).tolist()
        replaced = self._place(holder, names, keys[len(keys) - len(names) :])
        joined = self._join()
        return StoreResult(len(names), 0, joined, replaced)

    def _place(self, holder: int, names: list[EngineHash], keys: list[int]) -> int:
        scope, replaced = self._scope(holder), 0
        for name, key in zip(names, keys, strict=True):
            if scope.get(name, key) != key:
                replaced += 1
                for sibling in self._siblings(holder):
                    while self._take(sibling, name):
                        pass
            scope[name] = key
            self._copies[holder][name] += 1
            if self._copies[holder][name] == 1:
                self._held[holder][key] += 1
        return replaced

    def _join(self) -> int:
        joined, again = 0, True
        while again:
            again = False
            for entry in self._waiting:
                scope = self._scope(entry.holder)
                if entry.parent in scope:
                    self._waiting.remove(entry)
                    tokens, block_size, extras = entry.keys_of
                    keys = hash_blocks(
                        tokens,
                        block_size=block_size,
                        root=scope[entry.parent],
                        extras=extras,
                        seed=self.seed,
                    ).tolist()
                    pairs = keys[len(keys) - len(entry.hashes) :]
                    live = [
                        (n, k) for n, k in zip(entry.hashes, pairs, strict=True) if n is not None
                    ]
                    self._place(entry.holder, [n for n, _ in live], [k for _, k in live])
                    joined += len(live)
                    again = True
                    break
        return joined

    def _shed(self) -> None:
        while sum(len(e.hashes) for e in self._waiting) > self.max_waiting_blocks:
            oldest = self._waiting.pop(0)
            self._dropped[oldest.holder] += len(oldest.hashes)

    def store_known(self, holder: int, hashes: Sequence[int] | Sequence[bytes] | NDArray) -> int:
        """Add one copy of blocks named without tokens; return how many names are unknown.

        Offloading connectors announce blocks by the engine's hash alone; the name is looked up
        among the blocks of the same pod, rank and group.
        """
        scope, unknown = self._scope(holder), 0
        for name in _names(hashes):
            if name in scope:
                self._place(holder, [name], [scope[name]])
            else:
                unknown += 1
        return unknown

    def remove(self, holder: int, hashes: Sequence[int] | Sequence[bytes] | NDArray) -> int:
        """Take one copy of each block away; return how many hashes the holder did not have."""
        self._scope(holder)
        return sum(not (self._take(holder, n) or self._unwait(holder, n)) for n in _names(hashes))

    def _take(self, holder: int, name: EngineHash) -> bool:
        scope, copies, held = self._scope(holder), self._copies[holder], self._held[holder]
        if name not in copies:
            return False
        copies[name] -= 1
        if not copies[name]:
            del copies[name]
            key = scope[name]
            held[key] -= 1
            if not held[key]:
                del held[key]
            if not any(name in self._copies[s] for s in self._siblings(holder)):
                del scope[name]
        return True

    def _unwait(self, holder: int, name: EngineHash) -> bool:
        for entry in self._waiting:
            if entry.holder == holder and name in entry.hashes:
                entry.hashes[entry.hashes.index(name)] = None  # type: ignore[call-overload]  # v1
                return True
        return False

    def _drop(self, holder: int) -> int:
        scope, blocks = self._scope(holder), len(self._held[holder])
        names = list(self._copies[holder])
        self._copies[holder], self._held[holder] = Counter(), Counter()
        siblings = self._siblings(holder)
        for name in names:
            if not any(name in self._copies[s] for s in siblings):
                del scope[name]
        self._waiting = [e for e in self._waiting if e.holder != holder]
        return blocks

    def clear_pod(self, pod: str, rank: int | None = None) -> int:
        """Drop all blocks of a pod, or of one rank of it; return how many it held."""
        return sum(
            self._drop(i)
            for i, h in self._holders.items()
            if h.pod == pod and rank in (None, h.rank)
        )

    def drop_pod(self, pod: str) -> int:
        """Drop a pod that is gone for good, and its holder ids; return how many blocks it held."""
        blocks = self.clear_pod(pod)
        for number, name in list(self._holders.items()):
            if name.pod == pod:
                del self._holders[number], self._ids[name]
                del self._copies[number], self._held[number], self._dropped[number]
        self._keys = {k: v for k, v in self._keys.items() if k[0] != pod}
        self._windows = {k: v for k, v in self._windows.items() if k[0] != pod}
        return blocks

    def set_window(self, pod: str, rank: int, group: int, window_blocks: int | None) -> None:
        """Declare a group's attention: its last ``window_blocks`` before a hit's end must be held.

        None, and every group that was not declared, is full attention: all blocks must be held.
        """
        if window_blocks is not None and window_blocks < 1:
            raise InvalidInputError(f"a window has at least 1 block, got {window_blocks}")
        self._windows[pod, rank, group] = window_blocks

    def window(self, pod: str, rank: int, group: int) -> int | None:
        """Return what `set_window` declared."""
        return self._windows.get((pod, rank, group))

    def holders(self) -> dict[int, Holder]:
        """Return every holder by id."""
        return dict(self._holders)

    def presence(self, keys: BlockKeys, holders: Iterable[int]) -> NDArray[np.bool_]:
        """Tell which holder holds which block: [n_holders, n_keys]."""
        names = keys.tolist()
        rows = [[key in self._held[h] for key in names] for h in holders]
        return np.array(rows, dtype=np.bool_).reshape(len(rows), keys.size)

    def match(self, keys: BlockKeys) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return the holders of the first block, and how many leading blocks each one holds."""
        holders = [h for h in self._holders if keys.size and int(keys[0]) in self._held[h]]
        seen = self.presence(keys, holders)
        blocks = np.where(seen.all(axis=1), keys.size, seen.argmin(axis=1) if keys.size else 0)
        return np.array(holders, dtype=np.int32), blocks.astype(np.int32)

    def holder_stats(self) -> list[HolderStats]:
        """Return the counters of every holder."""
        waiting = Counter({h: 0 for h in self._holders})
        for entry in self._waiting:
            waiting[entry.holder] += sum(n is not None for n in entry.hashes)
        return [
            HolderStats(
                name,
                len(self._held[i]),
                self._copies[i].total(),
                waiting[i],
                self._dropped[i],
                0,
            )
            for i, name in sorted(self._holders.items())
        ]

    def check(self) -> None:
        """Verify every invariant; for tests. Raises AssertionError."""
        for i in self._holders:
            scope = self._scope(i)
            held = Counter(scope[n] for n in self._copies[i])
            assert held == self._held[i]  # noqa: S101  # check() is what asserts

    def snapshot(self, path: str | PathLike) -> None:
        """Write the whole state to a file."""
        body = json.dumps(
            {
                "seed": self.seed,
                "holders": [[i, *h] for i, h in self._holders.items()],
                "windows": [[*k, w] for k, w in self._windows.items()],
                "keys": [
                    [*k, [[_dump(n), v] for n, v in d.items()]] for k, d in self._keys.items()
                ],
                "copies": [
                    [i, [[_dump(n), c] for n, c in d.items()]] for i, d in self._copies.items()
                ],
                "waiting": [
                    [
                        e.holder,
                        [_dump(n) for n in e.hashes],
                        _dump(e.parent),
                        e.keys_of[0].tolist(),
                        e.keys_of[1],
                        [[b, _dump(x)] for b, x in e.keys_of[2].items()],
                    ]
                    for e in self._waiting
                ],
                "dropped": list(self._dropped.items()),
            }
        ).encode()
        head = b"kvatlas index 0\n" + zlib.crc32(body).to_bytes(4, "little")
        Path(path).write_bytes(head + body)

    @classmethod
    def restore(
        cls,
        path: str | PathLike,
        *,
        capacity_bytes: int = 1 << 30,
        max_waiting_blocks: int = 65_536,
    ) -> "BlockIndex":
        """Read a snapshot back; the index continues as if it had never stopped.

        Raises:
            SnapshotError: The file is foreign, damaged or of another version.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as exc:
            raise SnapshotError(f"cannot read the snapshot: {exc}") from exc
        if data[:16] != b"kvatlas index 0\n":
            raise SnapshotError("not a snapshot of this version")
        if zlib.crc32(data[20:]).to_bytes(4, "little") != data[16:20]:
            raise SnapshotError("the snapshot is damaged")
        state = json.loads(data[20:])
        index = cls(
            capacity_bytes=capacity_bytes,
            max_waiting_blocks=max_waiting_blocks,
            seed=state["seed"],
        )
        index._holders = {i: Holder(*h) for i, *h in state["holders"]}
        index._ids = {h: i for i, h in index._holders.items()}
        index._windows = {(p, r, g): w for p, r, g, w in state["windows"]}
        index._keys = {(p, r, g): {_load(n): v for n, v in d} for p, r, g, d in state["keys"]}
        index._copies = {i: Counter({_load(n): c for n, c in d}) for i, d in state["copies"]}
        for i in index._holders:
            scope = index._scope(i)
            index._held[i] = Counter(scope[n] for n in index._copies[i])
        index._waiting = [
            _Waiting(
                h,
                [_load(n) for n in names],
                _load(p),
                (np.array(t, dtype=np.uint32), b, {k: _load(x) for k, x in extras}),
            )
            for h, names, p, t, b, extras in state["waiting"]
        ]
        index._dropped = Counter(dict(state["dropped"]))
        return index


def _dump(name):
    return base64.b64encode(name).decode() if isinstance(name, bytes) else name


def _load(name):
    return base64.b64decode(name) if isinstance(name, str) else name


def _name(name: EngineHash) -> EngineHash:
    if isinstance(name, bytes):
        if len(name) > MAX_HASH_BYTES:
            raise InvalidInputError(f"an engine hash has at most 32 bytes, got {len(name)}")
        return name
    if not -(1 << 63) <= name < 1 << 64:
        raise InvalidInputError(f"engine hash {name} does not fit 64 bits")
    return name & 0xFFFF_FFFF_FFFF_FFFF


def _names(hashes: Sequence[int] | Sequence[bytes] | NDArray) -> list[EngineHash]:
    if isinstance(hashes, np.ndarray):
        if hashes.ndim != 1 or hashes.dtype not in (np.uint64, np.int64):
            raise InvalidInputError("engine hashes must be a 1-D array of 64-bit ints")
        return [_name(n) for n in hashes.tolist()]
    return [_name(n) for n in hashes]
