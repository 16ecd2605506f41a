# ruff: noqa: PLR0917  # kernels take no keywords
"""What Python calls to change the index: one event, or many of them."""

import numpy as np
from numba import types

from kvcore.kernels.blocks import remove_run, resolve_block, store_known_run, store_run
from kvcore.kernels.memory import (
    ADDRESS,
    BLOCKS,
    DONE,
    HEADER,
    KEYS,
    LAST_ROW,
    MEMBER_WORDS,
    MEMBERS,
    ROWS,
    SCOPE,
    SEED,
    entry,
    header_at,
    i64,
    inner,
    pointer32,
    pointer64,
    u64,
)
from kvcore.kernels.xxh3 import KEYS as NAMES
from kvcore.kernels.xxh3 import TOKENS, chain

_I, _U, _V = types.int64, types.uint64, types.void
NO_PARENT, ROOT, PARENT = 0, 1, 2  # what ``before`` is: nothing, a namespace's root, an engine hash
INTS = types.Array(types.int64, 1, "C", readonly=True)
BYTES = types.Array(types.uint8, 1, "C", readonly=True)


@inner(_I(NAMES))
def _words(names):
    """Return where the words of names that are bytes lie, 0 if there are none."""
    return np.int64(names.ctypes.data) if names.size else 0


@inner(_I(HEADER, _I, _I, _I, _I, _I, _I, _I, _I, _I, _I, _U, _I))
def _store(
    header, bit, tokens, block_size, n_blocks, extras, n_extras, names, n, wide, kind, before,
    wide_before,
):  # fmt: skip
    """Hash a run of blocks into KEYS and store it; return how many, or -1: parent unknown."""
    row = 0
    if kind == PARENT:
        scope = i64(header, MEMBERS)[bit * MEMBER_WORDS + SCOPE]
        row = resolve_block(header, scope, before, wide_before)
        if row == 0:
            return -1
        before = u64(header, BLOCKS + ROWS)[2 * row]
    seed, keys, pairs = np.uint64(header[SEED]), u64(header, KEYS), pointer64(extras)
    chain(
        pointer32(tokens), block_size, pairs, n_extras, kind != NO_PARENT, before, seed, keys,
        n_blocks,
    )  # fmt: skip
    header[LAST_ROW] = row
    if n < n_blocks:
        keys, row = pointer64(header[KEYS] + 8 * (n_blocks - n)), 0
    return store_run(header, bit, keys, pointer64(names), n, wide, 0, row)


@entry(_I(ADDRESS, _I, TOKENS, _I, NAMES, _I, _I))
def store(address, bit, tokens, block_size, names, kind, before):
    """Hash a run of blocks into KEYS and store it; return how many, or -1: parent unknown.

    names [n <= blocks] of the last n blocks; ``before`` is the int64 with the bits of what
    ``kind`` says. Fewer than n: a table is full, and `store_rest` goes on.
    """
    return _store(
        header_at(address), bit, np.int64(tokens.ctypes.data), block_size,
        tokens.size // block_size, 0, 0, np.int64(names.ctypes.data), names.size, 0, kind,
        np.uint64(before), 0,
    )  # fmt: skip


@entry(_I(ADDRESS, _I, TOKENS, _I, NAMES, NAMES, NAMES, _I, _I, NAMES))
def store_any(address, bit, tokens, block_size, extras, names, wide, kind, before, wide_before):
    """Do the same with extras [2 * k] and with names that are bytes: wide [5 * n], else [0]."""
    return _store(
        header_at(address), bit, np.int64(tokens.ctypes.data), block_size,
        tokens.size // block_size, np.int64(extras.ctypes.data), extras.size // 2,
        np.int64(names.ctypes.data), names.size, _words(wide), kind, np.uint64(before),
        _words(wide_before),
    )  # fmt: skip


@entry(_I(ADDRESS, _I, NAMES, NAMES, NAMES, _I))
def store_rest(address, bit, keys, names, wide, start):
    """Store blocks ``start:`` of a run after LAST_ROW; return where it ended. All arrays [n]."""
    header = header_at(address)
    last, to, called = header[LAST_ROW], pointer64(keys.ctypes.data), pointer64(names.ctypes.data)
    return store_run(header, bit, to, called, names.size, _words(wide), start, last)


@entry(_I(ADDRESS, _I, NAMES, NAMES, _I))
def store_known(address, bit, names, wide, start):
    """Be `store_known_run` for Python."""
    called = pointer64(names.ctypes.data)
    return store_known_run(header_at(address), bit, called, names.size, _words(wide), start)


@entry(_I(ADDRESS, _I, NAMES, NAMES, _I))
def remove(address, bit, names, wide, start):
    """Be `remove_run` for Python."""
    called = pointer64(names.ctypes.data)
    return remove_run(header_at(address), bit, called, names.size, _words(wide), start)


@entry(_I(ADDRESS, _I, _U, NAMES))
def resolve(address, scope, name, wide):
    """Be `resolve_block` for Python."""
    return resolve_block(header_at(address), scope, name, _words(wide))


@entry(_I(ADDRESS, BYTES, INTS, INTS, NAMES, BYTES, NAMES, TOKENS, _I, _I))
def apply(address, stores, bits, ends, names, kinds, befores, tokens, block_size, start):
    """Apply events ``start:``; return the first that is not done, its size if all are.

    That one's parent is unknown (DONE is -1), or a table is full and DONE of its blocks are done.

    stores, kinds [n] uint8; bits, ends [n] int64, ``ends`` into names [m], of which event i has
    ``names[ends[i - 1]:ends[i]]``; befores [n] uint64; tokens [m * block_size].
    """
    header, first = header_at(address), ends[start - 1] if start else 0
    for event in range(start, ends.size):
        n, these = ends[event] - first, np.int64(names.ctypes.data) + 8 * first
        if stores[event]:
            words = np.int64(tokens.ctypes.data) + 4 * block_size * first
            done = _store(
                header, bits[event], words, block_size, n, 0, 0, these, n, 0, kinds[event],
                befores[event], 0,
            )  # fmt: skip
        else:
            done = remove_run(header, bits[event], pointer64(these), n, 0, 0)
        if done < n:
            header[DONE] = done
            return event
        first = ends[event]
    return ends.size
