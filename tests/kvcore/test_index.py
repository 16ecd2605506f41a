"""The index's promises one by one; the stateful test tries what nobody thought of."""

import time

import numpy as np
import pytest

from kvcore.errors import InvalidInputError
from kvcore.hashing import hash_blocks, namespace_root
from kvcore.index import BlockIndex
from kvcore.kernels import memory as m
from kvcore.scorer import score
from tests.kvcore.prompts import SIZE, WEIGHTS, hits, prompt, store


@pytest.fixture
def index():
    return BlockIndex(capacity_bytes=1 << 22)


def test_every_pod_of_a_shared_prefix_is_kept(index):
    """D1: others keep the last ten pods, and lose the one with the longest hit."""
    tokens = prompt(200)
    for pod in range(64):
        n = 200 if pod == 0 else 100
        store(index, index.holder(f"p{pod}"), list(range(n)), tokens[: n * SIZE])
    assert hits(index, tokens) == {"p0": 200, **{f"p{n}": 100 for n in range(1, 64)}}
    index.check()


def test_pods_that_call_different_blocks_the_same_do_not_meet(index):
    """D3: engine hashes belong to their publisher; a removal takes the right block."""
    first, second = prompt(1, seed=1), prompt(1, seed=2)
    a, b = index.holder("a"), index.holder("b")
    store(index, a, [77], first)
    store(index, b, [77], second)
    assert index.remove(a, [77]) == 0
    assert (hits(index, first), hits(index, second)) == ({}, {"b": 1})


def test_descendants_of_a_late_head_join_when_it_comes(index):
    """D4: a late or re-sent head must not cost the rest of the chain."""
    tokens, a = prompt(6), index.holder("a")
    late = store(index, a, [5, 6], tokens[4 * SIZE :], parent=4)
    store(index, a, [3, 4], tokens[2 * SIZE : 4 * SIZE], parent=2)
    assert (late.waiting, hits(index, tokens)) == (2, {})
    assert store(index, a, [1, 2], tokens[: 2 * SIZE]).joined == 4
    assert hits(index, tokens) == {"a": 6}


def test_what_waits_is_bounded_and_counted():
    """A lost head must not hold memory for ever; the pod is partial, and the oldest goes."""
    index = BlockIndex(max_waiting_blocks=4)
    a, tokens = index.holder("a"), prompt(8)
    for n in range(3):
        store(index, a, [10 * n, 10 * n + 1], tokens[: 2 * SIZE], parent=900 + n)
    (stats,) = index.holder_stats()
    assert (stats.waiting, stats.dropped) == (4, 2)
    assert store(index, a, [900], tokens[:SIZE]).joined == 0  # its descendants are gone
    assert store(index, a, [901], tokens[:SIZE]).joined == 2
    index.clear_pod("a")
    (stats,) = index.holder_stats()
    assert (stats.waiting, stats.dropped) == (0, 0)


def test_a_block_removed_while_it_waits_does_not_join(index):
    """Otherwise the late parent brings back a block that the engine has dropped."""
    tokens, a = prompt(3), index.holder("a")
    store(index, a, [2, 3], tokens[SIZE:], parent=1)
    assert index.remove(a, [2]) == 0
    assert store(index, a, [1], tokens[:SIZE]).joined == 1
    assert hits(index, tokens) == {"a": 1}
    index.check()


def test_a_hole_ends_the_prefix_and_healing_it_restores_all(index):
    """Pitfall 5: after a hole is healed, others under-report for ever."""
    tokens, a = prompt(50), index.holder("a")
    store(index, a, list(range(50)), tokens)
    index.remove(a, [20])
    assert hits(index, tokens) == {"a": 20}
    store(index, a, [20], tokens[20 * SIZE : 21 * SIZE], parent=19)
    assert hits(index, tokens) == {"a": 50}


@pytest.mark.parametrize("root", [None, 3])
def test_another_block_size_is_never_a_hit(index, root):
    """Pitfall 6 and D5: the same tokens cut otherwise are other keys, also without a namespace."""
    tokens, a = prompt(64), index.holder("a")
    store(index, a, list(range(64)), tokens, root=root)
    for size in (1, 2, 8, 16, 64):
        keys = hash_blocks(tokens, block_size=size, root=root)
        assert index.match(keys).size == 0


