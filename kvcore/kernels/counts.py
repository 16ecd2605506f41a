# kernels take no keywords
"""What is beyond the common case, so that the common case pays nothing for it.

Per holder: copies beyond the first under one name (SELF: the block's own key, NAME: a row of
NAMES), and names beyond the first for one block (ALIAS). Row: [mixed key][count u32, member u32].
"""

import numpy as np
from numba import types

from kvcore.kernels.memory import (
    COUNTS,
    EXTRAS,
    HEADER,
    MEMBER_WORDS,
    MEMBERS,
    ROWS,
    i64,
    inner,
    mix,
    u32,
)
from kvcore.kernels.table import add, delete, find

_I, _U, _V, _B = types.int64, types.uint64, types.void, types.boolean
SELF, NAME, ALIAS = 0, 1, 2


@inner(_U(_I, _I, _I))
def _count_key(kind, row, bit):
    return mix(np.uint64(kind << 62 | row << 24 | bit))


@inner(_V(HEADER, _I, _I, _I))
def count_up(header, kind, row, bit):
    """Add one to a count."""
    key = _count_key(kind, row, bit)
    halves, entry = u32(header, COUNTS + ROWS), find(header, COUNTS, key)
    if entry:
        halves[4 * entry + 2] += np.uint32(1)
        return
    entry = add(header, COUNTS, key)
    halves[4 * entry + 2], halves[4 * entry + 3] = np.uint32(1), np.uint32(bit)
    i64(header, MEMBERS)[bit * MEMBER_WORDS + EXTRAS] += 1


@inner(_I(HEADER, _I, _I, _I, _B))
def count_down(header, kind, row, bit, all_of_it):
    """Take one off a count, or all; return how many were taken."""
    members = i64(header, MEMBERS)
    if members[bit * MEMBER_WORDS + EXTRAS] == 0:
        return 0
    halves, entry = u32(header, COUNTS + ROWS), find(header, COUNTS, _count_key(kind, row, bit))
    if entry == 0:
        return 0
    count = np.int64(halves[4 * entry + 2])
    if count > 1 and not all_of_it:
        halves[4 * entry + 2] -= np.uint32(1)
        return 1
    delete(header, COUNTS, entry)
    members[bit * MEMBER_WORDS + EXTRAS] -= 1
    return count
