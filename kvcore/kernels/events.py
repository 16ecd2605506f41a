"""One event, or many of them, in one call."""

import numpy as np
from numba import njit, types

from kvcore.kernels.blocks import KEYS, remove_run, resolve_block, store_run
from kvcore.kernels.memory import (
    BLOCKS,
    DONE,
    HEADER,
    LAST_ROW,
    MEMBER_WORDS,
    MEMBERS,
    ROWS,
    SCOPE,
    SEED,
    i64,
    u64,
)
from kvcore.kernels.xxh3 import WORDS, chain_blocks

_I, _U, _B = types.int64, types.uint64, types.boolean
OUT = types.uint64[::1]
NO_PARENT, ROOT, PARENT = 0, 1, 2  # what ``before`` is: nothing, a namespace's root, an engine hash
INTS = types.Array(types.int64, 1, "C", readonly=True)
BYTES = types.Array(types.uint8, 1, "C", readonly=True)


@njit(_I(HEADER, _I, WORDS, _I, KEYS, KEYS, KEYS, _I, _U, KEYS, OUT), nogil=True)
def store(
    header, bit, tokens, block_size, extras, names, wide, kind, before, wide_before, keys
):
    """Hash a run of blocks into ``keys`` and store it; return how many, or -1: parent unknown."""
    row = 0
    if kind == PARENT:
        scope = i64(header, MEMBERS)[bit * MEMBER_WORDS + SCOPE]
        row = resolve_block(header, scope, before, wide_before, 0)
        if row == 0:
            return -1
        before = u64(header, BLOCKS + ROWS)[2 * row]
    seed = np.uint64(header[SEED])
    chain_blocks(tokens, block_size, extras, kind != NO_PARENT, before, seed, keys)
    header[LAST_ROW] = row
    return store_run(header, bit, keys, names, wide, 0, row if keys.size == names.size else 0)


@njit(
    _I(HEADER, BYTES, INTS, INTS, KEYS, BYTES, KEYS, WORDS, _I, OUT, KEYS, _I), nogil=True
)
def apply(
    header, stores, bits, ends, names, kinds, befores, tokens, block_size, keys, wide, start
):
    """Apply events ``start:``; return the first that is not done, its size if all are.

    That one's parent is unknown (DONE is -1), or a table is full and DONE of its blocks are done.

    stores, kinds [n] uint8; bits, ends [n] int64, ``ends`` into names [m], of which event i has
    ``names[ends[i - 1]:ends[i]]``; befores [n] uint64; tokens [m * block_size]; keys: room for
    the longest event.
    """
    for event in range(start, ends.size):
        first = ends[event - 1] if event else 0
        run = names[first : ends[event]]
        if not stores[event]:
            done = remove_run(header, bits[event], run, wide, 0)
            if done < run.size:
                header[DONE] = done
                return event
            continue
        these = tokens[first * block_size : ends[event] * block_size]
        done = store(
            header,
            bits[event],
            these,
            block_size,
            wide,
            run,
            wide,
            kinds[event],
            befores[event],
            wide,
            keys[: run.size],
        )
        if done < run.size:
            header[DONE] = done
            return event
    return ends.size