def test_a_copy_on_the_cpu_survives_the_eviction_on_the_gpu(index):
    """D6: tiers count on their own; 4 blocks at 0.8."""
    tokens = prompt(4)
    store(index, index.holder("a"), [1, 2, 3, 4], tokens)
    assert index.store_known(index.holder("a", tier="CPU"), [1, 2, 3, 4, 5]) == 1
    index.remove(index.holder("a"), [1, 2, 3, 4])
    (found,) = score(index, hash_blocks(tokens, block_size=SIZE), tier_weights=WEIGHTS)
    assert (found.blocks, found.score, found.by_tier) == (4, 3.2, {"cpu": 4})


def test_a_removed_pod_leaves_nothing(index):
    """D8: and its memory comes back with the operations that follow."""
    a, b, tokens = index.holder("a"), index.holder("b"), prompt(30)
    store(index, a, list(range(30)), tokens)
    store(index, b, list(range(10)), tokens[: 10 * SIZE])
    assert index.drop_pod("a") == 30
    assert hits(index, tokens) == {"b": 10}
    with pytest.raises(InvalidInputError):
        store(index, a, [1], tokens[:SIZE])
    index.remove(b, [99])
    index.check()
    assert index.memory.header[m.BLOCKS + m.LIVE] == 10


def test_ranks_are_holders_of_their_own(index):
    """D9: rank 0 evicts, rank 1 still has it."""
    tokens = prompt(4)
    for rank in (0, 1):
        store(index, index.holder("a", rank), [1, 2, 3, 4], tokens)
    index.remove(index.holder("a", 0), [1, 2, 3, 4])
    found = score(index, hash_blocks(tokens, block_size=SIZE), tier_weights=WEIGHTS)
    assert [(s.pod, s.rank, s.blocks) for s in found] == [("a", 1, 4)]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (b"A" * 24 + b"samesame", b"B" * 24 + b"samesame"),
        (b"samesame" + b"A" * 24, b"samesame" + b"B" * 24),
        (b"\x01", b"\x01\x00"),
        (b"\x01" + bytes(7), 1),
    ],
)
def test_engine_hashes_are_compared_in_full(index, one, other):
    """D12: cut to 64 bits, one pod's removal evicts another block."""
    a, first, second = index.holder("a"), prompt(1, seed=1), prompt(1, seed=2)
    store(index, a, [one], first)
    store(index, a, [other], second)
    assert (hits(index, first), hits(index, second)) == ({"a": 1}, {"a": 1})
    index.remove(a, [one])
    assert (hits(index, first), hits(index, second)) == ({}, {"a": 1})
    index.check()


def test_signed_and_unsigned_engine_hashes_are_one(index):
    """SGLang sends signed 64-bit ints; the bits are the name."""
    a, tokens = index.holder("a"), prompt(2)
    store(index, a, np.array([-5, 3], dtype=np.int64), tokens)
    assert index.remove(a, [(1 << 64) - 5]) == 0
    assert index.remove(a, [-5]) == 1


def test_copies_are_counted(index):
    """D13: announced twice, removed once, still there."""
    a, tokens = index.holder("a"), prompt(2)
    for _ in range(2):
        store(index, a, [1, 2], tokens)
    index.remove(a, [1, 2])
    assert hits(index, tokens) == {"a": 2}
    (stats,) = index.holder_stats()
    assert (stats.blocks, stats.copies) == (2, 2)
    assert index.remove(a, [1, 2, 1]) == 1
    assert hits(index, tokens) == {}


def test_a_block_with_two_names_goes_with_the_second(index):
    """An engine may cache one content twice, under two names; each removal takes its own."""
    a, tokens = index.holder("a"), prompt(1)
    store(index, a, [1], tokens)
    store(index, a, [2], tokens)
    assert index.remove(a, [1, 1]) == 1
    index.check()
    assert hits(index, tokens) == {"a": 1}
    index.remove(a, [2])
    assert hits(index, tokens) == {}


