"""The arrays of the index: a header, four hash tables, and columns beside them.

Dense rows are reserved for the whole byte budget at once; the system commits their pages as they
are first written, so growth never copies them. What does grow is the sparse index of a table (in
steps, see ``kernels.table``), and the rows of SETS, which are few.
"""

import mmap

import numpy as np
from numpy.typing import NDArray

from kvcore.kernels import memory as m
from kvcore.kernels import table as kernels

MIN_BITS = 10  # log2 of an index's slots at least
_TINY, _SMALL = 1024, 256  # times smaller than the budget
BLOCK_BYTES, NAME_BYTES, COUNT_BYTES, WIDE_BYTES = 18, 16, 16, 8 * m.WIDE_WORDS
# A store needs this much room at a time, whatever the budget.
SPARE_ROWS = 64


class Memory:
    """Owns the arrays whose addresses are in ``header``."""

    def __init__(self, capacity_bytes: int, seed: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.header = np.zeros(m.HEADER_SIZE, dtype=np.int64)
        self.address: int = self.header.ctypes.data  # what kernels take
        self.arrays: dict[int, NDArray] = {}  # by the word of the header with its address
        self.header[m.SEED] = np.uint64(seed).astype(np.int64)
        self.header[[m.ADD_FROM, m.DROP_FROM]] = -1
        self.header[m.SET_WORDS] = 1
        for table in m.TABLES:
            self.header[table + m.STRIDE] = 3 if table == m.SETS else 2
            self.header[table + m.HIGH] = 1
            # What is tiny beside the budget need not be grown into; sets are few.
            bits = MIN_BITS
            if table != m.SETS:
                bits = max(bits, (capacity_bytes // (4 * _TINY)).bit_length() - 1)
            self.header[table + m.BITS] = bits
            self.keep(table + m.INDEX, _small_pages(1 << bits, np.uint32))
        self.header[m.SETS + m.LIMIT] = 64
        self.keep(m.SETS + m.ROWS, np.zeros(64 * 3, dtype=np.uint64))
        self.reserve_rows(capacity_bytes // BLOCK_BYTES + SPARE_ROWS)
        self.keep(m.MEMBERS, np.zeros((64, m.MEMBER_WORDS), dtype=np.int64))
        for word in (m.MASK, m.DEAD, m.VICTIM):
            self.keep(word, np.zeros(1, dtype=np.uint64))
        self._zeros = np.zeros(4, dtype=np.int64)
        self.zeros: int = self._zeros.ctypes.data  # the address of "nothing more" for a store
        self.n_keys = 0
        self.use_keys(64)
        self.growing = False  # an old index may be in use
        # About 64 epochs to fill the budget once: fine enough to tell the recent from the old.
        self.header[m.EPOCH_LENGTH] = self.header[m.EPOCH_LEFT] = self.limit_rows // 128 + 1

    def reserve_rows(self, limit: int) -> None:
        """Reserve the rows of the three big tables, which are empty."""
        self.limit_rows = limit
        for table in (m.BLOCKS, m.NAMES, m.COUNTS):
            self.header[table + m.LIMIT] = limit
            self.keep(table + m.ROWS, _small_pages(2 * limit, np.uint64))
        self.keep(m.AGES, _small_pages(limit, np.uint16))

    def keep(self, word: int, array: NDArray) -> None:
        """Own an array, and write its address into a word of the header."""
        self.arrays[word] = array
        self.header[word] = array.ctypes.data

    @property
    def members(self) -> NDArray[np.int64]:
        """Counters and relations of each member: [n_bits, 8]."""
        return self.arrays[m.MEMBERS]

    def rows(self, table: int) -> NDArray[np.uint64]:
        """Return the rows of a table that were ever used, row 0 included: [n, stride]."""
        stride = int(self.header[table + m.STRIDE])
        high = int(self.header[table + m.HIGH])
        return self.arrays[table + m.ROWS][: high * stride].reshape(high, stride)

    def size_bytes(self) -> int:
        """Return the bytes in use, rows that are free for use again not counted."""
        live = {table: int(self.header[table + m.LIVE]) for table in m.TABLES}
        name = NAME_BYTES + (WIDE_BYTES if m.WIDE in self.arrays else 0)
        rows = live[m.BLOCKS] * BLOCK_BYTES + live[m.NAMES] * name + live[m.COUNTS] * COUNT_BYTES
        rows += live[m.SETS] * int(self.header[m.SETS + m.STRIDE]) * 8
        return rows + sum(self.arrays[t + m.INDEX].nbytes for t in m.TABLES)

    def make_room(self, table: int, n: int) -> bool:
        """Grow a table until ``n`` rows fit; False if that would exceed the budget.

        SETS may: they are few, and what they name is evicted.
        """
        while not kernels.table_has_room(self.address, table, n):
            if self.header[table + m.LIVE] + n >= self.header[table + m.LIMIT]:
                if table != m.SETS:
                    return False
                self._resize_sets(2 * int(self.header[m.SETS + m.LIMIT]), self.set_words)
                continue
            bits = int(self.header[table + m.BITS])
            # Growth moves every row: an index that is small in the budget grows in fewer steps.
            bigger = bits + (2 if (4 << (bits + 2)) * _SMALL <= self.capacity_bytes else 1)
            more_bytes = (4 << bigger) - (4 << bits)
            if table != m.SETS and self.size_bytes() + more_bytes > self.capacity_bytes:
                return False
            kernels.finish_migration(self.address, table)
            self.keep(table + m.OLD, self.arrays[table + m.INDEX])
            self.keep(table + m.INDEX, _small_pages(1 << bigger, np.uint32))
            self.header[table + m.OLD_BITS], self.header[table + m.BITS] = bits, bigger
            self.header[table + m.MOVED] = 1
            self.growing = True
        return True

    def release_old(self) -> None:
        """Let go of the old indexes that have been emptied."""
        for table in m.TABLES:
            if not self.header[table + m.OLD]:
                self.arrays.pop(table + m.OLD, None)
        self.growing = any(table + m.OLD in self.arrays for table in m.TABLES)

    def use_keys(self, n: int) -> NDArray[np.uint64]:
        """Return a place for the keys of ``n`` blocks, where `kernels.events` puts them."""
        if n > self.n_keys:
            self.keep(m.KEYS, np.zeros(2 * n, dtype=np.uint64))
            self.n_keys = 2 * n
        return self.arrays[m.KEYS]

    def use_wide_names(self) -> None:
        """Reserve the column of names that are bytes."""
        if m.WIDE not in self.arrays:
            self.keep(m.WIDE, np.zeros(self.limit_rows * m.WIDE_WORDS, dtype=np.uint64))

    def more(
        self, extras: NDArray[np.uint64], parent: NDArray[np.uint64], names: NDArray[np.uint64]
    ) -> tuple[NDArray[np.int64], object]:
        """Return what `kernels.events.store` takes as ``more``, and what must outlive the call."""
        if parent.size or names.size:
            self.use_wide_names()
        at = [array.ctypes.data if array.size else 0 for array in (extras, parent, names)]
        words = [at[0], extras.size // 2, at[1], at[2]]
        return np.array(words, dtype=np.int64), (extras, parent, names)

    @property
    def set_words(self) -> int:
        """Words of 64 members in a set."""
        return int(self.header[m.SET_WORDS])

    def use_members(self, n: int) -> None:
        """Make room for members numbered below ``n``."""
        if n > 64 * self.set_words:
            words = 2 * self.set_words
            self._resize_sets(int(self.header[m.SETS + m.LIMIT]), words)
            self.header[m.SET_WORDS] = words
            for word in (m.MASK, m.DEAD, m.VICTIM):
                wider = np.zeros(words, dtype=np.uint64)
                wider[: words // 2] = self.arrays[word]
                self.keep(word, wider)
            members = np.zeros((64 * words, m.MEMBER_WORDS), dtype=np.int64)
            members[: 32 * words] = self.members
            self.keep(m.MEMBERS, members)

    def _resize_sets(self, limit: int, words: int) -> None:
        before = self.rows(m.SETS)
        rows = np.zeros((limit, 2 + words), dtype=np.uint64)
        rows[: len(before), : before.shape[1]] = before
        self.header[m.SETS + m.LIMIT], self.header[m.SETS + m.STRIDE] = limit, 2 + words
        self.keep(m.SETS + m.ROWS, rows.reshape(-1))


def _small_pages(n: int, dtype: type) -> NDArray:
    """Return zeros in small pages, committed one by one as they are touched.

    A huge page is a pause of 4.4 ms where it was measured (a virtual machine), and an index, which
    is touched all over at once, 35 to 70 ms for 1.5 million rows.
    """
    size_bytes = n * np.dtype(dtype).itemsize
    area = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        area.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(area, dtype=dtype)
