"""What events mean for the index, case by case."""

import numpy as np
import pytest

from kvcore.events import AllBlocksCleared, BlockRemoved, BlockStored, EventBatch, SkippedEvent
from kvcore.feed import Feed, block_extra
from kvcore.hashing import hash_blocks, namespace_root
from kvcore.index import BlockIndex
from kvcore.scorer import score

BS = 4


def root(model, adapter=None, salt=None):
    return namespace_root(model, block_size=BS, lora=adapter, salt=salt)


def tokens(n_blocks, start=0):
    return np.arange(start, start + n_blocks * BS, dtype=np.uint32)


def hashes(*names):
    return np.array(names, dtype=np.uint64)


@pytest.fixture
def feed():
    return Feed(BlockIndex(), "pod-a", 0, model="m", block_size=BS, model_root=root)


def apply(feed, *events, skipped=()):
    feed.apply(EventBatch(1.0, list(events), None, list(skipped)))


def cached(feed, ids, adapter=None, salt=None, extras=None):
    """Return how many leading blocks the pod is said to hold."""
    keys = hash_blocks(ids, block_size=BS, root=root("m", adapter, salt), extras=extras)
    return sum(s.blocks for s in score(feed._index, keys, tier_weights={"gpu": 1.0}))


def test_stored_blocks_are_found_and_removed_ones_are_not(feed):
    """The plain case: a prompt in order, its tail evicted."""
    apply(feed, BlockStored(hashes(1, 2, 3), None, tokens(3), BS))
    assert cached(feed, tokens(3)) == 3
    apply(feed, BlockRemoved(hashes(3)))
    assert cached(feed, tokens(3)) == 2


def test_copies_are_counted(feed):
    """An engine stores the last block of an aligned prompt twice, and evicts each on its own."""
    apply(feed, BlockStored(hashes(1, 2), None, tokens(2), BS))
    apply(feed, BlockStored(hashes(2), 1, tokens(1, BS), BS))
    apply(feed, BlockRemoved(hashes(2)))
    assert cached(feed, tokens(2)) == 2
    apply(feed, BlockRemoved(hashes(2)))
    assert cached(feed, tokens(2)) == 1


def test_order_inside_a_batch_matters(feed):
    """Stored, removed and stored again is held; the other order is not."""
    stored = BlockStored(hashes(1), None, tokens(1), BS)
    apply(feed, stored, BlockRemoved(hashes(1)), stored)
    assert cached(feed, tokens(1)) == 1
    apply(feed, stored, AllBlocksCleared())
    assert cached(feed, tokens(1)) == 0


def test_an_adapter_matches_requests_that_name_it(feed):
    """Engines repeat the adapter's name in every block's extra keys; it is no image."""
    keys = [["ad-one", "s9"], ["ad-one"]]
    event = BlockStored(hashes(1, 2), None, tokens(2), BS, lora_name="ad-one", extra_keys=keys)
    apply(feed, event)
    assert cached(feed, tokens(2), adapter="ad-one", salt="s9") == 2
    assert cached(feed, tokens(2), adapter="ad-one") == 0
    assert cached(feed, tokens(2)) == 0


def test_an_old_engine_names_an_adapter_by_number(feed):
    """Releases before lora_name send lora_id alone; its base model must not match."""
    apply(feed, BlockStored(hashes(1), None, tokens(1), BS, lora_id=3))
    assert cached(feed, tokens(1)) == 0
    assert cached(feed, tokens(1), adapter="3") == 1


def test_a_salt_separates_tenants_and_chains(feed):
    """The salt is in block 0 alone; the blocks behind it inherit it by their parent."""
    apply(feed, BlockStored(hashes(1), None, tokens(1), BS, extra_keys=[["s1"]]))
    apply(feed, BlockStored(hashes(2), 1, tokens(1, BS), BS, extra_keys=[None]))
    assert cached(feed, tokens(2), salt="s1") == 2
    assert cached(feed, tokens(2)) == 0


def test_sglang_says_the_salt_by_name(feed):
    """As a field of its own, without extra keys."""
    apply(feed, BlockStored(hashes(1), None, tokens(1), BS, cache_salt="s1"))
    assert cached(feed, tokens(1), salt="s1") == 1


