"""The simulated engine's memory keeps vLLM's rules; the end-to-end truth rests on it."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcore.errors import InvalidInputError
from kvcore.paged_cache import PagedCache, RemovedBlock, StoredRun

SIZE = 4


def _tokens(*ids):
    return np.array(ids, dtype=np.uint32)


def _run(cache, tokens, n_new=0):
    sequence = cache.start(_tokens(*tokens), n_new_tokens=n_new)
    for token in range(n_new):
        cache.extend(sequence, 1000 + token)
    cache.finish(sequence)
    return sequence.n_cached_tokens


def _count(events):
    copies = Counter()
    for event in events:
        if isinstance(event, RemovedBlock):
            copies[event.hash] -= 1
        else:
            copies.update(event.hashes)
    return +copies


def test_the_last_prompt_token_is_always_computed():
    """A block-aligned prompt served twice hits all but its last block."""
    cache = PagedCache(capacity_blocks=8, block_size=SIZE)
    assert _run(cache, range(8)) == 0
    assert _run(cache, range(8)) == 4
    assert _run(cache, range(9)) == 8


def test_a_repeated_aligned_prompt_holds_its_last_block_twice():
    """The recomputed block is a second copy of the same hash, announced on its own."""
    cache = PagedCache(capacity_blocks=8, block_size=SIZE)
    _run(cache, range(8))
    _run(cache, range(8))
    assert sorted(cache.copies().values()) == [1, 2]


def test_the_tail_is_evicted_first():
    """A sequence loses its end before its beginning, so a prefix survives pressure."""
    cache = PagedCache(capacity_blocks=4, block_size=SIZE)
    _run(cache, range(12))
    cache.take_events()
    _run(cache, range(100, 108))
    assert _run(cache, range(12)) == 8


def test_generated_blocks_are_cached_and_chained():
    """A next turn that repeats the answer hits what decoding computed."""
    cache = PagedCache(capacity_blocks=8, block_size=SIZE)
    _run(cache, range(6), n_new=6)
    runs = [event for event in cache.take_events() if isinstance(event, StoredRun)]
    assert [len(run.hashes) for run in runs] == [1, 1, 1]
    assert [run.parent for run in runs[1:]] == [run.hashes[-1] for run in runs[:-1]]
    assert _run(cache, [*range(6), *range(1000, 1006), 7]) == 12


def test_what_does_not_fit_is_refused_and_changes_nothing():
    """Running sequences keep their promised memory; the refused one leaves no trace."""
    cache = PagedCache(capacity_blocks=3, block_size=SIZE)
    running = cache.start(_tokens(1, 2, 3), n_new_tokens=5)
    with pytest.raises(InvalidInputError, match="do not fit"):
        cache.start(_tokens(*range(9)))
    assert not cache.clear()
    for token in range(5):
        cache.extend(running, token)
    with pytest.raises(InvalidInputError, match="promised"):
        cache.extend(running, 9)
    cache.finish(running)
    assert cache.fits(3 * SIZE)
    assert cache.clear()
    assert not cache.copies()


def test_salts_separate_tenants():
    """Equal prompts under different salts share nothing."""
    cache = PagedCache(capacity_blocks=8, block_size=SIZE)
    for salt in ("a", "b"):
        sequence = cache.start(_tokens(*range(9)), salt=salt)
        assert sequence.n_cached_tokens == 0
        cache.finish(sequence)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 20), st.integers(0, 6)), max_size=40))
def test_events_add_up_to_the_truth(requests):
    """Counting stores up and removals down always equals what the memory holds."""
    cache, events = PagedCache(capacity_blocks=7, block_size=SIZE), []
    for family, length, n_new in requests:
        _run(cache, [family * 100 + i for i in range(length)], n_new)
        events += cache.take_events()
        assert _count(events) == cache.copies()
