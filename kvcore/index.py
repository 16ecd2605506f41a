"""Which pod holds which KV block: exact for every block, whatever the order of the events.

A block is a row: its key and the id of its set of holders. Sets are interned, since neighbours
mostly share one. Rows of one store lie side by side, so a lookup reads a chain in order: it
compares the next row's key and set id, asks the hash table only where that fails, and looks into
a set only where the id changes. What counts is each block's own truth: no state that a hole could
spoil, and an answer ends with the last pod that holds on.

What that beat (``tests/bench/index.py``, 64 pods, an EPYC virtual machine with 2 CPUs):

- the hash table for every block: 31 µs for 4,096 blocks, this 4.4 µs, of which 1.5 are the call.
  Galloping could save the rest at most, at the price of exact reachability under holes;
- arrays passed and counted at every compiled call: 203 ns for a block stored, header and pointers
  165; then growth that leaves the old index alone, and slots fetched ahead: 60 to 80;
- huge pages: 35 to 70 ms for the store that doubles an index of 1.5 million rows; small ones, and
  growth in steps: the longest of 150,000 stores of 16 blocks took 0.2 ms of CPU;
- clearing a pod by a pass over all rows: 4.6 ms, at 256 pods 50; giving it new bits, and doing
  that pass in steps with later operations: 0.3 ms for 17,000 blocks.

Names that are the keys themselves cost nothing (17 bytes a membership, all in). Other names are a
row each, shared by the pods that agree on them (26 bytes), or not (39).
"""

import heapq
from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from kvcore import event_run, index_check, index_snapshot
from kvcore.engine_hashes import NO_WIDE, EngineHash, EngineHashes, decode, encode, encode_one
from kvcore.errors import InvalidInputError
from kvcore.event_run import NOTHING, ONE_STORED, EventRun, StoreResult
from kvcore.eviction import Budget
from kvcore.hashing import (
    DEFAULT_SEED,
    NO_EXTRAS,
    BlockKeys,
    Tokens,
    check_keys,
    check_word,
    count_blocks,
    encode_extras,
    hash_blocks,
)
from kvcore.holders import Holder, Holders, HolderStats, Scope
from kvcore.index_memory import Memory
from kvcore.index_snapshot import Snapshot
from kvcore.kernels import events, lookup
from kvcore.kernels import memory as m
from kvcore.waiting import WaitingArea, WaitingRun

MIN_CAPACITY_BYTES = 1 << 16
_NO_TOKENS: Tokens = np.empty(0, dtype=np.uint32)