def test_multimodal_keys_go_into_their_blocks(feed):
    """Two prompts with the same placeholder tokens and other images share nothing."""
    keys = [None, ["img"], ["img"], None]
    apply(feed, BlockStored(hashes(1, 2, 3, 4), None, tokens(4), BS, extra_keys=keys))
    image = {1: block_extra(["img"]), 2: block_extra(["img"])}
    assert cached(feed, tokens(4), extras=image) == 4
    assert cached(feed, tokens(4)) == 1


def test_an_image_in_block_0_that_goes_on_is_no_salt(feed):
    """It also covers the next block, which a salt never does."""
    keys = [["img"], ["img"]]
    apply(feed, BlockStored(hashes(1, 2), None, tokens(2), BS, extra_keys=keys))
    image = {0: block_extra(["img"]), 1: block_extra(["img"])}
    assert cached(feed, tokens(2), extras=image) == 2


def test_tiers_are_apart(feed):
    """A block offloaded by its hash alone stays when the GPU's copy goes."""
    apply(feed, BlockStored(hashes(1), None, tokens(1), BS, medium="GPU"))
    apply(feed, BlockStored(hashes(1), None, tokens(0), 0, medium="CPU"))
    apply(feed, BlockRemoved(hashes(1), "GPU"))
    assert cached(feed, tokens(1)) == 1
    apply(feed, BlockRemoved(hashes(1), "cpu"))
    assert cached(feed, tokens(1)) == 0


def test_an_offloaded_block_never_seen_is_a_doubt(feed):
    """It is there, and we cannot say what it holds."""
    apply(feed, BlockStored(hashes(7), None, tokens(0), 0, medium="CPU"))
    assert feed.counters.unresolved_blocks == 1
    assert feed.doubt is not None


def test_another_block_size_is_refused_and_said(feed):
    """Blocks of another size would match prompts that were never seen."""
    apply(feed, BlockStored(hashes(1), None, np.arange(8, dtype=np.uint32), 8))
    assert feed.counters.refused_events == 1
    assert "8 tokens" in (feed.doubt or "")
    assert cached(feed, np.arange(8, dtype=np.uint32)) == 0


def test_tokens_that_do_not_fit_the_hashes_are_refused(feed):
    """Guessing which token belongs to which block would be silently wrong."""
    apply(feed, BlockStored(hashes(1, 2), None, tokens(1), BS))
    assert feed.counters.refused_events == 1
    assert feed.doubt is not None


def test_eagle_pairs_are_indexed_and_doubted(feed):
    """Their blocks also depend on one token more than we know."""
    apply(feed, BlockStored(hashes(1), None, tokens(1), BS, is_bigram=True))
    assert cached(feed, tokens(1)) == 1
    assert "EAGLE" in (feed.doubt or "")


def test_sliding_groups_need_their_window_only(feed):
    """Full attention decides the prefix; each sliding group must hold the end of it."""
    full = BlockStored(
        hashes(1, 2, 3, 4), None, tokens(4), BS, group_idx=0, kv_cache_spec_kind="full_attention"
    )
    sliding = full._replace(
        group_idx=1, kv_cache_spec_kind="sliding_window", kv_cache_spec_sliding_window=2 * BS
    )
    apply(feed, full, sliding)
    apply(feed, BlockRemoved(hashes(1, 2), group_idx=1))
    assert cached(feed, tokens(4)) == 4  # ceil((8 - 1) / 4) = 2 blocks of the window are held
    apply(feed, BlockRemoved(hashes(4), group_idx=1))
    assert cached(feed, tokens(4)) == 0
    apply(feed, BlockStored(hashes(4), 3, tokens(1, 3 * BS), BS, group_idx=1))
    assert cached(feed, tokens(4)) == 4


def test_a_sliding_group_may_name_fewer_blocks_than_it_has_tokens(feed):
    """Blocks that the window left behind have no hash; the hashes are those of the last ones."""
    apply(feed, BlockStored(hashes(1, 2, 3), None, tokens(3), BS, group_idx=0))
    apply(
        feed,
        BlockStored(
            hashes(3),
            None,
            tokens(3),
            BS,
            group_idx=1,
            kv_cache_spec_kind="sliding_window",
            kv_cache_spec_sliding_window=BS,
        ),
    )
    assert cached(feed, tokens(3)) == 3


