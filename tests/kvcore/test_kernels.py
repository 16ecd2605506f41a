"""Compiled parts against slow twins, where the index's own tests do not reach them."""

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings

from kvcore.engine_hashes import decode, encode
from kvcore.hashing import hash_blocks
from kvcore.index import BlockIndex
from kvcore.index_memory import Memory
from kvcore.kernels import memory as m
from kvcore.kernels import table


@given(st.lists(st.integers(-(1 << 63), (1 << 64) - 1), max_size=9))
def test_int_names_keep_their_bits(names):
    """Signed is a view of unsigned; nothing else changes."""
    assert decode(*encode(names)) == [name % (1 << 64) for name in names]


@given(st.lists(st.binary(max_size=32), min_size=1, max_size=9))
def test_bytes_names_keep_every_byte(names):
    """Length included: trailing zeros are part of a name."""
    assert decode(*encode(names)) == names


@given(
    st.integers(1, 3),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30)), min_size=1, max_size=40),
    st.lists(st.integers(0, 1), min_size=30, max_size=30),
)
@settings(deadline=None)
def test_match_agrees_with_looking_every_block_up(n_pods, runs, tokens):
    """Reading neighbours in a row, and stopping early, changes no answer."""
    index, names = BlockIndex(capacity_bytes=1 << 18), 0
    array = np.array(tokens, dtype=np.uint32)
    keys = hash_blocks(array, block_size=1)
    held = {}
    for pod, n in runs:
        holder = index.holder(f"p{pod % n_pods}")
        if n % 3 and n:
            index.store(holder, list(range(names, names + n)), None, array[:n], block_size=1)
            names += n
            held.setdefault(f"p{pod % n_pods}", set()).update(keys[:n].tolist())
        else:
            index.store(holder, [-n - 1], None, array[: n or 1], block_size=1)  # the last alone
            held.setdefault(f"p{pod % n_pods}", set()).add(int(keys[(n or 1) - 1]))
    scopes = index.scopes()
    found = {scopes[s][0]: n for s, n in index.match(keys).T.tolist()}
    leading = {
        pod: next((i for i, key in enumerate(keys.tolist()) if key not in mine), keys.size)
        for pod, mine in held.items()
    }
    assert found == {pod: n for pod, n in leading.items() if n}


def test_a_table_is_never_degraded_by_deletions():
    """No tombstones: after any churn a lookup of an absent key ends at once."""
    index = BlockIndex(capacity_bytes=1 << 20)
    holder, rng = index.holder("a"), np.random.default_rng(2)
    for round_ in range(30):
        names = list(range(round_ * 500, round_ * 500 + 500))
        tokens = rng.integers(0, 1 << 20, 500, dtype=np.uint32)
        index.store(holder, names, None, tokens, block_size=1)
        index.remove(holder, rng.permutation(names).astype(np.uint64))
    memory = index.memory
    for which in (m.BLOCKS, m.NAMES, m.COUNTS, m.SETS):
        assert memory.header[which + m.LIVE] == 0
        assert not memory.arrays[which + m.INDEX].any()
        assert memory.header[which + m.HIGH] <= 502  # rows are used again
    index.check()


def test_room_is_asked_in_rows_and_in_slots():
    """Three quarters of the slots, and the rows of the budget, whichever ends first."""
    memory = Memory(1 << 16, 0)
    slots = 1 << int(memory.header[m.BLOCKS + m.BITS])
    assert table.table_has_room(memory.address, m.BLOCKS, slots * 3 // 4)
    assert not table.table_has_room(memory.address, m.BLOCKS, slots * 3 // 4 + 1)
    assert not memory.make_room(m.BLOCKS, memory.limit_rows)
