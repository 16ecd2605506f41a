"""Memory: a budget that holds, and growth in steps."""

import hypothesis.strategies as st
from hypothesis import given, settings

from kvcore.index import BlockIndex
from kvcore.kernels import memory as m
from tests.kvcore.prompts import SIZE, hits, prompt, store


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
    index = BlockIndex(capacity_bytes=1 << 22)  # begins with 1,024 slots
    a = index.holder("a")
    seen = set()
    for n in range(400):
        store(index, a, [100 * n + i for i in range(40)], prompt(40, seed=n))
        seen.add(bool(index.memory.header[m.BLOCKS + m.OLD]))
        if n % 40 == 0:
            index.check()
            assert hits(index, prompt(40, seed=n // 2)) == {"a": 40}
    assert seen == {True, False}
