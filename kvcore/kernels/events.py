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
# What ``before`` is: nothing, a namespace's root, an engine hash, or the block to go on with.
NO_PARENT, ROOT, PARENT, RESUME = range(4)
INT_POINTER = HEADER
INTS = types.Array(types.int64, 1, "C", readonly=True)
BYTES = types.Array(types.uint8, 1, "C", readonly=True)


@inner(_I(HEADER, _I, _I, _I, _I, _I, _I, _I, _U, INT_POINTER))
def _store(header, bit, tokens, block_size, n_blocks, names, n, kind, before, more):
    """Do what `store` says, from addresses."""
    row, start, seed, keys = 0, 0, np.uint64(header[SEED]), u64(header, KEYS)
    if kind == RESUME:
        row, start = header[LAST_ROW], np.int64(before)
    else:
        if kind == PARENT:
            scope = i64(header, MEMBERS)[bit * MEMBER_WORDS + SCOPE]
            row = resolve_block(header, scope, before, more[2])
            if row == 0:
                return -1
            before = u64(header, BLOCKS + ROWS)[2 * row]
        chained = kind != NO_PARENT
        words, extras = pointer32(tokens), pointer64(more[0])
        chain(words, block_size, extras, more[1], chained, before, seed, keys, n_blocks)
        header[LAST_ROW] = row
    if n < n_blocks:
        keys, row = pointer64(header[KEYS] + 8 * (n_blocks - n)), 0
    return store_run(header, bit, keys, pointer64(names), n, more[3], start, row)


@entry(_I(ADDRESS, _I, TOKENS, _I, NAMES, _I, _I, ADDRESS))
def store(address, bit, tokens, block_size, names, kind, before, more):
    """Hash a run of blocks into KEYS and store it; return how many, or -1: parent unknown.

    names [n <= blocks] of the last n blocks. Fewer than n: a table is full. RESUME goes on with
    block ``before``, from the first n of KEYS. ``before`` is else the int64 with the bits of what
    ``kind`` says. ``more``: address of what is mostly zeros, the address of extras [2 * k], k, and
    the addresses of the words of a parent and of names that are bytes.
    """
    header, n = header_at(address), names.size
    n_blocks = n if kind == RESUME else tokens.size // block_size
    words, called = np.int64(tokens.ctypes.data), np.int64(names.ctypes.data)
    return _store(
        header, bit, words, block_size, n_blocks, called, n, kind, np.uint64(before),
        header_at(more),
    )  # fmt: skip


@entry(_I(ADDRESS, _I, NAMES, NAMES, _I, types.boolean))
def change(address, bit, names, wide, start, is_removal):
    """Be `remove_run` or `store_known_run` for Python; wide [5 * n] for bytes, else [0]."""
    header, called = header_at(address), pointer64(names.ctypes.data)
    words = np.int64(wide.ctypes.data) if wide.size else 0
    if is_removal:
        return remove_run(header, bit, called, names.size, words, start)
    return store_known_run(header, bit, called, names.size, words, start)


@entry(_I(ADDRESS, _I, _U, NAMES))
def resolve(address, scope, name, wide):
    """Be `resolve_block` for Python."""
    return resolve_block(header_at(address), scope, name, wide.ctypes.data if wide.size else 0)


@entry(_I(ADDRESS, BYTES, INTS, INTS, NAMES, BYTES, NAMES, TOKENS, _I, _I, ADDRESS))
def apply(address, stores, bits, ends, names, kinds, befores, tokens, block_size, start, zeros):
    """Apply events ``start:``; return the first that is not done, its size if all are.

    That one's parent is unknown (DONE is -1), or a table is full and DONE of its blocks are done.

    stores, kinds [n] uint8; bits, ends [n] int64, ``ends`` into names [m], of which event i has
    ``names[ends[i - 1]:ends[i]]``; befores [n] uint64; tokens [m * block_size]; zeros: an address.
    """
    header, first = header_at(address), ends[start - 1] if start else 0
    for event in range(start, ends.size):
        n, these = ends[event] - first, np.int64(names.ctypes.data) + 8 * first
        if stores[event]:
            words = np.int64(tokens.ctypes.data) + 4 * block_size * first
            done = _store(
                header, bits[event], words, block_size, n, these, n, kinds[event],
                befores[event], header_at(zeros),
            )  # fmt: skip
        else:
            done = remove_run(header, bits[event], pointer64(these), n, 0, 0)
        if done < n:
            header[DONE] = done
            return event
        first = ends[event]
    return ends.size
