"""Cutting a text into segments never changes its ids, however odd the added tokens are."""

import json
import random
import re
import time

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from kvcore import segments
from kvcore.segments import SegmentCache, cut_tokens
from kvcore.tokenization import PromptTokenizer

_LETTERS = "ab<|>_ \né"


def _tokenizer(added, normalizer=None, pre_tokenizer=None):
    """A tokenizer with one token per character, so that every difference is seen."""
    vocabulary = {character: at for at, character in enumerate(dict.fromkeys(_LETTERS + "AB▁ĠĊ"))}
    vocabulary["?"] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="?"))  # noqa: S106 - no password
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.add_tokens(added)
    return tokenizer


def _encode_cached(tokenizer, texts, capacity_bytes=1 << 20):
    def encode_all(pieces):
        found = tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in found]

    added = list(tokenizer.get_added_tokens_decoder().values())
    cuts = cut_tokens(added, normalizes=tokenizer.normalizer is not None)
    cache = SegmentCache(cuts, capacity_bytes)
    return [cache.encode(text, encode_all).tolist() for text in texts]


# Few letters, so that tokens overlap.
_contents = st.text("a<|", min_size=1, max_size=3) | st.text(_LETTERS, min_size=1, max_size=4)
_added = st.lists(
    st.builds(
        AddedToken,
        _contents,
        lstrip=st.booleans(),
        rstrip=st.booleans(),
        single_word=st.booleans(),
        normalized=st.booleans(),
        special=st.booleans(),
    ),
    min_size=1,
    max_size=6,
)
_normalizers = st.sampled_from(
    [None, normalizers.Lowercase(), normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
)
_pre_tokenizers = st.sampled_from(
    [
        None,
        pre_tokenizers.Metaspace(prepend_scheme="first"),
        pre_tokenizers.Metaspace(prepend_scheme="always"),
        pre_tokenizers.Whitespace(),
        pre_tokenizers.ByteLevel(add_prefix_space=True),
    ]
)


@settings(max_examples=500, deadline=None)
@given(st.data(), _added, _normalizers, _pre_tokenizers)
def test_cached_ids_are_uncached_ids(data, added, normalizer, pre_tokenizer):
    """Overlapping, stripping, whole-word and normalized tokens, in any company."""
    tokenizer = _tokenizer(added, normalizer, pre_tokenizer)
    contents = [token.content for token in added]
    piece = st.sampled_from([*contents, *(c[1:] for c in contents), *(c[:-1] for c in contents)])
    texts = data.draw(st.lists(st.lists(piece | _contents, max_size=8).map("".join), max_size=4))
    expected = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts * 2]
    assert _encode_cached(tokenizer, texts * 2) == expected


@pytest.mark.parametrize(
    ("tokens", "cuts"),
    [
        ([AddedToken("<a>", normalized=False)], ["<a>"]),
        ([AddedToken("<a>", normalized=True)], []),  # under a normalizer
        ([AddedToken("<a>", normalized=False, lstrip=True)], []),
        ([AddedToken("<a>", normalized=False, single_word=True)], []),
        ([AddedToken("<a>", normalized=False, rstrip=True)], ["<a>"]),
        ([AddedToken("a>", normalized=False)], []),  # a word may end there
        ([AddedToken(" <a>", normalized=False)], []),
        ([AddedToken("<<", normalized=False)], []),  # <<< : which two?
        ([AddedToken("<a>", normalized=False), AddedToken("x<a>", normalized=False)], []),
        ([AddedToken("<a>", normalized=False), AddedToken("x<", normalized=False)], []),
        (
            [
                AddedToken("<a>", normalized=False),
                AddedToken("<a>b", normalized=False, lstrip=True),
            ],
            [],
        ),
    ],
)  # fmt: skip
def test_cuts_only_where_nothing_can_interfere(tokens, cuts):
    """Each rule on its own; the last four say why order of matching matters."""
    found = cut_tokens(tokens, normalizes=True)
    assert [content for content in found if content == tokens[0].content] == cuts


def test_a_first_pass_match_may_tear_a_normalized_token_apart():
    """Without a normalizer both kinds are cuts, but not where they overlap."""
    first = AddedToken("a>", normalized=False)
    tokens = [AddedToken("<a>", normalized=True), AddedToken("<b>", normalized=True), first]
    assert cut_tokens(tokens, normalizes=False) == ["<b>"]


