"""Scores: the longest prefix per rank, weighted by tier, windows respected."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from kvcore.hashing import hash_blocks
from kvcore.index import BlockIndex
from kvcore.scorer import hit_end, score

TOKENS = np.arange(100, 110, dtype=np.uint32)
KEYS = hash_blocks(TOKENS, block_size=1)


def place(index, holder, blocks):
    """Let a holder have these blocks of the prompt, whatever is before them."""
    for n in blocks:
        index.store(holder, [n], None, TOKENS[: n + 1], block_size=1)


def one(index, **weights):
    (found,) = score(index, KEYS, tier_weights=weights)
    return found


def test_a_block_is_worth_its_best_tier():
    """On gpu are 0-2, on cpu 2-5: the prefix goes through both."""
    index = BlockIndex()
    place(index, index.holder("a"), [0, 1, 2])
    place(index, index.holder("a", tier="cpu"), [2, 3, 4, 5, 7])
    found = one(index, gpu=1.0, cpu=0.5)
    assert (found.blocks, found.score) == (6, 3 * 1.0 + 3 * 0.5)
    assert found.by_tier == {"gpu": 3, "cpu": 4}


def test_an_unlisted_tier_weighs_as_the_least():
    """D11: a slow tier that nobody configured must not win against the CPU."""
    index = BlockIndex()
    place(index, index.holder("slow", tier="tape"), range(4))
    place(index, index.holder("fast", tier="cpu"), range(4))
    found = score(index, KEYS, tier_weights={"gpu": 1.0, "cpu": 0.8})
    assert {s.pod: s.score for s in found} == pytest.approx({"slow": 3.2, "fast": 3.2})


def test_without_weights_a_block_is_worth_one():
    """No configuration at all still ranks by the prefix."""
    index = BlockIndex()
    place(index, index.holder("a", tier="disk"), range(3))
    assert one(index).score == 3.0


def test_a_query_may_be_for_some_pods():
    """A router asks for the pods it may choose from."""
    index = BlockIndex()
    for pod in "abc":
        place(index, index.holder(pod), range(3))
    found = score(index, KEYS, tier_weights={}, pods={"a", "c", "unknown"})
    assert [s.pod for s in found] == ["a", "c"]


def test_the_best_comes_first():
    """Longest first, and by name among equals: answers are reproducible."""
    index = BlockIndex()
    for pod, n in (("b", 2), ("c", 5), ("a", 2)):
        place(index, index.holder(pod), range(n))
    assert [s.pod for s in score(index, KEYS, tier_weights={})] == ["c", "a", "b"]


def test_a_window_needs_only_its_last_blocks():
    """Hybrid models: full attention decides, the sliding group must hold the window before."""
    index = BlockIndex()
    index.set_window("a", 0, 1, 2)
    place(index, index.holder("a"), range(8))
    place(index, index.holder("a", group=1), [3, 4, 6])
    assert one(index).blocks == 5
    place(index, index.holder("a", group=1), [7])
    assert one(index).blocks == 8


def test_a_rank_of_windows_alone_is_scored():
    """No group has full attention: the head of the prompt is nobody's, and not needed."""
    index = BlockIndex()
    index.set_window("a", 0, 0, 3)
    place(index, index.holder("a"), [5, 6, 7])
    assert one(index).blocks == 8


@given(
    st.lists(
        st.tuples(st.lists(st.booleans(), min_size=9, max_size=9), st.none() | st.integers(1, 10)),
        min_size=1,
        max_size=3,
    )
)
@settings(deadline=None)
def test_hit_end_is_the_longest_that_fits(groups):
    """Against trying every end."""
    held = {("a", 0, g): np.array(blocks) for g, (blocks, _) in enumerate(groups)}
    windows = {("a", 0, g): window for g, (_, window) in enumerate(groups)}
    fitting = [
        end
        for end in range(10)
        if all(all(b[max(0, end - w) if w else 0 : end]) for b, w in groups)
    ]
    assert hit_end(held, windows, 9) == max(fitting)