def test_adapters_salts_and_images_keep_prompts_apart(index):
    """D14: what changes the engine's cache key changes ours."""
    tokens, a = prompt(2), index.holder("a")
    base = namespace_root("m", block_size=SIZE)
    alice = namespace_root("m", block_size=SIZE, lora="Alice")
    store(index, a, [1, 2], tokens, root=alice)
    store(index, a, [3, 4], tokens, root=base, extras={1: b"image"})
    assert hits(index, tokens, root=alice) == {"a": 2}
    assert hits(index, tokens, root=base) == {"a": 1}
    assert hits(index, tokens, root=base, extras={1: b"image"}) == {"a": 2}
    assert hits(index, tokens) == {}


def test_a_hash_that_gets_another_meaning_loses_the_old_one(index):
    """An engine that restarts unnoticed names new blocks by old names; the old are gone."""
    a, cpu = index.holder("a"), index.holder("a", tier="cpu")
    old, new = prompt(1, seed=1), prompt(1, seed=2)
    store(index, a, [1], old)
    index.store_known(cpu, [1])
    assert store(index, a, [1], new).replaced == 1
    assert (hits(index, old), hits(index, new)) == ({}, {"a": 1})
    index.check()


def test_fewer_hashes_than_blocks_name_the_last_ones(index):
    """A sliding window has left the first blocks behind, and the engine does not name them."""
    tokens = prompt(6)
    index.set_window("a", 0, 1, 2)
    store(index, index.holder("a"), list(range(6)), tokens)
    store(index, index.holder("a", group=1), [4, 5], tokens)
    assert hits(index, tokens) == {"a": 6}
    assert hits(index, tokens[: 5 * SIZE]) == {}


def test_a_clear_takes_one_rank_or_all(index):
    """AllBlocksCleared comes per rank; a restart clears the pod."""
    tokens = prompt(3)
    for rank in (0, 1):
        store(index, index.holder("a", rank), [1, 2, 3], tokens)
    store(index, index.holder("b"), [1, 2, 3], tokens)
    assert index.clear_pod("a", 1) == 3
    assert index.clear_pod("a") == 3
    assert hits(index, tokens) == {"b": 3}
    store(index, index.holder("a"), [1], tokens[:SIZE])
    assert hits(index, tokens) == {"a": 1, "b": 3}
    index.check()


def test_many_holders_widen_the_sets(index):
    """More than 64 members need a second word in every set."""
    tokens = prompt(3)
    for pod in range(150):
        n = pod % 3 + 1
        store(index, index.holder(f"p{pod}"), list(range(n)), tokens[: n * SIZE])
    assert hits(index, tokens) == {f"p{pod}": pod % 3 + 1 for pod in range(150)}
    index.check()


def test_cleared_bits_are_used_again(index):
    """A pod that restarts all day must not widen the sets for ever."""
    tokens = prompt(3)
    for _ in range(200):
        store(index, index.holder("a"), [1, 2, 3], tokens)
        index.clear_pod("a")
    assert index.members.n_bits <= 8
    index.check()


def test_a_long_run_that_waits_is_removed_in_no_time():
    """One message stores it and another removes it, last block first: 16 s, once."""
    index = BlockIndex()
    holder, n = index.holder("pod-a"), 60_000
    names = np.arange(1, n + 1, dtype=np.uint64)
    index.store(holder, names, 0, np.zeros(n, dtype=np.uint32), block_size=1)
    started = time.perf_counter()
    assert index.remove(holder, names[::-1]) == 0
    assert time.perf_counter() - started < 4.0
    assert index.waiting.n_blocks == 0


def test_what_is_removed_while_it_waits_leaves_nothing_behind():
    """A pod whose head is lost stores and evicts for days."""
    index = BlockIndex()
    holder = index.holder("pod-a")
    for name in range(1, 100):
        one = np.array([name], dtype=np.uint64)
        index.store(holder, one, 0, np.zeros(1, dtype=np.uint32), block_size=1)
        assert index.remove(holder, one) == 0
    assert not index.waiting.runs


def test_tokens_without_names_are_bounded_while_they_wait():
    """One name may come with the tokens of a million blocks that a window has left behind."""
    index = BlockIndex(max_waiting_blocks=1000)
    holder = index.holder("pod-a")
    for name in range(1, 100):
        one = np.array([name], dtype=np.uint64)
        index.store(holder, one, 0, np.zeros(101, dtype=np.uint32), block_size=1)
    (stats,) = index.holder_stats()
    assert (stats.waiting, stats.dropped) == (10, 89)
