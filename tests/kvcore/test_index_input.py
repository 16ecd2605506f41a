"""What comes from outside: runs of events, nonsense, and files."""

import numpy as np
import pytest

from kvcore.errors import InvalidInputError, SnapshotError
from kvcore.holders import Holder
from kvcore.index import BlockIndex, EventRun
from kvcore.kernels import memory as m
from kvcore.scorer import score
from tests.kvcore.prompts import SIZE, WEIGHTS, hits, prompt, store


@pytest.fixture
def index():
    return BlockIndex(capacity_bytes=1 << 22)


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
        {"tokens": np.frombuffer(bytes(9), np.uint8)[1:].view(np.uint32)},
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


@pytest.fixture
def saved(index, tmp_path):
    store(index, index.holder("a"), [1, 2, 3], prompt(3))
    store(index, index.holder("b"), [b"x", b"y"], prompt(2))
    store(index, index.holder("b"), [b"z"], prompt(1), parent=b"unknown")
    index.snapshot({"a": 1}).write(tmp_path / "index")
    return tmp_path / "index"


def test_a_restored_index_goes_on(saved):
    """Names, waiting blocks and windows included, and what the caller noted."""
    index, note = BlockIndex.restore(saved)
    assert note == {"a": 1}
    index.check()
    assert index.remove(index.holder("a"), [3]) == 0
    assert store(index, index.holder("b"), [b"unknown"], prompt(1)).joined == 1
    assert hits(index, prompt(3)) == {"a": 2, "b": 2}


def test_a_snapshot_may_be_bigger_than_the_new_budget(index, tmp_path):
    """A smaller budget evicts, it does not refuse."""
    store(index, index.holder("a"), list(range(10_000)), prompt(10_000))
    index.snapshot({"a": 1}).write(tmp_path / "index")
    small, _ = BlockIndex.restore(tmp_path / "index", capacity_bytes=1 << 16)
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