def test_chat_markers_of_real_models_are_cuts():
    """Without cuts at them the cache would be exact and useless."""
    added = [
        AddedToken(c, normalized=False) for c in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    ]
    assert cut_tokens(added, normalizes=True) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def test_chats_that_grow_shrink_and_shuffle_get_the_same_ids():
    """A cache that mixes up pieces would show it here."""
    tokenizer = _tokenizer([AddedToken("<|a|>", normalized=False, rstrip=True)])
    chance = random.Random(7)
    turns = [
        "<|a|> " + "".join(chance.choice(_LETTERS) for _ in range(chance.randrange(40)))
        for _ in range(30)
    ]
    texts = ["".join(turns[:n]) for n in range(31)] + ["".join(turns[:n]) for n in range(30, 0, -1)]
    for _ in range(30):
        chance.shuffle(turns)
        texts.append("".join(turns))
    expected = [tokenizer.encode(text).ids for text in texts]
    assert _encode_cached(tokenizer, texts) == expected
    assert _encode_cached(tokenizer, texts, capacity_bytes=2000) == expected


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text("ab<|", min_size=1, max_size=5), min_size=1, max_size=8), st.data())
def test_cuts_are_where_the_longest_token_is_found_first(cuts, data):
    """As plain alternatives would find them, which are slow."""
    text = "".join(data.draw(st.lists(st.sampled_from(cuts) | st.text("ab<|", max_size=3))))
    plain = re.compile("|".join(map(re.escape, sorted(cuts, key=len, reverse=True))))
    expected = [match.start() for match in plain.finditer(text)]
    for window in (1, 4, 1000):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(segments, "_WINDOW", window)
            assert list(SegmentCache(cuts, 0)._find_cuts(text)) == expected


def test_a_thousand_added_tokens_do_not_slow_a_text_that_hints_at_each():
    """The search holds the GIL: this took 8 s a megabyte."""
    cache = SegmentCache([f"<SPECIAL_{at}>" for at in range(1000)], 0)
    start = time.perf_counter()
    cache._split("<" * 300_000)
    assert time.perf_counter() - start < 1  # 10 ms; plain alternatives take 2.5 s


@pytest.mark.parametrize(
    "contents", [["<" + "a" * n for n in range(500)], ["<" + "ab" * 50_000, "<|a|>"]]
)
def test_added_tokens_without_measure_cost_neither_the_load_nor_gigabytes(contents):
    """A hostile file can hold them."""
    tokenizer = _tokenizer([AddedToken(content, normalized=False) for content in contents])
    text = "a<|a|><aaab <"
    assert _encode_cached(tokenizer, [text]) == [tokenizer.encode(text).ids]


def test_the_cache_stays_within_its_budget():
    """Or a service that runs for months dies of its cache."""
    cache = SegmentCache(["<"], 100_000)
    for at in range(5000):
        text = "".join(f"<{at} {k}" for k in range(5))
        cache.encode(text, lambda pieces: [np.zeros(20, np.uint32) for _ in pieces])
        assert cache.size_bytes <= 100_000
    assert cache.size_bytes > 20_000


def test_only_unknown_pieces_are_encoded():
    """The point of it all: a turn more costs a turn."""
    asked = []

    def encode_all(pieces):
        asked.extend(pieces)
        return [np.zeros(len(piece), np.uint32) for piece in pieces]

    cache = SegmentCache(["<"], 1 << 20)
    cache.encode("x<a<b", encode_all)
    assert len(cache.encode("x<a<b<c<a", encode_all)) == 9
    assert asked == ["x", "<a", "<b", "<c"]


def test_refuses_no_tokenizer_file_that_tokenizers_loads():
    """Padding and truncation in a file are switched off: they would change ids."""
    tokenizer = _tokenizer([AddedToken("<a>", normalized=False)])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=8)
    text = "ab<a>ab<a>ab"
    for fast in (True, False):
        loaded = PromptTokenizer(tokenizer.to_str(), fast=fast)
        ids = loaded.encode(text, add_special_tokens=False)
        plain = tokenizers.Tokenizer.from_str(tokenizer.to_str())
        plain.no_padding()
        plain.no_truncation()
        assert ids.tolist() == plain.encode(text).ids
        assert ids.dtype == np.uint32
    assert json.loads(tokenizer.to_str())["padding"] is not None
