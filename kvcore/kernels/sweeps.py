"""Passes over all rows, in steps: what was cleared is purged, what is oldest is evicted."""

import numpy as np
from numba import types

from kvcore.kernels.blocks import take_all
from kvcore.kernels.memory import (
    ADDRESS,
    AGES,
    BLOCKS,
    COUNTS,
    DEAD,
    EPOCH,
    EPOCH_MASK,
    EVICTED,
    HEADER,
    HIGH,
    MEMBER_WORDS,
    MEMBERS,
    NAMED,
    NAMES,
    ROWS,
    SCOPE,
    SET_WORDS,
    SETS,
    STRIDE,
    SWEEP_ROW,
    SWEEP_TABLE,
    VICTIM,
    entry,
    header_at,
    i64,
    inner,
    trailing_zeros,
    u16,
    u32,
    u64,
)
from kvcore.kernels.sets import give, without_holder
from kvcore.kernels.table import delete, has_room

_I, _U, _B = types.int64, types.uint64, types.boolean
_ONE = np.uint64(1)


@inner(_U(HEADER, _I, _I, _I))
def _common(header, holders, mask, word):
    """Return one word of what a set has in common with the mask in a word of the header."""
    at = holders * header[SETS + STRIDE] + 2 + word
    return u64(header, SETS + ROWS)[at] & u64(header, mask)[word]


@entry(_B(ADDRESS, _I))
def sweep(address, n):
    """Take the members in DEAD out of up to ``n`` rows; True at the end of all tables.

    Blocks go before names, since a block may write its holders into a name while the pass goes on.
    It ends early when SETS is full.
    """
    header = header_at(address)
    members = i64(header, MEMBERS)
    for _ in range(n):
        table, row = header[SWEEP_TABLE], header[SWEEP_ROW]
        if row >= header[table + HIGH]:
            if table == COUNTS:
                return True
            header[SWEEP_TABLE] = NAMES if table == BLOCKS else COUNTS
            header[SWEEP_ROW] = 1
            continue
        if not has_room(header, SETS, 64):
            return False
        header[SWEEP_ROW] = row + 1
        halves = u32(header, table + ROWS)
        if halves[4 * row + 2] == 0:
            continue
        if table == COUNTS:
            bit = np.int64(halves[4 * row + 3])
            if (u64(header, DEAD)[bit >> 6] >> np.uint64(bit & 63)) & _ONE:
                delete(header, COUNTS, row)
            continue
        for word in range(header[SET_WORDS]):
            left = _common(header, np.int64(halves[4 * row + 2]), DEAD, word)
            while left:
                bit = 64 * word + trailing_zeros(left)
                left &= left - _ONE
                if members[bit * MEMBER_WORDS + SCOPE] != bit:  # scopes leave with their last tier
                    holders = np.int64(halves[4 * row + 2])
                    give(header, table, row, without_holder(header, holders, bit))
    return False


@entry(_I(ADDRESS, _I, _I, _I, _I))
def evict(address, table, row, n, least_age):
    """Take the holders in VICTIM out of old enough rows from ``row`` on, up to ``n`` of them.

    Returns the row to go on from; it ends early when SETS is full.
    """
    header = header_at(address)
    members, ages = i64(header, MEMBERS), u16(header, AGES)
    stop = min(row + n, header[table + HIGH])
    halves = u32(header, table + ROWS)
    while row < stop and has_room(header, SETS, 64):
        holders, block = np.int64(halves[4 * row + 2]), row
        if table == NAMES:
            block = np.int64(halves[4 * row + 3]) & ((1 << 31) - 1)
        mine = holders != 0 and (table == NAMES or not ages[row] & NAMED)
        age = (header[EPOCH] - np.int64(ages[block])) & EPOCH_MASK
        if mine and age >= least_age:
            for word in range(header[SET_WORDS]):
                left = _common(header, holders, VICTIM, word)
                while left:
                    bit = 64 * word + trailing_zeros(left)
                    left &= left - _ONE
                    if members[bit * MEMBER_WORDS + SCOPE] != bit:
                        members[bit * MEMBER_WORDS + EVICTED] += 1
                        take_all(header, row if table == NAMES else -row, bit)
                if halves[4 * row + 2] == 0:
                    break
                holders = np.int64(halves[4 * row + 2])
        row += 1
    return row
