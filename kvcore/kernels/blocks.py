"""Changes of the index: copies of blocks come and go, under the names their engines gave them.

A block is a row of BLOCKS: its own key, and the set of holders that have a copy. An engine removes
a block by the name it gave it. Where the name is the key itself (publishers of RFC keys) nothing
more is kept. Otherwise a row of NAMES has the name, the block and the holders that use this name
for it; engines that agree on names share the row. A block is in one of the two modes: once one
holder names it differently, all names of it are rows, and a flag in AGES says so.

COUNTS has what is beyond the common case, so that it costs nothing there: copies beyond the first
under one name (SELF, NAME), and names beyond the first for one block (ALIAS), per holder.
"""

import numpy as np
from numba import types

from kvcore.kernels.memory import (
    AGES,
    BLOCKS,
    COPIES,
    COUNTS,
    EPOCH,
    EPOCH_LEFT,
    EPOCH_LENGTH,
    EPOCH_MASK,
    EXTRAS,
    HEADER,
    HELD,
    HIGH,
    LAST_ROW,
    MEMBERS,
    MEMBER_WORDS,
    MODE,
    NAMED,
    NAMES,
    OTHER_NAMED,
    REPLACED,
    ROWS,
    SCOPE,
    SELF_NAMED,
    SETS,
    SET_WORDS,
    SIBLING,
    STRIDE,
    UNKNOWN,
    WIDE,
    WIDE_WORDS,
    i64,
    inner,
    mix,
    pointer64,
    trailing_zeros,
    u16,
    u32,
    u64,
)
from kvcore.kernels.sets import contains, give, with_holder, without_holder
from kvcore.kernels.table import add, after, delete, expect, find, first, has_room, migrate, row_at

WORDS = types.CPointer(types.uint64)
_I, _U, _V, _B = types.int64, types.uint64, types.void, types.boolean
_SELF, _NAME, _ALIAS = 0, 1, 2
_WIDE_FLAG = 1 << 31  # beside the block in a row of NAMES: the name is bytes
_ONE = np.uint64(1)
_AHEAD = 8  # blocks; the slots of what comes are fetched meanwhile


@inner(_U(_I, _I, _I))
def _count_key(kind, row, bit):
    return mix(np.uint64(kind << 62 | row << 24 | bit))


@inner(_V(HEADER, _I, _I, _I))
def _count_up(header, kind, row, bit):
    key = _count_key(kind, row, bit)
    halves, entry = u32(header, COUNTS + ROWS), find(header, COUNTS, key)
    if entry:
        halves[4 * entry + 2] += np.uint32(1)
        return
    entry = add(header, COUNTS, key)
    halves[4 * entry + 2], halves[4 * entry + 3] = np.uint32(1), np.uint32(bit)
    i64(header, MEMBERS)[bit * MEMBER_WORDS + EXTRAS] += 1


@inner(_I(HEADER, _I, _I, _I, _B))
def _count_down(header, kind, row, bit, all_of_it):
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


@inner(_B(HEADER, _I, _U, _I))
def _is_named(header, row, name, wide):
    """Compare a row of NAMES with a name: an int, or bytes whose five words are at ``wide``."""
    flagged = np.int64(u32(header, NAMES + ROWS)[4 * row + 3]) & _WIDE_FLAG != 0
    if flagged != (wide != 0):
        return False
    if flagged:
        kept, given = u64(header, WIDE), pointer64(wide)
        for word in range(WIDE_WORDS):
            if kept[row * WIDE_WORDS + word] != given[word]:
                return False
    return True


@inner(_I(HEADER, _I))
def _block_of(header, name_row):
    return np.int64(u32(header, NAMES + ROWS)[4 * name_row + 3]) & (_WIDE_FLAG - 1)


