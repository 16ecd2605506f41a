"""The index's promises one by one; the stateful test tries what nobody thought of."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from kvcore.errors import InvalidInputError, SnapshotError
from kvcore.hashing import hash_blocks, namespace_root
from kvcore.holders import Holder
from kvcore.index import BlockIndex, EventRun
from kvcore.kernels import memory as m
from kvcore.scorer import score

SIZE = 4  # tokens per block
WEIGHTS = {"gpu": 1.0, "cpu": 0.8}


def prompt(n_blocks, seed=0):
    return np.random.default_rng(seed).integers(0, 1 << 17, n_blocks * SIZE, dtype=np.uint32)


def store(index, holder, names, tokens, parent=None, **kwargs):
    return index.store(holder, names, parent, tokens, block_size=SIZE, **kwargs)


def hits(index, tokens, **kwargs):
    """Leading blocks per pod."""
    keys = hash_blocks(tokens, block_size=SIZE, **kwargs)
    return {s.pod: s.blocks for s in score(index, keys, tier_weights=WEIGHTS)}


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


# ---------------------------------------------------------------- budget


def test_the_budget_holds_and_evictions_are_counted():
    """Pitfall 15: memory is bounded, and the pod that lost blocks says so."""
    index = BlockIndex(capacity_bytes=1 << 16)
    a, b = index.holder("a"), index.holder("b")
    quiet = prompt(20, seed=999)
    store(index, b, list(range(20)), quiet)
    for chain in range(300):
        names = [1000 * chain + n for n in range(20)]
        store(index, a, names, prompt(20, seed=chain))
        assert index.size_bytes() <= index.memory.capacity_bytes + 20 * 64
    index.check()
    stats = {s.holder.pod: s for s in index.holder_stats()}
    assert stats["a"].evicted == 300 * 20 - stats["a"].blocks > 0
    assert stats["b"].evicted == 0
    assert hits(index, quiet) == {"b": 20}  # the biggest pod pays
    assert hits(index, prompt(20, seed=299)) == {"a": 20}  # with its oldest blocks
    assert hits(index, prompt(20, seed=0)) == {}


def test_a_conversation_that_goes_on_is_recent_as_a_whole():
    """Only the new tail is announced; without its head it would be worth nothing."""
    index = BlockIndex(capacity_bytes=1 << 16)
    a, chat, n = index.holder("a"), prompt(400, seed=5), 1
    store(index, a, [0], chat[:SIZE])
    for other in range(300):
        store(index, a, [10_000 + 20 * other + i for i in range(20)], prompt(20, seed=other))
        store(index, a, [n], chat[n * SIZE : (n + 1) * SIZE], parent=n - 1)
        n += 1
    assert hits(index, chat) == {"a": n}


def test_one_store_beyond_the_budget_keeps_its_end_bounded():
    """Whatever one event brings, memory ends within the budget."""
    index = BlockIndex(capacity_bytes=1 << 16)
    tokens = prompt(20_000)
    store(index, index.holder("a"), list(range(20_000)), tokens)
    (stats,) = index.holder_stats()
    assert stats.blocks + stats.evicted == 20_000
    store(index, index.holder("a"), [-1], tokens[:SIZE])
    assert index.size_bytes() <= 1 << 16
    index.check()


chains = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40), st.integers(1, 30)), max_size=60)


@given(chains)
@settings(max_examples=30, deadline=None)
def test_eviction_never_reports_what_was_not_stored(runs):
    """Under any pressure the index is at most the truth, and its counters are exact."""
    index = BlockIndex(capacity_bytes=1 << 16)
    truth = {}
    for pod, seed, n in runs:
        tokens = prompt(10 * n, seed=seed)
        names = [(seed << 20) + i for i in range(10 * n)]
        store(index, index.holder(f"p{pod}"), names, tokens)
        truth[f"p{pod}", seed] = max(truth.get((f"p{pod}", seed), 0), 10 * n)
    index.check()
    for seed in {seed for _, seed in truth}:
        for pod, blocks in hits(index, prompt(300, seed=seed)).items():
            assert blocks <= truth[pod, seed]


def test_growth_goes_in_steps():
    """The old index answers until the new one is full: no operation pays for all rows at once."""
    index = BlockIndex()
    a = index.holder("a")
    seen = set()
    for n in range(400):
        store(index, a, [100 * n + i for i in range(40)], prompt(40, seed=n))
        seen.add(bool(index.memory.header[m.BLOCKS + m.OLD]))
        if n % 40 == 0:
            index.check()
            assert hits(index, prompt(40, seed=n // 2)) == {"a": 40}
    assert seen == {True, False}


# ---------------------------------------------------------------- many events at once


def test_a_run_of_events_equals_the_events_one_by_one():
    """`apply` is a loop in compiled code, and nothing else."""
    rng = np.random.default_rng(8)
    one, many = (BlockIndex(capacity_bytes=1 << 17) for _ in range(2))
    for index in (one, many):
        for pod in range(3):
            index.holder(f"p{pod}")
    events, tokens = [], prompt(64, seed=3).reshape(-1, SIZE)
    for _ in range(600):
        at, n = int(rng.integers(0, 60)), int(rng.integers(1, 5))
        follows = 2 if at else int(rng.integers(0, 2))
        parent = {0: 0, 1: 9, 2: at + 99}[follows]
        events.append((int(rng.integers(0, 3)), rng.random() < 0.6, at, n, follows, parent))
    run = EventRun(
        holders=np.array([e[0] for e in events], dtype=np.int64),
        is_store=np.array([e[1] for e in events], dtype=np.uint8),
        ends=np.cumsum([e[3] for e in events], dtype=np.int64),
        hashes=np.concatenate([np.arange(e[2], e[2] + e[3]) + 100 for e in events]).astype("u8"),
        follows=np.array([e[4] for e in events], dtype=np.uint8),
        parents=np.array([e[5] for e in events], dtype=np.uint64),
        tokens=np.concatenate([tokens[e[2] : e[2] + e[3]].reshape(-1) for e in events]),
    )
    unknown = many.apply(run, block_size=SIZE)
    expected = 0
    for pod, is_store, at, n, follows, parent in events:
        names = list(range(at + 100, at + n + 100))
        if not is_store:
            expected += one.remove(pod, names)
            continue
        before = parent if follows == 2 else None
        root = parent if follows == 1 else None
        store(one, pod, names, tokens[at : at + n].reshape(-1), before, root=root)
    many.check()
    assert unknown == expected
    assert many.holder_stats() == one.holder_stats()
    for root in (None, 9):
        assert hits(many, tokens.reshape(-1), root=root) == hits(one, tokens.reshape(-1), root=root)


# ---------------------------------------------------------------- bad input


def _state(index):
    return index.holder_stats(), index.memory.header[: m.SETS].tolist()


@pytest.mark.parametrize(
    "change",
    [
        {"hashes": np.array([1.0, 2.0])},
        {"hashes": np.array([[1, 2]], dtype=np.uint64)},
        {"hashes": [1, b"2"]},
        {"hashes": [b"1", 2]},
        {"hashes": [b"x" * 33, b"y"]},
        {"hashes": [1, 1 << 64]},
        {"hashes": [1, -(1 << 63) - 1]},
        {"hashes": [1.5, 2]},
        {"hashes": ["1", "2"]},
        {"hashes": [1, 2, 3]},
        {"parent": 1 << 64},
        {"parent": b"x" * 33},
        {"parent": 1.5},
        {"tokens": prompt(2).astype(np.int64)},
        {"tokens": prompt(2).astype(np.int32)},
        {"tokens": prompt(2).reshape(2, -1)},
        {"tokens": prompt(2)[:-1]},
        {"tokens": prompt(2)[:3]},
        {"tokens": prompt(2)[:0]},
        {"tokens": None},
        {"block_size": 0},
        {"block_size": -4},
        {"block_size": 4097},
        {"root": -1},
        {"root": 1 << 64},
        {"extras": {-1: b""}},
        {"holder": 1},
        {"holder": -1},
        {"holder": 1 << 63},
        {"holder": None},
    ],
    ids=repr,
)
def test_bad_stores_are_refused_and_change_nothing(index, change):
    """A malformed event is one error, not a corrupted index."""
    store(index, index.holder("a"), [7], prompt(1))
    before = _state(index)
    good = {"holder": 0, "hashes": [1, 2], "parent": None, "tokens": prompt(2), "block_size": SIZE}
    with pytest.raises(InvalidInputError):
        index.store(**{**good, **change})
    assert _state(index) == before
    index.check()


@pytest.mark.parametrize(
    "bad",
    [
        lambda i: i.holder("a", -1),
        lambda i: i.holder("a", 1 << 63),
        lambda i: i.holder("a", 0, "gpu", -1),
        lambda i: i.set_window("a", 0, 0, 0),
        lambda i: i.remove(5, [1]),
        lambda i: i.remove(0, [[1]]),
        lambda i: i.store_known(0, ["x"]),
        lambda i: i.match(np.zeros((2, 2), dtype=np.uint64)),
        lambda i: i.match(np.zeros(2, dtype=np.int64)),
        lambda i: i.match([1, 2]),
        lambda i: i.presence(np.zeros(2, dtype=np.float64), [0]),
        lambda i: BlockIndex(capacity_bytes=0),
        lambda i: BlockIndex(max_waiting_blocks=-1),
        lambda i: BlockIndex(seed=1 << 64),
    ],
)
def test_bad_calls_are_refused(index, bad):
    """Every number that reaches compiled code has been looked at."""
    index.holder("a")
    with pytest.raises(InvalidInputError):
        bad(index)


def test_a_prompt_without_a_block_has_no_score(index):
    """Empty and short prompts are asked about; the answer is nobody."""
    store(index, index.holder("a"), [1], prompt(1))
    assert score(index, np.empty(0, dtype=np.uint64), tier_weights=WEIGHTS) == []


# ---------------------------------------------------------------- snapshots


@pytest.fixture
def saved(index, tmp_path):
    store(index, index.holder("a"), [1, 2, 3], prompt(3))
    store(index, index.holder("b"), [b"x", b"y"], prompt(2))
    store(index, index.holder("b"), [b"z"], prompt(1), parent=b"unknown")
    index.snapshot(tmp_path / "index")
    return tmp_path / "index"


def test_a_restored_index_goes_on(saved):
    """Names, waiting blocks and windows included."""
    index = BlockIndex.restore(saved)
    index.check()
    assert index.remove(index.holder("a"), [3]) == 0
    assert store(index, index.holder("b"), [b"unknown"], prompt(1)).joined == 1
    assert hits(index, prompt(3)) == {"a": 2, "b": 2}


def test_a_snapshot_may_be_bigger_than_the_new_budget(index, tmp_path):
    """A smaller budget evicts, it does not refuse."""
    store(index, index.holder("a"), list(range(10_000)), prompt(10_000))
    index.snapshot(tmp_path / "index")
    small = BlockIndex.restore(tmp_path / "index", capacity_bytes=1 << 16)
    assert hits(small, prompt(10_000)) == {"a": 10_000}
    for n in range(40):
        store(small, small.holder("a"), [20_000 + n], prompt(1, seed=n + 1))
    small.check()
    (stats,) = small.holder_stats()
    assert stats.evicted > 5000


def test_damaged_and_foreign_files_are_refused(saved, tmp_path):
    """Whatever byte is wrong: an error of ours, before anything is believed."""
    whole = saved.read_bytes()
    bad = tmp_path / "bad"
    at = [0, 5, 15, 16, 19, 20, 23, 30, len(whole) // 2, len(whole) - 1]
    damaged = [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in at]
    for data in [*damaged, *(whole[:i] for i in at), whole + b"x", b"", b"PK\x03\x04"]:
        bad.write_bytes(data)
        with pytest.raises(SnapshotError):
            BlockIndex.restore(bad)
    with pytest.raises(SnapshotError):
        BlockIndex.restore(tmp_path / "absent")


def test_holder_names_keep_their_parts(index):
    """Statistics name who they are about."""
    index.holder("a:1", 2, "CPU_PINNED", 3)
    (stats,) = index.holder_stats()
    assert stats.holder == Holder("a:1", 2, "cpu_pinned", 3)
