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
from numba import njit, types

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
    mix,
    trailing_zeros,
    u16,
    u32,
    u64,
)
from kvcore.kernels.sets import contains, give, with_holder, without_holder
from kvcore.kernels.table import add, after, delete, find, first, has_room, migrate, row_at

KEYS = types.Array(types.uint64, 1, "C", readonly=True)
_I, _U, _V, _B = types.int64, types.uint64, types.void, types.boolean
_SELF, _NAME, _ALIAS = 0, 1, 2
_WIDE_FLAG = 1 << 31  # beside the block in a row of NAMES: the name is bytes
_ONE = np.uint64(1)


@njit(_U(_I, _I, _I), nogil=True)
def _count_key(kind, row, bit):
    return mix(np.uint64(kind << 62 | row << 24 | bit))


@njit(_V(HEADER, _I, _I, _I), nogil=True)
def _count_up(header, kind, row, bit):
    key = _count_key(kind, row, bit)
    halves, entry = u32(header, COUNTS + ROWS), find(header, COUNTS, key)
    if entry:
        halves[4 * entry + 2] += np.uint32(1)
        return
    entry = add(header, COUNTS, key)
    halves[4 * entry + 2], halves[4 * entry + 3] = np.uint32(1), np.uint32(bit)
    i64(header, MEMBERS)[bit * MEMBER_WORDS + EXTRAS] += 1


@njit(_I(HEADER, _I, _I, _I, _B), nogil=True)
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


@njit(_B(HEADER, _I, _U, KEYS, _I), nogil=True)
def _is_named(header, row, name, wide, at):
    """Compare a row of NAMES with a name: an int, or bytes whose words are ``wide[5 * at:]``."""
    flagged = np.int64(u32(header, NAMES + ROWS)[4 * row + 3]) & _WIDE_FLAG != 0
    if flagged != (wide.size > 0):
        return False
    if flagged:
        kept = u64(header, WIDE)
        for word in range(WIDE_WORDS):
            if kept[row * WIDE_WORDS + word] != wide[at * WIDE_WORDS + word]:
                return False
    return True


@njit(_I(HEADER, _I), nogil=True)
def _block_of(header, name_row):
    return np.int64(u32(header, NAMES + ROWS)[4 * name_row + 3]) & (_WIDE_FLAG - 1)


@njit(_I(HEADER, _I, _U, KEYS, _I), nogil=True)
def resolve(header, scope, name, wide, at):
    """Find what a scope calls ``name``: a row of NAMES, minus a row of BLOCKS, or 0."""
    mode = i64(header, MEMBERS)[scope * MEMBER_WORDS + MODE]
    if mode & SELF_NAMED and wide.size == 0:
        row = find(header, BLOCKS, name)
        if row and not u16(header, AGES)[row] & NAMED:
            if contains(header, np.int64(u32(header, BLOCKS + ROWS)[4 * row + 2]), scope):
                return -row
    if mode & OTHER_NAMED:
        key = mix(name)
        cursor = first(header, NAMES, key)
        while cursor >= 0:
            row = row_at(header, NAMES, cursor)
            if _is_named(header, row, name, wide, at):
                if contains(header, np.int64(u32(header, NAMES + ROWS)[4 * row + 2]), scope):
                    return row
            cursor = after(header, NAMES, key, cursor)
    return 0


@njit(_I(HEADER, _I, _U, KEYS, _I), nogil=True)
def resolve_block(header, scope, name, wide, at):
    """Return the row of the block that a scope calls ``name``, or 0."""
    found = resolve(header, scope, name, wide, at)
    return _block_of(header, found) if found > 0 else -found


@njit(_V(HEADER, _I, _I), nogil=True)
def _hold(header, row, bit):
    """Note that a holder has a block under one more name."""
    holders = np.int64(u32(header, BLOCKS + ROWS)[4 * row + 2])
    if contains(header, holders, bit):
        _count_up(header, _ALIAS, row, bit)
        return
    give(header, BLOCKS, row, with_holder(header, holders, bit))
    i64(header, MEMBERS)[bit * MEMBER_WORDS + HELD] += 1


@njit(_V(HEADER, _I, _I), nogil=True)
def _drop(header, row, bit):
    """Note that a holder has a block under one name fewer."""
    if _count_down(header, _ALIAS, row, bit, False):
        return
    holders = np.int64(u32(header, BLOCKS + ROWS)[4 * row + 2])
    give(header, BLOCKS, row, without_holder(header, holders, bit))
    i64(header, MEMBERS)[bit * MEMBER_WORDS + HELD] -= 1


@njit(_I(HEADER, _I, _U, KEYS, _I), nogil=True)
def _add_name(header, row, name, wide, at):
    made = add(header, NAMES, mix(name))
    flag = 0
    if wide.size:
        flag = _WIDE_FLAG
        kept = u64(header, WIDE)
        for word in range(WIDE_WORDS):
            kept[made * WIDE_WORDS + word] = wide[at * WIDE_WORDS + word]
    u32(header, NAMES + ROWS)[4 * made + 3] = np.uint32(row | flag)
    return made


@njit(_V(HEADER, _I, KEYS), nogil=True)
def _write_names_out(header, row, no_wide):
    """Turn a block that its holders name by its key into one with a row in NAMES."""
    ages, words = u16(header, AGES), header[SET_WORDS]
    ages[row] |= NAMED
    holders = np.int64(u32(header, BLOCKS + ROWS)[4 * row + 2])
    if holders == 0:
        return
    made = _add_name(header, row, u64(header, BLOCKS + ROWS)[2 * row], no_wide, 0)
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