@inner(_I(HEADER, _I, _U, _I))
def resolve(header, scope, name, wide):
    """Find what a scope calls ``name``: a row of NAMES, minus a row of BLOCKS, or 0."""
    mode = i64(header, MEMBERS)[scope * MEMBER_WORDS + MODE]
    if mode & SELF_NAMED and wide == 0:
        row = find(header, BLOCKS, name)
        if row and not u16(header, AGES)[row] & NAMED:
            if contains(header, np.int64(u32(header, BLOCKS + ROWS)[4 * row + 2]), scope):
                return -row
    if mode & OTHER_NAMED:
        key = mix(name)
        cursor = first(header, NAMES, key)
        while cursor >= 0:
            row = row_at(header, NAMES, cursor)
            if _is_named(header, row, name, wide):
                if contains(header, np.int64(u32(header, NAMES + ROWS)[4 * row + 2]), scope):
                    return row
            cursor = after(header, NAMES, key, cursor)
    return 0


@inner(_I(HEADER, _I, _U, _I))
def resolve_block(header, scope, name, wide):
    """Return the row of the block that a scope calls ``name``, or 0."""
    found = resolve(header, scope, name, wide)
    return _block_of(header, found) if found > 0 else -found


@inner(_V(HEADER, _I, _I))
def _hold(header, row, bit):
    """Note that a holder has a block under one more name."""
    holders = np.int64(u32(header, BLOCKS + ROWS)[4 * row + 2])
    if contains(header, holders, bit):
        _count_up(header, _ALIAS, row, bit)
        return
    give(header, BLOCKS, row, with_holder(header, holders, bit))
    i64(header, MEMBERS)[bit * MEMBER_WORDS + HELD] += 1


@inner(_V(HEADER, _I, _I))
def _drop(header, row, bit):
    """Note that a holder has a block under one name fewer."""
    if _count_down(header, _ALIAS, row, bit, False):
        return
    holders = np.int64(u32(header, BLOCKS + ROWS)[4 * row + 2])
    give(header, BLOCKS, row, without_holder(header, holders, bit))
    i64(header, MEMBERS)[bit * MEMBER_WORDS + HELD] -= 1


@inner(_I(HEADER, _I, _U, _I))
def _add_name(header, row, name, wide):
    made = add(header, NAMES, mix(name))
    flag = 0
    if wide:
        flag = _WIDE_FLAG
        kept, given = u64(header, WIDE), pointer64(wide)
        for word in range(WIDE_WORDS):
            kept[made * WIDE_WORDS + word] = given[word]
    u32(header, NAMES + ROWS)[4 * made + 3] = np.uint32(row | flag)
    return made


@inner(_V(HEADER, _I))
def _write_names_out(header, row):
    """Turn a block that its holders name by its key into one with a row in NAMES."""
    ages, words = u16(header, AGES), header[SET_WORDS]
    ages[row] |= NAMED
    holders = np.int64(u32(header, BLOCKS + ROWS)[4 * row + 2])
    if holders == 0:
        return
    made = _add_name(header, row, u64(header, BLOCKS + ROWS)[2 * row], 0)
    give(header, NAMES, made, holders)
    members = i64(header, MEMBERS)
    at = holders * header[SETS + STRIDE] + 2
    for word in range(words):
        left = u64(header, SETS + ROWS)[at + word]
        while left:
            bit = 64 * word + trailing_zeros(left)
            left &= left - _ONE
            members[members[bit * MEMBER_WORDS + SCOPE] * MEMBER_WORDS + MODE] |= OTHER_NAMED
            for _ in range(_count_down(header, _SELF, row, bit, True)):
                _count_up(header, _NAME, made, bit)


@inner(_I(HEADER, _U, _I))
def find_block(header, key, before):
    """Return the row of a key, 0 if there is none, looking first at the row after ``before``.

    The blocks of one store lie side by side, so a chain is mostly read in order.
    """
    guess = before + 1
    if guess < header[BLOCKS + HIGH] and u64(header, BLOCKS + ROWS)[2 * guess] == key:
        if u32(header, BLOCKS + ROWS)[4 * guess + 2] != 0:
            return guess
    return find(header, BLOCKS, key)


