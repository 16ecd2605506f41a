"""Many events in one call: flat arrays in, so that the loop over them is compiled."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvcore.engine_hashes import NO_WIDE
from kvcore.errors import ArrayError, InvalidInputError
from kvcore.hashing import Tokens, check_block_size, check_tokens
from kvcore.kernels import events
from kvcore.kernels import memory as m

if TYPE_CHECKING:
    from kvcore.index import BlockIndex


class StoreResult(NamedTuple):
    """What became of the blocks of one store."""

    stored: int  # blocks held now, copies included
    waiting: int  # blocks that wait for their parent
    joined: int  # blocks that had waited and were placed because of this store
    replaced: int  # engine hashes that named another block before; the old copies are gone


NOTHING, ONE_STORED = StoreResult(0, 0, 0, 0), StoreResult(1, 0, 0, 0)


class EventRun(NamedTuple):
    """Many events as flat arrays; event i is about ``hashes[ends[i - 1]:ends[i]]``."""

    holders: NDArray[np.int64]  # [n] from `BlockIndex.holder`
    is_store: NDArray[np.uint8]  # [n] 1 store, 0 remove
    ends: NDArray[np.int64]  # [n] ascending
    hashes: NDArray[np.uint64]  # [m]
    follows: NDArray[np.uint8]  # [n] 0 nothing, 1 the root ``parents[i]``, 2 the block so named
    parents: NDArray[np.uint64]  # [n]
    tokens: Tokens  # [m * block_size]; those of removals are not read


def apply(index: BlockIndex, run: EventRun, block_size: int) -> int:
    """Apply a run to an index; `BlockIndex.apply` says what it does."""
    bits = _checked_bits(index, run, block_size)
    ends, header, budget = run.ends, index.memory.header, index.budget
    index.memory.use_keys(int(np.diff(ends, prepend=0).max(initial=0)))
    event, unknown = 0, 0
    while event < ends.size:
        if index.waiting.runs:  # a store may free what waits, and a removal may cancel it
            unknown += _apply_one(index, run, event, block_size)
            event += 1
            continue
        # Up to where the budget has to be looked at again.
        first = int(ends[event - 1]) if event else 0
        stop = int(np.searchsorted(ends, first + max(budget.blocks_until_check, 0), "right"))
        stop = max(stop, event + 1)
        event = events.apply(
            index.memory.address, run.is_store, bits, ends[:stop], run.hashes, run.follows,
            run.parents, run.tokens, block_size, event, index.memory.zeros,
        )  # fmt: skip
        last = int(ends[event - 1]) if event else 0
        if event < stop:
            _finish_one(index, run, event, block_size, bits)
            event, last = event + 1, int(ends[event])
        index.settle(last - first)
    unknown += header.item(m.UNKNOWN)
    header[m.UNKNOWN] = 0
    return unknown


def _finish_one(
    index: BlockIndex, run: EventRun, event: int, block_size: int, bits: NDArray[np.int64]
) -> None:
    """Do the rest of an event that the kernel left."""
    names, done = run.hashes[_span(run, event)], index.memory.header.item(m.DONE)
    if done < 0:
        _apply_one(index, run, event, block_size)
    elif run.is_store[event]:
        index.store_rest(int(bits[event]), names, NO_WIDE, done)
    else:
        unknown = index.run(int(bits[event]), names, NO_WIDE, is_removal=True, done=done)
        index.memory.header[m.UNKNOWN] = unknown


def _apply_one(index: BlockIndex, run: EventRun, event: int, block_size: int) -> int:
    span, holder = _span(run, event), int(run.holders[event])
    if not run.is_store[event]:
        return index.remove(holder, run.hashes[span])
    before = int(run.parents[event])
    parent = before if run.follows[event] == events.PARENT else None
    root = before if run.follows[event] == events.ROOT else None
    tokens = run.tokens[span.start * block_size : span.stop * block_size]
    index.store(holder, run.hashes[span], parent, tokens, block_size=block_size, root=root)
    return 0


def _span(run: EventRun, event: int) -> slice:
    return slice(int(run.ends[event - 1]) if event else 0, int(run.ends[event]))


def _checked_bits(index: BlockIndex, run: EventRun, block_size: int) -> NDArray[np.int64]:
    """Return the bits of the holders; the kernel trusts every number."""
    check_block_size(block_size)
    check_tokens(run.tokens)
    for array, dtype in zip(run, _DTYPES, strict=True):
        usable = array.ndim == 1 and array.flags.c_contiguous and array.flags.aligned
        if array.dtype != dtype or not usable:
            raise ArrayError(f"expected a 1-D C-contiguous array of {np.dtype(dtype)}")
    n = run.holders.size
    if not n == run.is_store.size == run.ends.size == run.follows.size == run.parents.size:
        raise InvalidInputError("the arrays of a run of events differ in length")
    lengths = np.diff(run.ends, prepend=0)
    if n and (lengths.min() < 0 or run.ends[-1] != run.hashes.size):
        raise InvalidInputError("the ends of a run of events do not fit its hashes")
    if run.tokens.size != run.hashes.size * block_size:
        raise InvalidInputError("the tokens of a run of events do not fit its hashes")
    if n and run.follows.max() > events.PARENT:
        raise InvalidInputError("an event follows nothing (0), a root (1) or a block (2)")
    known = {int(h): index.members.bit(int(h)) for h in np.unique(run.holders)}
    table = np.zeros(max(known, default=0) + 1, dtype=np.int64)
    table[list(known)] = list(known.values())
    return table[run.holders]


_DTYPES = (np.int64, np.uint8, np.int64, np.uint64, np.uint8, np.uint64, np.uint32)