class BlockIndex:
    """Every block that every holder has, within a byte budget.

    One writer at a time, and no reader beside it. Memory is reserved for the budget at once and
    used as blocks come.

    Args:
        capacity_bytes: Beyond it, the least recent blocks of the biggest pod are evicted.
        max_waiting_blocks: Bound of what waits for a parent.
        seed: Of the block keys.

    Raises:
        InvalidInputError: A limit is out of range.
    """

    def __init__(
        self,
        *,
        capacity_bytes: int = 1 << 30,
        max_waiting_blocks: int = 65_536,
        seed: int = DEFAULT_SEED,
    ) -> None:
        if capacity_bytes < MIN_CAPACITY_BYTES or max_waiting_blocks < 0 or not 0 <= seed < 1 << 64:
            raise InvalidInputError("capacity_bytes, max_waiting_blocks or seed is out of range")
        self.seed = seed
        self.memory = Memory(capacity_bytes, seed)
        self.members = Holders(self.memory)
        self.budget = Budget(self.memory, self.members)
        self.waiting = WaitingArea(max_waiting_blocks)
        self.windows: dict[Scope, int | None] = {}
        self._header, self._address = self.memory.header, self.memory.address

    def holder(self, pod: str, rank: int = 0, tier: str = "gpu", group: int = 0) -> int:
        """Return the id of a holder, new or known. Tiers are compared in lower case.

        Raises:
            InvalidInputError: ``rank`` or ``group`` is out of range, or there are too many holders.
        """
        if not (0 <= rank < 1 << 31 and 0 <= group < 1 << 31):
            raise InvalidInputError(f"rank {rank} or group {group} is out of range")
        return self.members.id_of(Holder(pod, rank, tier.lower(), group))

    def store(
        self,
        holder: int,
        hashes: EngineHashes,
        parent: EngineHash | None,
        tokens: Tokens,
        *,
        block_size: int,
        root: int | None = None,
        extras: Mapping[int, bytes] | None = None,
    ) -> StoreResult:
        """Add one copy of each block of a run that follows ``parent``.

        Fewer hashes than blocks are the hashes of the last ones: an engine does not name the
        blocks that a sliding window has left behind. A hash that named another block of the same
        pod, rank and group names this one from now on; the copies of the other are dropped.

        Args:
            holder: From `holder`.
            hashes: The engine's name of each block: 64-bit ints of either sign, or bytes (≤ 32).
            parent: Engine hash of the block before; None is the start of a chain. Blocks whose
                parent is unknown wait for it.
            tokens: [n_blocks * block_size] uint32, C-contiguous.
            block_size: Tokens per block, 1..4096.
            root: Namespace of a chain that starts here; unused where there is a parent.
            extras: Block number in this run -> bytes, as in `hash_blocks`.

        Raises:
            InvalidInputError: A value is out of range, or the tokens do not fit the hashes.
        """
        bit = self.members.bit(holder)
        names, wide = encode(hashes)
        n_blocks = count_blocks(tokens, block_size, names.size)
        if not names.size:
            return NOTHING
        kind, before, wide_before = events.NO_PARENT, 0, NO_WIDE
        if parent is not None:
            kind, (before, wide_before) = events.PARENT, encode_one(parent)
        elif root is not None:
            kind, before = events.ROOT, check_word(root, "root")
        memory = self.memory
        if n_blocks > memory.n_keys:
            memory.use_keys(n_blocks)
        address = memory.zeros
        if extras or wide is not NO_WIDE or wide_before is not NO_WIDE:
            more = memory.more(encode_extras(extras, n_blocks, self.seed), wide_before, wide)
            address = more[0].ctypes.data
        signed = before - (before >> 63 << 64)
        done = events.store(self._address, bit, tokens, block_size, names, kind, signed, address)
        if done < 0:
            scope, known = self.members.names[holder].scope, cast(EngineHash, parent)
            kept = (tokens.copy(), block_size, dict(extras or {}))
            known = known if isinstance(known, bytes) else before
            self.waiting.add(WaitingRun(holder, scope, [*decode(names, wide)], known, *kept))
            return StoreResult(0, names.size, 0, 0)
        if done < names.size:
            keys = memory.use_keys(n_blocks)
            keys[: names.size] = keys[n_blocks - names.size : n_blocks].copy()
            self.store_rest(bit, names, wide, done)
        joined = 0
        if self.waiting.runs:
            joined = self._join(self.members.names[holder].scope, decode(names, wide))
        replaced = self.settle(names.size)
        if names.size == 1 and not joined and not replaced:
            return ONE_STORED  # nine of ten events
        return StoreResult(names.size, 0, joined, replaced)

    def store_keys(self, holder: int, hashes: EngineHashes, keys: BlockKeys) -> None:
        """Add one copy of each block whose key is known, whatever it follows."""
        names, wide = encode(hashes)
        self.memory.use_keys(names.size)[: names.size] = keys
        self._header[m.LAST_ROW] = 0
        self.store_rest(self.members.bit(holder), names, wide, 0)
        if self.waiting.runs:
            self._join(self.members.names[holder].scope, decode(names, wide))
        self.settle(names.size)

    def store_known(self, holder: int, hashes: EngineHashes) -> int:
        """Add one copy of blocks named without tokens; return how many names are unknown.

        Offloading connectors announce blocks by the engine's hash alone; it is looked up among
        the blocks of the same pod, rank and group.
        """
        bit = self.members.bit(holder)
        names, wide = encode(hashes)
        unknown = self.run(bit, names, wide, is_removal=False)
        self.settle(names.size)
        return unknown

    def remove(self, holder: int, hashes: EngineHashes) -> int:
        """Take one copy of each block away; return how many hashes the holder did not have.

        A block that waits for its parent is taken out of the waiting area.
        """
        bit = self.members.bit(holder)
        names, wide = encode(hashes)
        if not self.waiting.runs:
            unknown = self.run(bit, names, wide, is_removal=True)
        else:
            unknown = 0
            for i, name in enumerate(decode(names, wide)):
                one = names[i : i + 1], wide[m.WIDE_WORDS * i : m.WIDE_WORDS * (i + 1)]
                if self.run(bit, *one, is_removal=True):
                    unknown += not self.waiting.cancel(holder, name)
        self.settle(0)
        return unknown

    def apply(self, run: EventRun, *, block_size: int) -> int:
        """Apply many events in order, as `store` and `remove` would; return the unknown removals.

        Raises:
            InvalidInputError: The arrays do not fit each other; nothing is applied.
        """
        return event_run.apply(self, run, block_size)

    def run(
        self, bit: int, names: BlockKeys, wide: BlockKeys, *, is_removal: bool, done: int = 0
    ) -> int:
        """Remove or add copies of known blocks, as there is room; return the unknown names."""
        address = self._address
        while (done := events.change(address, bit, names, wide, done, is_removal)) < names.size:
            self.make_room()
        unknown = self._header.item(m.UNKNOWN)
        if unknown:
            self._header[m.UNKNOWN] = 0
        return unknown

    def store_rest(self, bit: int, names: BlockKeys, wide: NDArray[np.uint64], done: int) -> None:
        """Store what is left of a run, whose keys are in memory, as there is room."""
        more = self.memory.more(NO_EXTRAS, NO_WIDE, wide)
        while done < names.size:
            self.make_room()
            done = events.store(
                self._address, bit, _NO_TOKENS, 1, names, events.RESUME, done, more[0].ctypes.data
            )

    def make_room(self) -> None:
        """Let every table have room for a block; where the budget ends, evict."""
        for table in m.TABLES:
            while not self.memory.make_room(table, 4):
                self.budget.evict()

    def _join(self, scope: Scope, names: list[EngineHash]) -> int:
        """Place the runs that waited for these names, and those that waited for them."""
        joined, area = 0, self.waiting
        ready = [number for name in names for number in area.children(scope, name)]
        heapq.heapify(ready)
        while ready:
            number = heapq.heappop(ready)
            run = area.runs.get(number)
            if run is None:
                continue
            row = self._row_of(run.holder, run.parent)
            if not row:
                continue
            area.take(number)
            key = int(self.memory.rows(m.BLOCKS)[row, 0])
            keys = hash_blocks(
                run.tokens, block_size=run.block_size, root=key, extras=run.extras, seed=self.seed
            )[-len(run.names) :]
            left = [name for name in run.names if name is not None]
            called, wide = encode(cast(EngineHashes, left))
            self._header[m.LAST_ROW] = row
            chosen = keys[[name is not None for name in run.names]]
            self.memory.use_keys(len(left))[: len(left)] = chosen
            self.store_rest(self.members.bit(run.holder), called, wide, 0)
            joined += len(left)
            for name in left:
                for child in area.children(run.scope, name):
                    heapq.heappush(ready, child)
        return joined

    def key_of(self, holder: int, name: EngineHash) -> int | None:
        """Return the key of the block that the holder's pod, rank and group call ``name``."""
        row = self._row_of(holder, name)
        return int(self.memory.rows(m.BLOCKS)[row, 0]) if row else None

    def _row_of(self, holder: int, name: EngineHash) -> int:
        word, wide = encode_one(name)
        scope_bit = self.members.scopes[self.members.names[holder].scope]
        return events.resolve(self._address, scope_bit, np.uint64(word), wide)

    def settle(self, n_blocks: int) -> int:
        """Do a step of what is due after an operation; return the hashes it gave a new meaning."""
        if self.members.dead_bits:
            self.members.sweep()
        if self.memory.growing:
            self.memory.release_old()
        self.budget.blocks_until_check -= n_blocks
        if self.budget.blocks_until_check < 0:
            self.budget.check()
        replaced = self._header.item(m.REPLACED)
        if replaced:
            self._header[m.REPLACED] = 0
        return replaced

    def clear_pod(self, pod: str, rank: int | None = None) -> int:
        """Drop all blocks of a pod, or of one rank of it; return how many it held.

        Its members get new bits, and the old ones no longer count; later operations purge the rows.
        """
        dropped = 0
        for scope in self._scopes_of(pod, rank):
            for holder in self.members.of_scope(scope):
                self.waiting.clear(holder)
            dropped += self.members.renew(scope)
        self.settle(0)
        return dropped

    def drop_pod(self, pod: str, rank: int | None = None) -> int:
        """Drop a pod, or a rank, that is gone for good, with its holder ids and windows.

        Returns how many blocks it held.
        """
        dropped = self.clear_pod(pod, rank)
        for scope in self._scopes_of(pod, rank):
            self.members.forget(scope)
        self.windows = {
            scope: n
            for scope, n in self.windows.items()
            if scope[0] != pod or rank not in (None, scope[1])
        }
        return dropped

    def _scopes_of(self, pod: str, rank: int | None) -> list[Scope]:
        return [s for s in self.members.scopes if s[0] == pod and rank in (None, s[1])]

    def set_window(self, pod: str, rank: int, group: int, window_blocks: int | None) -> None:
        """Declare a group's attention: its last ``window_blocks`` before a hit's end must be held.

        None, and every group that was not declared, is full attention: all blocks must be held.

        Raises:
            InvalidInputError: ``window_blocks`` is below 1.
        """
        if window_blocks is not None and window_blocks < 1:
            raise InvalidInputError(f"a window has at least 1 block, got {window_blocks}")
        self.windows[pod, rank, group] = window_blocks

    def match(self, keys: BlockKeys) -> NDArray[np.int32]:
        """Return the scopes that hold the first block, and how many leading blocks each one holds.

        This is the hot path: arrays, no object per pod. A scope is (pod, rank, group), held by
        any of its tiers; `scopes` gives the names.

        Args:
            keys: The prompt's block keys [n_blocks] uint64, a chain from `hash_blocks`.

        Returns:
            [2, n_scopes] int32: scope numbers, blocks; the shortest first.

        Raises:
            ArrayError: ``keys`` is another kind of array.
        """
        check_keys(keys)
        out = np.empty((2, self.members.n_bits), dtype=np.int32)
        return out[:, : lookup.match(self._address, keys, out)]

    def scopes(self) -> dict[int, Scope]:
        """Return (pod, rank, group) by the number that `match` uses; a clear changes it."""
        return dict(self.members.scope_at)

    def holders(self) -> dict[int, Holder]:
        """Return every holder by its id."""
        return dict(self.members.names)

    def presence(self, keys: BlockKeys, holders: Iterable[int]) -> NDArray[np.bool_]:
        """Tell which holder holds which block: [n_holders, n_keys]."""
        check_keys(keys)
        bits = np.array([self.members.bit(h) for h in holders], dtype=np.int64)
        out = np.empty((bits.size, keys.size), dtype=np.bool_)
        lookup.presence(self._address, keys, bits, out)
        return out

    def holder_stats(self) -> list[HolderStats]:
        """Return the counters of every holder."""
        waiting = dict.fromkeys(self.members.names, 0)
        for run in self.waiting.runs.values():
            waiting[run.holder] += run.n_blocks()
        stats = []
        for number, name in sorted(self.members.names.items()):
            row = self.memory.members[self.members.bits[number]].tolist()
            lost = self.waiting.dropped.get(number, 0), row[m.EVICTED]
            stats.append(HolderStats(name, row[m.HELD], row[m.COPIES], waiting[number], *lost))
        return stats

    def size_bytes(self) -> int:
        """Return the bytes in use, which ``capacity_bytes`` bounds."""
        return self.memory.size_bytes()

    def check(self) -> None:
        """Verify every invariant in O(size); for tests.

        Raises:
            AssertionError: The first one that is broken.
        """
        index_check.check(self)

    def snapshot(self, note: Any = None) -> Snapshot:
        """Copy everything, with a note of the caller's, to be written to a file."""
        return Snapshot(self, note)

    @classmethod
    def restore(
        cls,
        path: str | PathLike,
        *,
        capacity_bytes: int = 1 << 30,
        max_waiting_blocks: int = 65_536,
    ) -> "tuple[BlockIndex, Any]":
        """Read a snapshot and its note; the index continues as if it had never stopped.

        Raises:
            SnapshotError: The file is foreign, damaged or of another version.
        """
        return index_snapshot.read(
            cls, path, capacity_bytes=capacity_bytes, max_waiting_blocks=max_waiting_blocks
        )