def test_an_unknown_kind_of_attention_is_a_doubt(feed):
    """Taken as full attention, it can only make the pod look colder."""
    apply(feed, BlockStored(hashes(1), None, tokens(1), BS, kv_cache_spec_kind="chunked_local"))
    assert "chunked_local" in (feed.doubt or "")


def test_a_child_waits_for_its_parent(feed):
    """A lost or late head must not cost its descendants."""
    apply(feed, BlockStored(hashes(2), 1, tokens(1, BS), BS))
    assert cached(feed, tokens(2)) == 0
    apply(feed, BlockStored(hashes(1), None, tokens(1), BS))
    assert cached(feed, tokens(2)) == 2


def test_long_hashes_are_names_of_their_own(feed):
    """Two that agree in the last eight bytes are two blocks."""
    one, two = b"a" * 24 + b"tail8888", b"b" * 24 + b"tail8888"
    apply(feed, BlockStored([one], None, tokens(1), BS))
    apply(feed, BlockStored([two], None, tokens(1, 100), BS))
    apply(feed, BlockRemoved([two]))
    assert cached(feed, tokens(1)) == 1


def test_skips_are_counted_and_only_known_kinds_are_doubts(feed):
    """An event we cannot read may have removed something; one we never heard of is no loss."""
    apply(feed, skipped=[SkippedEvent("BlockMoved", "unknown kind of event", is_known=False)])
    assert (feed.counters.unknown_events, feed.doubt) == (1, None)
    apply(feed, skipped=[SkippedEvent("BlockRemoved", "KeyError", is_known=True)])
    assert feed.counters.bad_events == 1
    assert feed.doubt is not None


def test_a_clear_ends_every_doubt(feed):
    """An empty cache is known exactly."""
    test_another_block_size_is_refused_and_said(feed)
    apply(feed, AllBlocksCleared())
    assert feed.doubt is None


def test_ranks_do_not_share(feed):
    """Data-parallel ranks have a cache each."""
    other = Feed(feed._index, "pod-a", 1, model="m", block_size=BS, model_root=root)
    apply(feed, BlockStored(hashes(1), None, tokens(1), BS))
    apply(other, BlockStored(hashes(1), None, tokens(1), BS))
    apply(feed, AllBlocksCleared())
    keys = hash_blocks(tokens(1), block_size=BS, root=root("m"))
    assert [(s.pod, s.rank) for s in score(feed._index, keys, tier_weights={"gpu": 1.0})] == [
        ("pod-a", 1)
    ]


def hybrid(*names, group, n_blocks, parent=None, start=0):
    """Return what one step of a hybrid model stores in a group; group 1 is the full one."""
    kind = ("full_attention", None) if group == 1 else ("sliding_window", 2 * BS)
    return BlockStored(
        hashes(*names),
        parent,
        tokens(n_blocks, start * BS),
        BS,
        group_idx=group,
        kv_cache_spec_kind=kind[0],
        kv_cache_spec_sliding_window=kind[1],
    )


def test_a_sliding_group_may_name_blocks_in_the_middle(feed):
    """It skips the blocks that no window needs, wherever they are; engines send it first."""
    apply(
        feed,
        hybrid(1, 4, 5, group=0, n_blocks=5),
        hybrid(1, 2, 3, 4, 5, group=1, n_blocks=5),
    )
    assert cached(feed, tokens(5)) == 5
    apply(feed, BlockRemoved(hashes(5), group_idx=1))
    assert cached(feed, tokens(5)) == 1  # behind blocks 2 to 4 the window of the sliding one misses


def test_a_sliding_group_may_follow_a_block_that_it_does_not_have(feed):
    """The parent was left behind by its window; the full group still knows it."""
    apply(feed, hybrid(1, 2, group=1, n_blocks=2))
    apply(
        feed,
        hybrid(3, 4, group=0, n_blocks=2, parent=2, start=2),
        hybrid(3, 4, group=1, n_blocks=2, parent=2, start=2),
    )
    assert cached(feed, tokens(4)) == 4


def test_a_sliding_block_that_the_full_group_does_not_know_is_refused(feed):
    """Guessing its place could make the pod look warmer than it is."""
    apply(feed, hybrid(1, 2, 3, group=1, n_blocks=3), hybrid(9, group=0, n_blocks=3))
    assert feed.counters.refused_events == 1
    assert "full one" in (feed.doubt or "")


