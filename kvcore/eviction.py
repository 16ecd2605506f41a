"""The byte budget: what is stored beyond it costs the biggest pod its least recent blocks.

Recency is the epoch in which a block was last stored or followed by a stored block, by any pod;
ancestors are at least as recent as their descendants, so chains lose their tails first. A pass
goes over all rows in steps and takes what is old enough; when a pass finds nothing, younger blocks
will do.
"""

from collections import Counter

import numpy as np

from kvcore.holders import Holders
from kvcore.index_memory import Memory
from kvcore.kernels import memory as m
from kvcore.kernels import sweeps

_STEP_ROWS = 1 << 16  # below 1 ms
_STEPS = 8  # per operation
_OLDEST_AGE = 128  # epochs; about as many as fill the budget
_BLOCK_BYTES = 256  # no block costs more, with its name and its share of an index


class Budget:
    """Watches ``capacity_bytes`` and evicts."""

    def __init__(self, memory: Memory, holders: Holders) -> None:
        self._memory, self._holders = memory, holders
        self.blocks_until_check = 0
        self._least_age, self._table, self._row = _OLDEST_AGE, m.NAMES, 1 << 40
        self._size_at_start = 0

    def check(self) -> None:
        """Evict for a few steps while the index is beyond its budget."""
        steps = _STEPS
        while self._memory.size_bytes() > self._memory.capacity_bytes and steps:
            self.evict()
            steps -= 1
        slack = self._memory.capacity_bytes - self._memory.size_bytes()
        self.blocks_until_check = max(slack // _BLOCK_BYTES, 0)

    def evict(self) -> None:
        """Do one step of a pass; what was cleared goes first."""
        if self._holders.dead_bits:
            self._holders.sweep()
            return
        header = self._memory.header
        if self._row >= header[self._table + m.HIGH]:
            if self._table == m.NAMES:
                self._choose_victim()
                self._table = m.BLOCKS
            else:
                self._table = m.NAMES
            self._row = 1
        self._memory.make_room(m.SETS, 128)
        self._row = sweeps.evict(
            self._memory.address, self._table, self._row, _STEP_ROWS, self._least_age
        )

    def _choose_victim(self) -> None:
        """Begin a pass over the rows of the pod that holds most."""
        size = self._memory.size_bytes()
        self._least_age = (
            self._least_age * 3 // 4 if size >= self._size_at_start else self._least_age + 1
        )
        self._size_at_start = size
        held: Counter[str] = Counter()
        for i, name in self._holders.names.items():
            held[name.pod] += int(self._memory.members[self._holders.bits[i], m.HELD])
        pod = max(held, key=held.__getitem__)
        victim = self._memory.arrays[m.VICTIM]
        victim[:] = 0
        for i, name in self._holders.names.items():
            bit = self._holders.bits[i]
            if name.pod == pod:
                victim[bit >> 6] |= np.uint64(1 << (bit & 63))
