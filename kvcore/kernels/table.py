"""Hash tables: dense rows, and a sparse index of 32-bit row numbers.

An index slot holds a row number in its low ``BITS`` bits and as much of the key as fits above, so
a probe seldom reads a row in vain. Probing is linear; a deletion moves later entries back, so there
are no tombstones. A bigger index is filled in steps while the old one answers for the rest: the
cost of growth is spread over the operations after it.
"""

import numpy as np
from numba import types

from kvcore.kernels.memory import (
    ADDRESS,
    BITS,
    FREE,
    HEADER,
    HIGH,
    INDEX,
    LIMIT,
    LIVE,
    MOVED,
    OLD,
    OLD_BITS,
    ROWS,
    STRIDE,
    entry,
    header_at,
    inner,
    prefetch32,
    u32,
    u64,
)

_I, _U, _V = types.int64, types.uint64, types.void
_OLD_FLAG = 1 << 40  # in a cursor: the slot is one of the old index
_LOW = np.uint64(0xFFFFFFFF)


@inner(_I(_U, _I))
def _home(key, bits):
    return np.int64(key >> np.uint64(64 - bits))


@inner(_I(_U, _I, _I))
def _entry(key, bits, row):
    return np.int64((key << np.uint64(bits)) & _LOW) | row


@inner(_I(HEADER, _I, _U, _I))
def _scan(header, table, key, cursor):
    """Return the first cursor from ``cursor`` on whose row has the key, or -1."""
    rows, stride = u64(header, table + ROWS), header[table + STRIDE]
    old = cursor & _OLD_FLAG
    slot = cursor & (_OLD_FLAG - 1)
    while True:
        bits = header[table + OLD_BITS] if old else header[table + BITS]
        index = u32(header, table + OLD) if old else u32(header, table + INDEX)
        mask = (1 << bits) - 1
        wanted = _entry(key, bits, 0)
        while True:
            entry = np.int64(index[slot])
            if entry == 0:
                break
            if entry & ~mask == wanted and rows[(entry & mask) * stride] == key:
                return slot | old
            slot = (slot + 1) & mask
        if old or header[table + OLD] == 0:
            return -1
        old = _OLD_FLAG
        slot = _home(key, header[table + OLD_BITS])


@inner(_I(HEADER, _I, _U))
def first(header, table, key):
    """Return a cursor at the first row with the key, or -1."""
    return _scan(header, table, key, _home(key, header[table + BITS]))


@inner(_I(HEADER, _I, _U, _I))
def after(header, table, key, cursor):
    """Return a cursor at the next row with the key, or -1."""
    bits = header[table + OLD_BITS] if cursor & _OLD_FLAG else header[table + BITS]
    slot = ((cursor & (_OLD_FLAG - 1)) + 1) & ((1 << bits) - 1)
    return _scan(header, table, key, slot | (cursor & _OLD_FLAG))


@inner(_I(HEADER, _I, _I))
def row_at(header, table, cursor):
    """Return the row a cursor stands at."""
    slot = cursor & (_OLD_FLAG - 1)
    if cursor & _OLD_FLAG:
        return np.int64(u32(header, table + OLD)[slot]) & ((1 << header[table + OLD_BITS]) - 1)
    return np.int64(u32(header, table + INDEX)[slot]) & ((1 << header[table + BITS]) - 1)


@inner(_I(HEADER, _I, _U))
def find(header, table, key):
    """Return the row with the key, 0 if there is none; for tables whose keys are unique."""
    cursor = first(header, table, key)
    return row_at(header, table, cursor) if cursor >= 0 else 0


@inner(_V(HEADER, _I, _U))
def expect(header, table, key):
    """Have the slot fetched where a key is looked for soon."""
    prefetch32(header, table + INDEX, _home(key, header[table + BITS]))


