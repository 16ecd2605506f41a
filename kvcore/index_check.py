"""The invariants of the index, as slow and plain as they read; kernels are not used here."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from kvcore.kernels import memory as m

if TYPE_CHECKING:
    from kvcore.index import BlockIndex
    from kvcore.index_memory import Memory

_COUNT_KINDS = {0: "copies of a block", 1: "copies of a name", 2: "names of a block"}


def check(index: BlockIndex) -> None:
    """Raise AssertionError with the first invariant that is broken."""
    memory, members = index.memory, index.members
    for table in m.TABLES:
        _check_table(memory, table)
    sets = _sets(memory)
    holders_of = {t: _column(memory, t, 2) for t in (m.BLOCKS, m.NAMES)}
    references = Counter(s for column in holders_of.values() for s in column.values())
    kept = {row: references[row] for row in sets}
    _expect(_column(memory, m.SETS, 2) == kept, "sets are referenced as often as counted")
    _expect(len(set(sets.values())) == len(sets), "equal sets are one row")

    scope_of = {bit: int(memory.members[bit, m.SCOPE]) for bit in range(members.n_bits)}
    for holders in sets.values():
        tiers = {bit for bit in holders if scope_of[bit] != bit}
        _expect(holders == tiers | {scope_of[bit] for bit in tiers}, "a scope is in with its tiers")
    dead = {*members.dead_bits, *members.next_dead_bits}
    in_use = [*members.bits.values(), *members.scopes.values()]
    everyone = sorted([*in_use, *dead, *members.free_bits])
    _expect(everyone == list(range(members.n_bits)), "every bit is in one place")
    counted = {bit for bit in range(members.n_bits) if _has_bit(memory.arrays[m.MASK], bit)}
    _expect(counted == set(members.scopes.values()), "the scopes that count are those in use")
    stray = set().union(*sets.values()) - dead - set(in_use)
    _expect(not stray, "no set has a bit that is free")

    names_of: dict[int, list[int]] = {}
    for row, payload in _column(memory, m.NAMES, 3).items():
        names_of.setdefault(payload & 0x7FFFFFFF, []).append(row)
    blocks, names = ({r: sets[s] for r, s in holders_of[t].items()} for t in holders_of)
    ages = memory.arrays[m.AGES]
    extra = _counts(memory)
    held: Counter[int] = Counter()
    copies: Counter[int] = Counter()
    for row, holders in blocks.items():
        alive = {b for b in holders if scope_of[b] != b and b not in dead}
        held.update(alive)
        if ages[row] & m.NAMED:
            by_name = Counter(b for n in names_of.get(row, ()) for b in names[n] if b in alive)
            _expect(set(by_name) == alive, "a block is held by those who name it")
            for bit, n in by_name.items():
                _expect(extra.pop((2, row, bit), 0) == n - 1, _COUNT_KINDS[2])
                for name in names_of[row]:
                    if bit in names[name]:
                        copies[bit] += 1 + extra.pop((1, name, bit), 0)
        else:
            _expect(not any(_alive(names[n], dead) for n in names_of.get(row, ())), "no name rows")
            for bit in alive:
                copies[bit] += 1 + extra.pop((0, row, bit), 0)
    _expect(not [key for key in extra if key[2] not in dead], "every count belongs to something")
    for bit in members.bits.values():
        row = memory.members[bit]
        _expect(row[m.HELD] == held[bit], "blocks held are counted")
        _expect(row[m.COPIES] == copies[bit], "copies held are counted")
    waiting = sum(run.n_blocks() for run in index.waiting.runs.values())
    _expect(waiting == index.waiting.n_blocks <= index.waiting.max_blocks, "waiting is bounded")


def _expect(claim: object, what: str) -> None:
    if not claim:
        raise AssertionError(what)


def _alive(holders: frozenset[int], dead: set[int]) -> set[int]:
    return set(holders) - dead


def _has_bit(words: np.ndarray, bit: int) -> bool:
    return bool(int(words[bit >> 6]) >> (bit & 63) & 1)


def _column(memory: Memory, table: int, half: int) -> dict[int, int]:
    """Return a 32-bit half of every live row."""
    halves = memory.rows(table).view(np.uint32)
    return {row: int(halves[row, half]) for row in range(1, len(halves)) if halves[row, 2]}


def _sets(memory: Memory) -> dict[int, frozenset[int]]:
    rows = memory.rows(m.SETS)
    bits = range(64 * memory.set_words)
    return {
        row: frozenset(bit for bit in bits if _has_bit(rows[row, 2:], bit))
        for row in _column(memory, m.SETS, 2)
    }


def _counts(memory: Memory) -> dict[tuple[int, int, int], int]:
    """Return the counts by kind, row and bit."""
    rows, wanted = memory.rows(m.COUNTS), {}
    bits = _column(memory, m.COUNTS, 3)
    for row, count in _column(memory, m.COUNTS, 2).items():
        word = _unmix(int(rows[row, 0]))
        kind, of, bit = word >> 62, word >> 24 & (1 << 38) - 1, word & (1 << 24) - 1
        _expect(kind in _COUNT_KINDS and bit == bits[row], "every count has a key that is right")
        wanted[kind, of, bit] = count
    _expect(len(wanted) == len(bits), "counts are unique")
    return wanted


def _unmix(word: int) -> int:
    """Undo ``memory.mix``; the factors are the inverses of its factors modulo 2**64."""
    mask = (1 << 64) - 1
    word = (word ^ word >> 31 ^ word >> 62) * 0x319642B2D24D8EC3 & mask
    word = (word ^ word >> 27 ^ word >> 54) * 0x96DE1B173F119089 & mask
    return word ^ word >> 30 ^ word >> 60


def _check_table(memory: Memory, table: int) -> None:
    """Every live row is found from its home slot on; free rows are in the list, and none else."""
    header, rows = memory.header, memory.rows(table)
    live = set(_column(memory, table, 2))
    _expect(len(live) == header[table + m.LIVE], "live rows are counted")
    free, row = [], int(header[table + m.FREE])
    while row:
        free.append(row)
        row = int(rows.view(np.uint32)[row, 3])
    _expect(sorted([*free, *live]) == list(range(1, len(rows))), "rows are live or free")
    found: set[int] = set()
    for word, word_bits in ((m.INDEX, m.BITS), (m.OLD, m.OLD_BITS)):
        if not header[table + word]:
            continue
        index, bits = memory.arrays[table + word], int(header[table + word_bits])
        n_slots = 1 << bits
        entries = {int(s): int(index[s]) for s in np.flatnonzero(index)}
        _expect(len(entries) <= n_slots * 3 // 4, "an index is at most three quarters full")
        for slot, entry in entries.items():
            row = entry % n_slots
            key = int(rows[row, 0])
            home = key >> (64 - bits)
            _expect(row in live and entry == (key << bits) % (1 << 32) | row, "entries are right")
            steps = range((slot - home) % n_slots)
            _expect(all((home + i) % n_slots in entries for i in steps), "no gap before an entry")
            found.add(row)
    _expect(found == live, "every live row is in an index")