@njit(_I(HEADER, _U, _I), nogil=True)
def find_block(header, key, before):
    """Return the row of a key, 0 if there is none, looking first at the row after ``before``.

    The blocks of one store lie side by side, so a chain is mostly read in order.
    """
    guess = before + 1
    if guess < header[BLOCKS + HIGH] and u64(header, BLOCKS + ROWS)[2 * guess] == key:
        if u32(header, BLOCKS + ROWS)[4 * guess + 2] != 0:
            return guess
    return find(header, BLOCKS, key)


@njit(_V(HEADER, _I), nogil=True)
def _touch(header, row):
    """Make a block and its ancestors as recent as now; ends at the first that is already."""
    ages, now = u16(header, AGES), np.uint16(header[EPOCH])
    halves = u32(header, BLOCKS + ROWS)
    while row and (ages[row] & np.uint16(EPOCH_MASK)) != now and halves[4 * row + 2] != 0:
        ages[row] = (ages[row] & NAMED) | now
        row = np.int64(halves[4 * row + 3])


@njit(_B(HEADER, _I, _I), nogil=True)
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


@njit(_I(HEADER, _I, _I), nogil=True)
def take_all(header, found, bit):
    """Take every copy that a holder has under a resolved name; return whether it had any."""
    kind, row = (_NAME, found) if found > 0 else (_SELF, -found)
    extra = _count_down(header, kind, row, bit, True)
    i64(header, MEMBERS)[bit * MEMBER_WORDS + COPIES] -= extra
    return np.int64(_take(header, found, bit))


@njit(_I(HEADER, _I, _U, KEYS, _I, _I), nogil=True)
def _purge_other(header, bit, name, wide, at, row):
    """A name now means block ``row``: drop what its scope called so before. Return 1 if it did."""
    members = i64(header, MEMBERS)
    scope = members[bit * MEMBER_WORDS + SCOPE]
    found = resolve(header, scope, name, wide, at)
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


@njit(_I(HEADER, _I, _U, KEYS, _I), nogil=True)
def _name_of_block(header, row, name, wide, at):
    key = mix(name)
    cursor = first(header, NAMES, key)
    while cursor >= 0:
        found = row_at(header, NAMES, cursor)
        if _block_of(header, found) == row and _is_named(header, found, name, wide, at):
            return found
        cursor = after(header, NAMES, key, cursor)
    return 0


@njit(_V(HEADER, _I, _I), nogil=True)
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


@njit(_I(HEADER, _I, _U, _U, KEYS, _I, _I), nogil=True)
def _store_block(header, bit, key, name, wide, at, before):
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
    names_itself = wide.size == 0 and name == key
    if members[mode_at] & OTHER_NAMED or (members[mode_at] and not names_itself):
        header[REPLACED] += _purge_other(header, bit, name, wide, at, row)
    if names_itself and not ages[row] & NAMED:
        members[mode_at] |= SELF_NAMED
        _add_copy(header, -row, bit)
        return row
    if not ages[row] & NAMED:
        _write_names_out(header, row, wide[:0])
    members[mode_at] |= OTHER_NAMED
    found = _name_of_block(header, row, name, wide, at)
    _add_copy(header, found if found else _add_name(header, row, name, wide, at), bit)
    return row


@njit(_B(HEADER), nogil=True)
def has_room_for_block(header):
    """Tell whether one more block surely fits into every table."""
    return (
        has_room(header, BLOCKS, 1)
        and has_room(header, NAMES, 2)
        and has_room(header, COUNTS, 2)
        and has_room(header, SETS, 4)
    )


@njit(_I(HEADER, _I, KEYS, KEYS, KEYS, _I, _I), nogil=True)
def store_run(header, bit, keys, names, wide, start, before):
    """Store blocks ``start:`` of a run that follows row ``before``; return where it ended.

    keys [n] and names [m <= n] uint64, the names of the last m; wide [5 * m] if names are bytes.
    It ends before its end when a table is full; LAST_ROW is then the row to go on from.
    """
    skipped = keys.size - names.size
    _touch(header, before)
    for i in range(start, names.size):
        if not has_room_for_block(header):
            return i
        before = _store_block(header, bit, keys[skipped + i], names[i], wide, i, before)
        header[LAST_ROW] = before
        header[EPOCH_LEFT] -= 1
        if header[EPOCH_LEFT] <= 0:
            header[EPOCH] = (header[EPOCH] + 1) & EPOCH_MASK
            header[EPOCH_LEFT] = header[EPOCH_LENGTH]
    for table in (BLOCKS, NAMES, COUNTS, SETS):
        migrate(header, table, 8 * (names.size - start) + 64)
    return names.size


@njit(_I(HEADER, _I, KEYS, KEYS, _I), nogil=True)
def store_known_run(header, bit, names, wide, start):
    """Add one copy of each block ``start:`` that the holder's scope names so; return the end.

    It ends before its end when a table is full. UNKNOWN counts the names the scope does not have.
    """
    scope = i64(header, MEMBERS)[bit * MEMBER_WORDS + SCOPE]
    for i in range(start, names.size):
        if not has_room_for_block(header):
            return i
        found = resolve(header, scope, names[i], wide, i)
        if found:
            _add_copy(header, found, bit)
        else:
            header[UNKNOWN] += 1
    return names.size


@njit(_I(HEADER, _I, KEYS, KEYS, _I), nogil=True)
def remove_run(header, bit, names, wide, start):
    """Take one copy of each block ``start:`` away; return the end.

    It ends before its end when a table is full. UNKNOWN counts the names the holder does not have.
    """
    scope = i64(header, MEMBERS)[bit * MEMBER_WORDS + SCOPE]
    for i in range(start, names.size):
        if not has_room(header, SETS, 4):
            return i
        if not _take(header, resolve(header, scope, names[i], wide, i), bit):
            header[UNKNOWN] += 1
    return names.size