@inner(_V(HEADER, _I))
def _touch(header, row):
    """Make a block and its ancestors as recent as now; ends at the first that is already."""
    ages, now = u16(header, AGES), np.uint16(header[EPOCH])
    halves = u32(header, BLOCKS + ROWS)
    while row and (ages[row] & np.uint16(EPOCH_MASK)) != now and halves[4 * row + 2] != 0:
        ages[row] = (ages[row] & NAMED) | now
        row = np.int64(halves[4 * row + 3])


@inner(_B(HEADER, _I, _I))
def _take(header, found, bit):
    """Take one copy that a holder has under a resolved name; False if it has none."""
    members = i64(header, MEMBERS)
    table, row = (NAMES, found) if found > 0 else (BLOCKS, -found)
    holders = np.int64(u32(header, table + ROWS)[4 * row + 2])
    if found == 0 or not contains(header, holders, bit):
        return False
    members[bit * MEMBER_WORDS + COPIES] -= 1
    if _count_down(header, _NAME if found > 0 else _SELF, row, bit, False):
        return True
    if found > 0:
        block = _block_of(header, row)
        give(header, NAMES, row, without_holder(header, holders, bit))
        _drop(header, block, bit)
    else:
        give(header, BLOCKS, row, without_holder(header, holders, bit))
        members[bit * MEMBER_WORDS + HELD] -= 1
    return True


@inner(_I(HEADER, _I, _I))
def take_all(header, found, bit):
    """Take every copy that a holder has under a resolved name; return whether it had any."""
    kind, row = (_NAME, found) if found > 0 else (_SELF, -found)
    extra = _count_down(header, kind, row, bit, True)
    i64(header, MEMBERS)[bit * MEMBER_WORDS + COPIES] -= extra
    return np.int64(_take(header, found, bit))


@inner(_I(HEADER, _I, _U, _I, _I))
def _purge_other(header, bit, name, wide, row):
    """A name now means block ``row``: drop what its scope called so before. Return 1 if it did."""
    members = i64(header, MEMBERS)
    scope = members[bit * MEMBER_WORDS + SCOPE]
    found = resolve(header, scope, name, wide)
    if found == 0 or (_block_of(header, found) if found > 0 else -found) == row:
        return 0
    tier = members[bit * MEMBER_WORDS + SIBLING]
    while True:
        table = NAMES if found > 0 else BLOCKS
        # The last tier to go deletes the row.
        if u32(header, table + ROWS)[4 * abs(found) + 2] == 0:
            break
        take_all(header, found, tier)
        if tier == bit:
            break
        tier = members[tier * MEMBER_WORDS + SIBLING]
    return 1


@inner(_I(HEADER, _I, _U, _I))
def _name_of_block(header, row, name, wide):
    key = mix(name)
    cursor = first(header, NAMES, key)
    while cursor >= 0:
        found = row_at(header, NAMES, cursor)
        if _block_of(header, found) == row and _is_named(header, found, name, wide):
            return found
        cursor = after(header, NAMES, key, cursor)
    return 0


@inner(_V(HEADER, _I, _I))
def _add_copy(header, found, bit):
    """Give a holder one more copy under a resolved name."""
    members = i64(header, MEMBERS)
    members[bit * MEMBER_WORDS + COPIES] += 1
    table, row = (NAMES, found) if found > 0 else (BLOCKS, -found)
    holders = np.int64(u32(header, table + ROWS)[4 * row + 2])
    if contains(header, holders, bit):
        _count_up(header, _NAME if found > 0 else _SELF, row, bit)
        return
    give(header, table, row, with_holder(header, holders, bit))
    if found > 0:
        _hold(header, _block_of(header, row), bit)
    else:
        members[bit * MEMBER_WORDS + HELD] += 1


