"""Who holds blocks: names, ids, and the bits that stand for them in holder sets."""

from typing import NamedTuple

import numpy as np

from kvcore.errors import InvalidInputError
from kvcore.index_memory import Memory
from kvcore.kernels import memory as m
from kvcore.kernels import sweeps

MAX_MEMBERS = 1 << 16  # holders and scopes: the bits of a set
SWEEP_ROWS = 2048  # per operation: some 10 µs

Scope = tuple[str, int, int]  # pod, rank, group: what shares one engine's names


class Holder(NamedTuple):
    """Where a copy of a block is: one tier of one data-parallel rank of a pod, per cache group."""

    pod: str
    rank: int
    tier: str
    group: int

    @property
    def scope(self) -> Scope:
        """Return (pod, rank, group)."""
        return self.pod, self.rank, self.group


class HolderStats(NamedTuple):
    """Counters of one holder; the last two make it partial, and start again when it is cleared."""

    holder: Holder
    blocks: int  # distinct blocks held
    copies: int  # copies held, at least ``blocks``
    waiting: int  # blocks that wait for their parent
    dropped: int  # blocks that no longer wait because the waiting area was full
    evicted: int  # blocks evicted to stay within the byte budget


class Holders:
    """Holder ids stay; bits change when a scope is cleared.

    The old bits then leave MASK, so that they no longer count, and go to DEAD, from where a pass
    over all rows takes them out, a step with each operation. Only then they are used again.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.ids: dict[Holder, int] = {}
        self.names: dict[int, Holder] = {}
        self.bits: dict[int, int] = {}  # by holder id
        self.scopes: dict[Scope, int] = {}  # bits of scopes
        self.scope_at: dict[int, Scope] = {}  # by bit
        self.ranks: dict[tuple[str, int], list[Scope]] = {}  # scopes of a pod's rank, by group
        self._tiers: dict[Scope, list[int]] = {}  # holder ids
        self.free_ids: list[int] = []
        self.n_bits = 0
        self.free_bits: list[int] = []
        self.dead_bits: list[int] = []  # in DEAD
        self.next_dead_bits: list[int] = []  # retired while a pass was under way

    def id_of(self, name: Holder) -> int:
        """Return the id of a holder, new or known."""
        if name not in self.ids:
            if self.n_bits + 2 > MAX_MEMBERS:
                raise InvalidInputError(f"more than {MAX_MEMBERS} holders and scopes")
            if name.scope not in self.scopes:
                self._set_scope_bit(name.scope)
                self._know(name.scope)
            tiers = self._tiers[name.scope]
            number = self.free_ids.pop() if self.free_ids else len(self.names)
            self.bits[number] = self._new_bit(
                self.scopes[name.scope], [self.bits[i] for i in tiers]
            )
            self.ids[name], self.names[number] = number, name
            tiers.append(number)
        return self.ids[name]

    def adopt(self, number: int, name: Holder, bit: int) -> None:
        """Take over a holder from a snapshot, whose members array is in place."""
        self.ids[name], self.names[number], self.bits[number] = number, name, bit
        self._know(name.scope)
        self._tiers[name.scope].append(number)

    def bit(self, holder: int) -> int:
        """Return the bit of a holder.

        Raises:
            InvalidInputError: No holder has this id.
        """
        try:
            return self.bits[holder]
        except (KeyError, TypeError):
            raise InvalidInputError(f"no holder has the id {holder!r}") from None

    def of_scope(self, scope: Scope) -> list[int]:
        """Return the ids of a scope's holders, one for each tier."""
        return self._tiers[scope]

    def renew(self, scope: Scope) -> int:
        """Give a scope and its holders new bits, so that they hold nothing; return what was held.

        A scope that never stored keeps its bits.
        """
        holders = self.of_scope(scope)
        old = [self.bits[i] for i in holders]
        rows = self._memory.members[old]
        held = int(rows[:, m.HELD].sum())
        if rows[:, m.COPIES].any():
            self._retire([self.scopes[scope], *old])
            self._set_scope_bit(scope)
            for n, i in enumerate(holders):
                self.bits[i] = self._new_bit(
                    self.scopes[scope], [self.bits[j] for j in holders[:n]]
                )
        self._memory.members[[self.bits[i] for i in holders], m.EVICTED] = 0
        return held

    def forget(self, scope: Scope) -> None:
        """Free a scope's ids; it has been renewed."""
        for i in self._tiers.pop(scope):
            self._retire([self.bits.pop(i)])
            del self.ids[self.names.pop(i)]
            self.free_ids.append(i)
        self._retire([self.scopes.pop(scope)])
        self.ranks[scope[:2]].remove(scope)
        if not self.ranks[scope[:2]]:
            del self.ranks[scope[:2]]

    def sweep(self) -> None:
        """Do a step of taking dead bits out of the rows."""
        if not self._memory.make_room(m.SETS, 64) or not sweeps.sweep(
            self._memory.address, SWEEP_ROWS
        ):
            return
        self.free_bits += self.dead_bits
        self.dead_bits, self.next_dead_bits = self.next_dead_bits, []
        self.start_pass()

    def start_pass(self) -> None:
        """Write DEAD and begin at the first row."""
        dead = self._memory.arrays[m.DEAD]
        dead[:] = 0
        for bit in self.dead_bits:
            dead[bit >> 6] |= np.uint64(1 << (bit & 63))
        header = self._memory.header
        header[m.SWEEP_TABLE], header[m.SWEEP_ROW] = m.BLOCKS, 1

    def _retire(self, bits: list[int]) -> None:
        mask = self._memory.arrays[m.MASK]
        for bit in bits:
            mask[bit >> 6] &= ~np.uint64(1 << (bit & 63))
            self.scope_at.pop(bit, None)
        if self.dead_bits:
            self.next_dead_bits += bits
        else:
            self.dead_bits = bits
            self.start_pass()

    def _know(self, scope: Scope) -> None:
        if scope not in self._tiers:
            self._tiers[scope] = []
            scopes = self.ranks.setdefault(scope[:2], [])
            scopes.append(scope)
            scopes.sort()

    def _set_scope_bit(self, scope: Scope) -> None:
        bit = self.scopes[scope] = self._take_bit()
        self.scope_at[bit] = scope
        self._memory.members[bit, m.SCOPE] = bit
        self._memory.arrays[m.MASK][bit >> 6] |= np.uint64(1 << (bit & 63))

    def _new_bit(self, scope_bit: int, tiers: list[int]) -> int:
        """Join the ring of a scope's tiers."""
        bit, members = self._take_bit(), self._memory.members
        members[bit, m.SCOPE] = scope_bit
        members[bit, m.SIBLING] = members[tiers[0], m.SIBLING] if tiers else bit
        if tiers:
            members[tiers[0], m.SIBLING] = bit
        return bit

    def _take_bit(self) -> int:
        if self.free_bits:
            bit = self.free_bits.pop()
        else:
            bit, self.n_bits = self.n_bits, self.n_bits + 1
            self._memory.use_members(self.n_bits)
        self._memory.members[bit] = 0
        return bit