def test_a_rank_has_a_bounded_number_of_tiers(feed):
    """A pod that makes up media must not use up everybody's holders."""
    for number in range(100):
        apply(feed, BlockRemoved(hashes(1), medium=f"tier {number}"))
    assert feed.counters.refused_events == 36
    assert len(feed._index.holders()) == 64


def test_a_salt_may_be_called_as_the_adapter_is(feed):
    """Taken for a repetition of the name, it would share the blocks with all other tenants."""
    keys = [["ad-one", "ad-one"], ["ad-one"]]
    event = BlockStored(hashes(1, 2), None, tokens(2), BS, lora_name="ad-one", extra_keys=keys)
    apply(feed, event)
    assert cached(feed, tokens(2), adapter="ad-one") == 0
    assert cached(feed, tokens(2), adapter="ad-one", salt="ad-one") == 2


def test_groups_are_known_after_a_restart_of_ours(feed):
    """A sliding group's first event may name blocks that only the full one has all of."""
    apply(feed, hybrid(1, 2, 3, group=1, n_blocks=3), hybrid(3, group=0, n_blocks=3))
    again = Feed(feed._index, "pod-a", 0, model="m", block_size=BS, model_root=root)
    apply(again, BlockRemoved(hashes(3), group_idx=0))
    apply(again, hybrid(2, 3, group=0, n_blocks=3))
    assert (cached(again, tokens(3)), again.doubt) == (3, None)


def test_a_restarted_engine_may_have_other_groups(feed):
    """One that it no longer has would keep every hit from being a hit."""
    apply(feed, hybrid(1, group=1, n_blocks=1), hybrid(1, group=0, n_blocks=1))
    feed.reset()
    apply(feed, BlockStored(hashes(1), None, tokens(1), BS, group_idx=1))
    assert cached(feed, tokens(1)) == 1


def test_a_group_keeps_a_state_where_it_was_saved(feed):
    """Mamba has no block where no state was kept: its parent is in the full group alone."""

    def mamba(*names, n_blocks, parent=None, start=0):
        event = hybrid(*names, group=0, n_blocks=n_blocks, parent=parent, start=start)
        return event._replace(kv_cache_spec_kind="mamba", kv_cache_spec_sliding_window=None)

    apply(feed, mamba(2, n_blocks=2), hybrid(1, 2, group=1, n_blocks=2))
    assert cached(feed, tokens(2)) == 2
    apply(feed, BlockRemoved(hashes(2), group_idx=0))
    full = hybrid(3, group=1, n_blocks=1, parent=2, start=2)
    apply(feed, mamba(3, n_blocks=1, parent=2, start=2), full)
    assert (cached(feed, tokens(3)), feed.doubt) == (3, None)


def test_a_sliding_group_may_leave_out_a_block_with_an_image(feed):
    """Extra keys are those of the named blocks alone, and say nothing of the others."""
    image = {1: block_extra(["img"])}
    full = hybrid(1, 2, 3, 4, group=1, n_blocks=4)._replace(extra_keys=[None, ["img"], None, None])
    apply(feed, full, hybrid(1, 3, 4, group=0, n_blocks=4))
    assert (cached(feed, tokens(4), extras=image), feed.doubt) == (4, None)


def test_long_names_are_not_kept(feed):
    """A tier's name is refused, a salt is used: clients choose it, and it may take megabytes."""
    apply(feed, BlockStored(hashes(1), None, tokens(1), BS, medium="x" * 1000))
    assert feed.counters.refused_events == 1
    salt = "s" * 1000
    apply(feed, BlockStored(hashes(1), None, tokens(1), BS, cache_salt=salt))
    assert cached(feed, tokens(1), salt=salt) == 1
    assert feed._roots == {}


def test_long_extra_keys_do_not_take_their_size(feed):
    """They are kept while a block waits, and no block is worth megabytes."""
    keys = [["x" * 100_000]]
    apply(feed, BlockStored(hashes(2), 1, tokens(1, BS), BS, extra_keys=keys))
    (run,) = feed._index.waiting.runs.values()
    assert len(run.extras[0]) == 32
    apply(feed, BlockStored(hashes(1), None, tokens(1), BS))
    assert cached(feed, tokens(2), extras={1: block_extra(keys[0])}) == 2