@inner(_I(HEADER, _I, _U, _U, _I, _I))
def _store_block(header, bit, key, name, wide, before):
    """Add one copy of a block; return its row. The caller has seen to the room."""
    members, ages = i64(header, MEMBERS), u16(header, AGES)
    mode_at = members[bit * MEMBER_WORDS + SCOPE] * MEMBER_WORDS + MODE
    row = find_block(header, key, before)
    if row == 0:
        row = add(header, BLOCKS, key)
        ages[row] = np.uint16(header[EPOCH])
    else:
        ages[row] = (ages[row] & NAMED) | np.uint16(header[EPOCH])
    if before:
        u32(header, BLOCKS + ROWS)[4 * row + 3] = np.uint32(before)
    names_itself = wide == 0 and name == key
    if members[mode_at] & OTHER_NAMED or (members[mode_at] and not names_itself):
        header[REPLACED] += _purge_other(header, bit, name, wide, row)
    if names_itself and not ages[row] & NAMED:
        members[mode_at] |= SELF_NAMED
        _add_copy(header, -row, bit)
        return row
    if not ages[row] & NAMED:
        _write_names_out(header, row)
    members[mode_at] |= OTHER_NAMED
    found = _name_of_block(header, row, name, wide)
    _add_copy(header, found if found else _add_name(header, row, name, wide), bit)
    return row


@inner(_B(HEADER))
def has_room_for_block(header):
    """Tell whether one more block surely fits into every table."""
    return (
        has_room(header, BLOCKS, 1)
        and has_room(header, NAMES, 2)
        and has_room(header, COUNTS, 2)
        and has_room(header, SETS, 4)
    )


@inner(_I(_I, _I))
def wide_at(wide, i):
    """Return the address of the i-th name's five words; 0 if names are ints."""
    return wide + 8 * WIDE_WORDS * i if wide else 0


@inner(_I(HEADER, _I, WORDS, WORDS, _I, _I, _I, _I))
def store_run(header, bit, keys, names, n, wide, start, before):
    """Store blocks ``start:`` of a run that follows row ``before``; return where it ended.

    It ends before its end when a table is full; LAST_ROW is then the row to go on from.
    """
    _touch(header, before)
    for i in range(start, n):
        if not has_room_for_block(header):
            return i
        if i + _AHEAD < n:
            expect(header, BLOCKS, keys[i + _AHEAD])
        before = _store_block(header, bit, keys[i], names[i], wide_at(wide, i), before)
        header[LAST_ROW] = before
    header[EPOCH_LEFT] -= n - start
    if header[EPOCH_LEFT] <= 0:
        header[EPOCH] = (header[EPOCH] + 1) & EPOCH_MASK
        header[EPOCH_LEFT] = header[EPOCH_LENGTH]
    for table in (BLOCKS, NAMES, COUNTS, SETS):
        migrate(header, table, 8 * (n - start) + 64)
    return n


@inner(_I(HEADER, _I, WORDS, _I, _I, _I))
def store_known_run(header, bit, names, n, wide, start):
    """Add one copy of each block ``start:`` that the holder's scope names so; return the end.

    It ends before its end when a table is full. UNKNOWN counts the names the scope does not have.
    """
    scope = i64(header, MEMBERS)[bit * MEMBER_WORDS + SCOPE]
    for i in range(start, n):
        if not has_room_for_block(header):
            return i
        found = resolve(header, scope, names[i], wide_at(wide, i))
        if found:
            _add_copy(header, found, bit)
        else:
            header[UNKNOWN] += 1
    return n


@inner(_I(HEADER, _I, WORDS, _I, _I, _I))
def remove_run(header, bit, names, n, wide, start):
    """Take one copy of each block ``start:`` away; return the end.

    It ends before its end when a table is full. UNKNOWN counts the names the holder does not have.
    """
    scope = i64(header, MEMBERS)[bit * MEMBER_WORDS + SCOPE]
    for i in range(start, n):
        if not has_room(header, SETS, 4):
            return i
        if i + _AHEAD < n:
            expect(header, BLOCKS, names[i + _AHEAD])
        if not _take(header, resolve(header, scope, names[i], wide_at(wide, i)), bit):
            header[UNKNOWN] += 1
    return n