@inner(_V(HEADER, _I, _U))
def expect_row(header, table, key):
    """Have the row fetched that is likely the key's; its slot has been fetched before."""
    bits = header[table + BITS]
    row = np.int64(u32(header, table + INDEX)[_home(key, bits)]) & ((1 << bits) - 1)
    prefetch32(header, table + ROWS, 2 * row * header[table + STRIDE])


@inner(_V(HEADER, _I, _I))
def _link(header, table, row):
    """Put a row into the new index, unless it is there."""
    bits, index = header[table + BITS], u32(header, table + INDEX)
    key = u64(header, table + ROWS)[row * header[table + STRIDE]]
    slot, entry = _home(key, bits), np.uint32(_entry(key, bits, row))
    while index[slot] != 0 and index[slot] != entry:
        slot = (slot + 1) & ((1 << bits) - 1)
    index[slot] = entry


@inner(_V(HEADER, _I, _I, _I))
def _unlink(header, table, row, old):
    """Take a row out of the new or the old index, if it is there."""
    index = u32(header, table + (OLD if old else INDEX))
    bits = header[table + (OLD_BITS if old else BITS)]
    rows, stride, mask = u64(header, table + ROWS), header[table + STRIDE], (1 << bits) - 1
    key = rows[row * stride]
    slot, wanted = _home(key, bits), np.uint32(_entry(key, bits, row))
    while index[slot] != wanted:
        if index[slot] == 0:
            return
        slot = (slot + 1) & mask
    hole, slot = slot, (slot + 1) & mask
    while index[slot] != 0:
        home = _home(rows[(np.int64(index[slot]) & mask) * stride], bits)
        if (slot - home) & mask >= (slot - hole) & mask:  # it may stand where the hole is
            index[hole] = index[slot]
            hole = slot
        slot = (slot + 1) & mask
    index[hole] = 0


@inner(types.boolean(HEADER, _I, _I))
def has_room(header, table, n):
    """Tell whether ``n`` rows can be added: the index stays at most three quarters full."""
    live = header[table + LIVE] + n
    return live <= (3 << header[table + BITS]) >> 2 and live < header[table + LIMIT]


@inner(_I(HEADER, _I, _U))
def add(header, table, key):
    """Add a row and return it; the caller has asked `has_room` and fills it in at once."""
    row = header[table + FREE]
    if row:
        header[table + FREE] = np.int64(
            u32(header, table + ROWS)[2 * row * header[table + STRIDE] + 3]
        )
    else:
        row = header[table + HIGH]
        header[table + HIGH] = row + 1
    u64(header, table + ROWS)[row * header[table + STRIDE]] = key
    _link(header, table, row)
    header[table + LIVE] += 1
    return row


@inner(_V(HEADER, _I, _I))
def delete(header, table, row):
    """Take a row out of the table."""
    _unlink(header, table, row, 0)
    if header[table + OLD]:
        _unlink(header, table, row, 1)
    halves, at = u32(header, table + ROWS), 2 * row * header[table + STRIDE] + 2
    halves[at] = 0
    halves[at + 1] = np.uint32(header[table + FREE])
    header[table + FREE] = row
    header[table + LIVE] -= 1


@inner(_V(HEADER, _I, _I))
def migrate(header, table, n):
    """Move up to ``n`` rows from the old index to the new one; at the end the old one is gone."""
    if header[table + OLD] == 0:
        return
    row, high = header[table + MOVED], header[table + HIGH]
    halves, stride = u32(header, table + ROWS), header[table + STRIDE]
    stop = min(row + n, high)
    while row < stop:
        if halves[2 * row * stride + 2] != 0:
            _link(header, table, row)
        row += 1
    header[table + MOVED] = row
    if row == high:
        header[table + OLD] = 0


@entry(types.boolean(ADDRESS, _I, _I))
def table_has_room(address, table, n):
    """Be `has_room` for Python."""
    return has_room(header_at(address), table, n)


@entry(_V(ADDRESS, _I))
def finish_migration(address, table):
    """Empty the old index at once."""
    migrate(header_at(address), table, 1 << 40)
