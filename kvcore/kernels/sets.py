"""Sets of holders, interned: equal sets are one row of SETS, so a block carries a 4-byte set id.

A set is a bitmap over members: a bit for each holder (a tier of a scope) and a bit for each scope
(pod, rank, group), present while any tier of it is. Its key is the xor of a word per member; rows
of one key are compared in full. Set 0 is the empty set. Row: [key][references u32, free u32][bits].
"""

import numpy as np
from numba import types

from kvcore.kernels.memory import (
    ADD_BIT,
    ADD_FROM,
    ADD_TO,
    DROP_BIT,
    DROP_FROM,
    DROP_TO,
    HEADER,
    MEMBER_WORDS,
    MEMBERS,
    ROWS,
    SCOPE,
    SET_WORDS,
    SETS,
    SIBLING,
    STRIDE,
    i64,
    inner,
    mix,
    u32,
    u64,
)
from kvcore.kernels.table import add, after, delete, first, row_at

_I, _U, _V = types.int64, types.uint64, types.void
_ONE = np.uint64(1)


@inner(types.boolean(HEADER, _I, _I))
def contains(header, holders, bit):
    """Tell whether set ``holders`` has member ``bit``."""
    word = u64(header, SETS + ROWS)[holders * header[SETS + STRIDE] + 2 + (bit >> 6)]
    return (word >> np.uint64(bit & 63)) & _ONE != 0


@inner(_V(HEADER, _I))
def retain(header, holders):
    """Count one more row that has this set."""
    if holders:
        u32(header, SETS + ROWS)[2 * holders * header[SETS + STRIDE] + 2] += np.uint32(1)


@inner(_V(HEADER, _I))
def release(header, holders):
    """Count one row fewer; a set that nobody has is freed, and the memos with it."""
    if not holders:
        return
    halves, at = u32(header, SETS + ROWS), 2 * holders * header[SETS + STRIDE] + 2
    if halves[at] > 1:
        halves[at] -= np.uint32(1)
    else:
        delete(header, SETS, holders)
        header[ADD_FROM] = header[DROP_FROM] = -1


@inner(_U(_I, _I))
def _bit_in(word, bit):
    return _ONE << np.uint64(bit & 63) if bit >> 6 == word else np.uint64(0)


@inner(_I(HEADER, _I, _I, _I))
def _flipped(header, holders, bit, other):
    """Return the set that differs in ``bit`` and, unless it is negative, in ``other``."""
    stride, words = header[SETS + STRIDE], header[SET_WORDS]
    rows = u64(header, SETS + ROWS)
    key = rows[holders * stride] ^ mix(np.uint64(bit + 1))
    if other >= 0:
        key ^= mix(np.uint64(other + 1))
    if other < 0:
        other = bit + 64 * words  # in no word
    base, empty = holders * stride + 2, True
    for word in range(words):
        flip = _bit_in(word, bit) | _bit_in(word, other)
        if rows[base + word] != flip:
            empty = False
            break
    if empty:
        return 0
    cursor = first(header, SETS, key)
    while cursor >= 0:
        candidate = row_at(header, SETS, cursor)
        at, same = candidate * stride + 2, True
        for word in range(words):
            flip = _bit_in(word, bit) | _bit_in(word, other)
            if rows[at + word] != rows[base + word] ^ flip:
                same = False
                break
        if same:
            return candidate
        cursor = after(header, SETS, key, cursor)
    made = add(header, SETS, key)
    at = made * stride + 2
    for word in range(words):
        rows[at + word] = rows[base + word] ^ (_bit_in(word, bit) | _bit_in(word, other))
    return made


@inner(_I(HEADER, _I, _I))
def with_holder(header, holders, bit):
    """Return the set with a holder that it does not have yet."""
    if header[ADD_FROM] == holders and header[ADD_BIT] == bit:
        return header[ADD_TO]
    scope = i64(header, MEMBERS)[bit * MEMBER_WORDS + SCOPE]
    other = -1 if contains(header, holders, scope) else scope
    made = _flipped(header, holders, bit, other)
    header[ADD_FROM], header[ADD_BIT], header[ADD_TO] = holders, bit, made
    return made


@inner(_I(HEADER, _I, _I))
def without_holder(header, holders, bit):
    """Return the set without a holder that it has."""
    if header[DROP_FROM] == holders and header[DROP_BIT] == bit:
        return header[DROP_TO]
    members = i64(header, MEMBERS)
    scope = members[bit * MEMBER_WORDS + SCOPE]
    tier = members[bit * MEMBER_WORDS + SIBLING]
    while tier != bit:
        if contains(header, holders, tier):
            scope = -1  # another tier keeps the scope in
            break
        tier = members[tier * MEMBER_WORDS + SIBLING]
    made = _flipped(header, holders, bit, scope)
    header[DROP_FROM], header[DROP_BIT], header[DROP_TO] = holders, bit, made
    return made


@inner(_V(HEADER, _I, _I, _I))
def give(header, table, row, holders):
    """Let a row of BLOCKS or NAMES have a set; a row whose set is empty is deleted."""
    halves, at = u32(header, table + ROWS), 4 * row + 2
    before = np.int64(halves[at])
    retain(header, holders)
    if holders:
        halves[at] = np.uint32(holders)
    else:
        delete(header, table, row)
    release(header, before)
