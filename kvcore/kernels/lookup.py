"""Questions: which scopes hold a prompt's leading blocks."""

import numpy as np
from numba import types

from kvcore.kernels.blocks import find_block
from kvcore.kernels.memory import (
    ADDRESS,
    BLOCKS,
    HIGH,
    MASK,
    ROWS,
    SET_WORDS,
    SETS,
    STRIDE,
    entry,
    header_at,
    inner,
    trailing_zeros,
    u32,
    u64,
)
from kvcore.kernels.sets import contains
from kvcore.kernels.table import expect, expect_row
from kvcore.kernels.xxh3 import KEYS

_I = types.int64
_ONE = np.uint64(1)
_AHEAD = 8  # blocks
OUT = types.Array(types.int32, 2, "C")


@inner(_I(types.uint64, _I, _I, OUT, _I))
def _write(scopes, word, blocks, out, found):
    while scopes:
        out[0, found] = 64 * word + trailing_zeros(scopes)
        out[1, found] = blocks
        found += 1
        scopes &= scopes - _ONE
    return found


@entry(_I(ADDRESS, KEYS, OUT))
def match(address, keys, out):
    """Write each scope that holds the first block, and how many leading blocks it holds.

    out [2, >= members] int32: scopes, blocks. Returns how many scopes; the shortest come first.
    Ends with the last holder. O(blocks walked); a chain stored in one piece is read in order.
    """
    header, n, found = header_at(address), keys.size, 0
    if n == 0:
        return 0
    row = find_block(header, keys[0], 0)
    if row == 0:
        return 0
    blocks, halves = u64(header, BLOCKS + ROWS), u32(header, BLOCKS + ROWS)
    sets, stride, words = u64(header, SETS + ROWS), header[SETS + STRIDE], header[SET_WORDS]
    mask, high = u64(header, MASK), header[BLOCKS + HIGH]
    holders = halves[4 * row + 2]
    # The set that still counts is the and of the sets passed; it lives in ``active``.
    active = np.empty(words, np.uint64)
    left = np.uint64(0)
    at = np.int64(holders) * stride + 2
    for word in range(words):
        active[word] = sets[at + word] & mask[word]
        left |= active[word]
    i = 1
    while left:
        while (
            i < n
            and row + 1 < high
            and blocks[2 * row + 2] == keys[i]
            and halves[4 * row + 6] == holders
        ):
            row += 1
            i += 1
        if i == n:
            break
        if i + 2 * _AHEAD < n:  # rows are apart: let the next ones come meanwhile
            expect(header, BLOCKS, keys[i + 2 * _AHEAD])
            expect_row(header, BLOCKS, keys[i + _AHEAD])
        row = find_block(header, keys[i], row)
        if row == 0:
            break
        if halves[4 * row + 2] != holders:
            holders = halves[4 * row + 2]
            at = np.int64(holders) * stride + 2
            left = np.uint64(0)
            for word in range(words):
                gone = active[word] & ~sets[at + word]
                active[word] ^= gone
                left |= active[word]
                found = _write(gone, word, i, out, found)
        i += 1
    for word in range(words):
        found = _write(active[word], word, i, out, found)
    return found


@entry(types.void(ADDRESS, KEYS, types.int64[::1], types.Array(types.boolean, 2, "C")))
def presence(address, keys, bits, out):
    """Fill out[i, j]: whether member ``bits[i]`` holds block ``keys[j]``. O(keys * bits)."""
    header, row = header_at(address), 0
    for j in range(keys.size):
        row = find_block(header, keys[j], row)
        holders = np.int64(u32(header, BLOCKS + ROWS)[4 * row + 2])
        for i in range(bits.size):
            out[i, j] = row > 0 and contains(header, holders, bits[i])
