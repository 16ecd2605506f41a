# ruff: noqa: PLR0917  # kernels take no keywords
"""Changes of the index: copies of blocks come and go, under the names their engines gave them.

A block is a row of BLOCKS: its own key, and the set of holders that have a copy. An engine removes
a block by the name it gave it. Where the name is the key itself (publishers of RFC keys) nothing
more is kept. Otherwise a row of NAMES has the name, the block and the holders that use this name
for it; engines that agree on names share the row. A block is in one of the two modes: once one
holder names it differently, all names of it are rows, and a flag in AGES says so.
"""

import numpy as np
from numba import types

from kvcore.kernels.counts import ALIAS, NAME, SELF, count_down, count_up
from kvcore.kernels.memory import (
    AGES,
    BLOCKS,
    COPIES,
    COUNTS,
    EPOCH,
    EPOCH_LEFT,
    EPOCH_LENGTH,
    EPOCH_MASK,
    HEADER,
    HELD,
    HIGH,
    LAST_ROW,
    MEMBER_WORDS,
    MEMBERS,
    MODE,
    NAMED,
    NAMES,
    OTHER_NAMED,
    REPLACED,
    ROWS,
    SCOPE,
    SELF_NAMED,
    SET_WORDS,
    SETS,
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
from kvcore.kernels.table import add, after, expect, find, first, has_room, migrate, row_at

WORDS = types.CPointer(types.uint64)
_I, _U, _V, _B = types.int64, types.uint64, types.void, types.boolean
_WIDE_FLAG = 1 << 31  # beside the block in a row of NAMES: the name is bytes
_ONE = np.uint64(1)
_AHEAD = 8  # blocks; the slots of what comes are fetched meanwhile


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
        holders = np.int64(u32(header, BLOCKS + ROWS)[4 * row + 2])
        if row and not u16(header, AGES)[row] & NAMED and contains(header, holders, scope):
            return -row
    if mode & OTHER_NAMED:
        key = mix(name)
        cursor = first(header, NAMES, key)
        while cursor >= 0:
            row = row_at(header, NAMES, cursor)
            holders = np.int64(u32(header, NAMES + ROWS)[4 * row + 2])
            if _is_named(header, row, name, wide) and contains(header, holders, scope):
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
        count_up(header, ALIAS, row, bit)
        return
    give(header, BLOCKS, row, with_holder(header, holders, bit))
    i64(header, MEMBERS)[bit * MEMBER_WORDS + HELD] += 1


@inner(_V(HEADER, _I, _I))
def _drop(header, row, bit):
    """Note that a holder has a block under one name fewer."""
    if count_down(header, ALIAS, row, bit, False):
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
            for _ in range(count_down(header, SELF, row, bit, True)):
                count_up(header, NAME, made, bit)


@inner(_I(HEADER, _U, _I))
def find_block(header, key, before):
    """Return the row of a key, 0 if there is none, looking first at the row after ``before``.

    The blocks of one store lie side by side, so a chain is mostly read in order.
    """
    guess, high = before + 1, header[BLOCKS + HIGH]
    if guess < high and u64(header, BLOCKS + ROWS)[2 * guess] == key:
        if_live = u32(header, BLOCKS + ROWS)[4 * guess + 2]
        if if_live != 0:
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
    if count_down(header, NAME if found > 0 else SELF, row, bit, False):
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
    kind, row = (NAME, found) if found > 0 else (SELF, -found)
    extra = count_down(header, kind, row, bit, True)
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


@inner(_I(HEADER, _I, _I, _U, _I))
def _name_of_block(header, scope, row, name, wide):
    """Find the row of NAMES where ``name`` is block ``row``; -1: to this scope it is another's."""
    key, found = mix(name), 0
    cursor = first(header, NAMES, key)
    while cursor >= 0:
        candidate = row_at(header, NAMES, cursor)
        if _is_named(header, candidate, name, wide):
            if _block_of(header, candidate) == row:
                found = candidate
            elif contains(header, np.int64(u32(header, NAMES + ROWS)[4 * candidate + 2]), scope):
                return -1
        cursor = after(header, NAMES, key, cursor)
    return found


@inner(_V(HEADER, _I, _I))
def _add_copy(header, found, bit):
    """Give a holder one more copy under a resolved name."""
    members = i64(header, MEMBERS)
    members[bit * MEMBER_WORDS + COPIES] += 1
    table, row = (NAMES, found) if found > 0 else (BLOCKS, -found)
    holders = np.int64(u32(header, table + ROWS)[4 * row + 2])
    if contains(header, holders, bit):
        count_up(header, NAME if found > 0 else SELF, row, bit)
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
    scope = members[bit * MEMBER_WORDS + SCOPE]
    mode_at = scope * MEMBER_WORDS + MODE
    mode = members[mode_at]
    row = find_block(header, key, before)
    if row == 0:
        row = add(header, BLOCKS, key)
        ages[row] = np.uint16(header[EPOCH])
    else:
        ages[row] = (ages[row] & NAMED) | np.uint16(header[EPOCH])
    if before:
        u32(header, BLOCKS + ROWS)[4 * row + 3] = np.uint32(before)
    names_itself = wide == 0 and name == key
    is_plain, found = names_itself and not ages[row] & NAMED, 0
    if mode & OTHER_NAMED or not is_plain:
        found = _name_of_block(header, scope, row, name, wide)
    if found < 0 or (mode & SELF_NAMED and not names_itself):
        header[REPLACED] += _purge_other(header, bit, name, wide, row)
        found = _name_of_block(header, scope, row, name, wide)
    if is_plain:
        members[mode_at] |= SELF_NAMED
        _add_copy(header, -row, bit)
        return row
    if not ages[row] & NAMED:
        _write_names_out(header, row)
    members[mode_at] |= OTHER_NAMED
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


@inner(_V(HEADER, _I, _U))
def _expect_name(header, bit, name):
    members = i64(header, MEMBERS)
    if members[members[bit * MEMBER_WORDS + SCOPE] * MEMBER_WORDS + MODE] & OTHER_NAMED:
        expect(header, NAMES, mix(name))


@inner(_I(HEADER, _I, WORDS, WORDS, _I, _I, _I, _I))
def store_run(header, bit, keys, names, n, wide, start, before):
    """Store blocks ``start:`` of a run that follows row ``before``; return where it ended.

    It ends before its end when a table is full; LAST_ROW is then the row to go on from.
    """
    _touch(header, before)
    is_roomy = has_room(header, BLOCKS, n) and has_room(header, NAMES, 2 * n)
    is_roomy = is_roomy and has_room(header, COUNTS, 2 * n)
    for i in range(start, n):
        if not (has_room(header, SETS, 4) if is_roomy else has_room_for_block(header)):
            return i
        if i + _AHEAD < n:
            expect(header, BLOCKS, keys[i + _AHEAD])
            _expect_name(header, bit, names[i + _AHEAD])
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
            _expect_name(header, bit, names[i + _AHEAD])
        if not _take(header, resolve(header, scope, names[i], wide_at(wide, i)), bit):
            header[UNKNOWN] += 1
    return n
