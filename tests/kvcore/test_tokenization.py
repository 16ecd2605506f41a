"""Ids equal those of ``tokenizers``, on whichever backend, cached or not."""

import hashlib
import json
import random
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

import deployments
from kvcore import tokenization
from kvcore.errors import InvalidInputError, ModelDamagedError
from kvcore.tokenization import PromptTokenizer
from tests import conformance
from tests.conformance_data import full_set
from tests.fetch_tokenizers import TABLE, path_of

EMBEDDED = Path(deployments.__file__).parent / "embedded" / "tokenizer.json"
_LLAMA_3 = "deepseek-r1-distill-llama-8b"  # Llama 3's vocabulary; nothing was recorded with it
BACKENDS = ("fastokens", "tokenizers")


def _text_of(name):
    if name == "embedded":
        return EMBEDDED.read_text()
    if not path_of(name).exists():
        pytest.skip(f"no {name}: run python -m tests.fetch_tokenizers")
    return path_of(name).read_text()


@cache
def _embedded(backend):
    tokenizer = PromptTokenizer(EMBEDDED.read_text(), fast=backend == "fastokens")
    if tokenizer.backend != backend:
        pytest.skip(f"no {backend}: {tokenizer.fallback_reason}")
    return tokenizer


@cache
def _reference():
    return tokenizers.Tokenizer.from_file(str(EMBEDDED))


@cache
def _rows():
    rows = defaultdict(list)
    for row in full_set("token_cases.jsonl.gz"):
        rows[row["tokenizer"]].append(row)
    return rows


@pytest.mark.parametrize("name", sorted(set(TABLE) - {_LLAMA_3}))
def test_real_tokenizers_give_the_recorded_ids(name):
    """Chats, code, every script and smuggled special tokens, with real models' files."""
    text = _text_of(name)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    rows = [row for row in _rows()[name] if row["sha256"] == sha256]
    assert rows
    for fast in (True, False):
        tokenizer = PromptTokenizer(text, fast=fast)
        for row in rows * 2:  # the second time from the cache
            ids = tokenizer.encode(row["text"], add_special_tokens=False)
            assert ids.tolist() == row["ids"], (tokenizer.backend, row["item"])
            if row["item"].startswith("text"):  # chats were recorded without special tokens
                special = row.get("ids_add_special_tokens", row["ids"])
                ids = tokenizer.encode(row["text"], add_special_tokens=True)
                assert ids.tolist() == special, (tokenizer.backend, row["item"])


@pytest.mark.parametrize("name", ["claude", _LLAMA_3, "llama2", "qwen2_5", "embedded"])
def test_chats_that_grow_and_change_get_the_ids_of_tokenizers(name):
    """The caches see every kind of change a conversation can make."""
    text = _text_of(name)
    reference = tokenizers.Tokenizer.from_str(text)
    reference.no_truncation()
    markers = [t.content for t in reference.get_added_tokens_decoder().values()][:12]
    chance = random.Random(3)
    words = ["fox", " the", "\n", "  ", "é", "日本", "12", "'s", "_x", "👋🏽", "<|", "|>", *markers]

    def turn():
        body = "".join(chance.choice(words) for _ in range(chance.randrange(60)))
        return chance.choice(markers) + body + chance.choice(markers)

    turns = [turn() for _ in range(12)]
    chats = [turns[:n] for n in (*range(13), *range(12, 0, -1))]
    chats += [chance.sample(turns, 8) for _ in range(10)]
    for fast in (True, False):
        tokenizer = PromptTokenizer(text, fast=fast)
        for chat in chats:
            prompt = "".join(chat)
            for special in (False, True):
                expected = reference.encode(prompt, add_special_tokens=special).ids
                got = tokenizer.encode(prompt, add_special_tokens=special)
                assert got.tolist() == expected, (tokenizer.backend, prompt)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=60) | st.lists(
    st.sampled_from(["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im", "_", " ", "é", "a",
                     "e\u0301", "\n", "'ll", "'LL", "ſ", "\u0345", "\U0001f468\u200d", "\x85"]),
    max_size=12).map("".join))  # fmt: skip
def test_any_unicode_gets_the_ids_of_tokenizers(backend, text):
    """Combining marks, lone joiners, private planes: whatever a prompt holds."""
    expected = _reference().encode(text, add_special_tokens=False).ids
    for _ in range(2):
        assert _embedded(backend).encode(text, add_special_tokens=False).tolist() == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_long_prompts_keep_every_token(backend):
    """Longer than any slice in which ids are taken over."""
    text = "".join(f"{n} bottles, " for n in range(20_000)) + "x" * 100_000
    expected = _reference().encode(text, add_special_tokens=False).ids
    ids = _embedded(backend).encode(text, add_special_tokens=False)
    assert len(expected) > 2 * tokenization._SLICE_TOKENS
    assert ids.tolist() == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_may_share_a_tokenizer(backend):
    """Long prompts are encoded in threads, beside short ones on the event loop."""
    chats = ["".join(f"<|im_start|>user\n{n} {k}<|im_end|>" for k in range(n)) for n in range(40)]
    expected = [_reference().encode(chat, add_special_tokens=False).ids for chat in chats]
    tokenizer = PromptTokenizer(
        EMBEDDED.read_text(), cache_bytes=20_000, fast=backend == "fastokens"
    )

    def encode_all(seed):
        order = random.Random(seed).sample(range(40), 40) * 5
        return all(
            tokenizer.encode(chats[n], add_special_tokens=False).tolist() == expected[n]
            for n in order
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(encode_all, range(4)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_are_uint32_arrays(backend):
    """Lists of Python ints cost more than the hashing of the blocks."""
    for text in ("", "hi", "<|im_start|>a<|im_end|>"):
        ids = _embedded(backend).encode(text, add_special_tokens=False)
        assert isinstance(ids, np.ndarray)
        assert ids.dtype == np.uint32
        assert ids.flags.c_contiguous


@pytest.mark.parametrize("text", ["a\ud800", "\udc00", "ok \ud83d\ud83d\udc4b"])
def test_a_lone_surrogate_is_an_error_that_says_where(text):
    """JSON can escape one; tokenizers fails on it with a TypeError about something else."""
    place = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").index("\ufffd")
    with pytest.raises(InvalidInputError, match=f"character {place} is the lone surrogate U\\+D"):
        _embedded("tokenizers").encode(text, add_special_tokens=False)


@pytest.mark.parametrize("text", ["", "{}", "[]", "{", '{"model": {"type": "Unheard"}}'])
def test_a_broken_file_is_a_typed_error(text):
    """It came from a hub or a disk, not from a programmer."""
    with pytest.raises(ModelDamagedError, match=r"tokenizer\.json cannot be loaded"):
        PromptTokenizer(text)


def test_a_backend_that_differs_is_not_taken(monkeypatch):
    """A faster backend that is wrong once makes every score of that model wrong."""
    honest = tokenization._Fast.encode

    def wrong_on_fractions(self, text, add_special_tokens):
        ids = honest(self, text, add_special_tokens)
        return ids[:-1] if "½" in text else ids

    _embedded("fastokens")  # or skip
    monkeypatch.setattr(tokenization._Fast, "encode", wrong_on_fractions)
    tokenizer = PromptTokenizer(EMBEDDED.read_text())
    assert tokenizer.backend == "tokenizers"
    assert "differs from tokenizers on" in str(tokenizer.fallback_reason)
    assert tokenizer.encode("½", add_special_tokens=False).tolist() == _reference().encode("½").ids


@pytest.mark.parametrize("pattern", [r"'s|[^\s\p{L}]+|\p{L}+|\s+", r"\w+|\W+", r"\p{Han}+"])
def test_a_regex_that_the_backends_read_differently_is_not_taken(pattern):
    """U+180E is white space to one of them only, 362 marks are part of a word to one only."""
    file = json.loads(EMBEDDED.read_text())
    file["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": pattern}
    tokenizer = PromptTokenizer(json.dumps(file))
    reference = tokenizers.Tokenizer.from_str(json.dumps(file))
    for text in ("!\u180e's", "a\u0903b", "漢\u00b7字"):
        ids = tokenizer.encode(text, add_special_tokens=False).tolist()
        assert ids == reference.encode(text).ids
    assert tokenizer.backend == "tokenizers"


def test_a_backend_that_fails_on_a_text_leaves_it_to_the_other(monkeypatch):
    """Its regex engine has limits that a hostile prompt can reach."""
    tokenizer = PromptTokenizer(EMBEDDED.read_text())

    def fail(*_):
        raise ValueError("match limit exceeded")

    monkeypatch.setattr(tokenization._Fast, "encode", fail)
    assert (
        tokenizer.encode("hi", add_special_tokens=False).tolist() == _reference().encode("hi").ids
    )


def _with(**changes):
    file = json.loads(EMBEDDED.read_text())
    file["model"] |= changes.pop("model", {})
    return json.dumps(file | changes)


def _added(content, **flags):
    no = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": 200_000, "content": content, **no, **flags}


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(
    "text",
    [
        _with(model={"continuing_subword_prefix": "##"}),  # merges that this cuts panic in Rust
        _with(model={"vocab": {}, "merges": [], "unk_token": "none"}),
        # Normalized to nothing, it is found everywhere: memory ends before the list does.
        _with(
            added_tokens=[_added("\r\n", normalized=True)],
            normalizer={"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": ""},
        ),
    ],
)
def test_a_file_on_which_tokenizers_fails_is_a_typed_error(text, fast):
    """A panic is no Exception, and what nobody catches ends a replica."""
    with pytest.raises(ModelDamagedError, match=r"tokenizer\.json"):
        PromptTokenizer(text, fast=fast)


@pytest.mark.parametrize("fast", [True, False])
def test_a_prompt_on_which_tokenizers_panics_is_a_typed_error(fast):
    """Two added tokens that strip into one another do it."""
    tokenizer = PromptTokenizer(
        _with(added_tokens=[_added(" ", rstrip=True), _added("\n", lstrip=True) | {"id": 200_001}]),
        fast=fast,
    )
    with pytest.raises(ModelDamagedError, match="bad split"):
        tokenizer.encode("x \n x", add_special_tokens=False)


def test_ids_beside_a_post_processor_of_any_kind_are_whole_when_taken_in_slices(monkeypatch):
    """Special tokens belong around the prompt, and what repeats a prompt repeats no slice."""
    monkeypatch.setattr(tokenization, "_SLICE_TOKENS", 3)
    part, bos = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "a", "type_id": 0}}
    for single in ([bos, part], [part, part], [bos, part, part], [bos]):
        post = {"type": "TemplateProcessing", "single": single, "pair": [part],
                "special_tokens": {"a": {"id": "a", "ids": [1], "tokens": ["a"]}}}  # fmt: skip
        text, prompt = _with(post_processor=post), "The quick <|im_start|> brown fox jumps"
        reference = tokenizers.Tokenizer.from_str(text)
        tokenizer = PromptTokenizer(text, fast=False)
        for special in (True, False):
            expected = reference.encode(prompt, add_special_tokens=special).ids
            assert tokenizer.encode(prompt, add_special_tokens=special).tolist() == expected


def test_a_post_processor_that_repeats_the_text_repeats_all_of_it():
    """It does so without special tokens too, and to the whole, not to each segment."""
    twice = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 2,
             "pair": [{"Sequence": {"id": part, "type_id": 0}} for part in "AB"],
             "special_tokens": {}}  # fmt: skip
    text, prompt = _with(post_processor=twice), "a<|im_start|>b<|im_end|>c"
    expected = tokenizers.Tokenizer.from_str(text).encode(prompt).ids
    for fast in (True, False):
        tokenizer = PromptTokenizer(text, fast=fast)
        for special in (True, False):
            assert tokenizer.encode(prompt, add_special_tokens=special).tolist() == expected


def test_conformance_takes_a_path_or_a_text():
    """Any set of cases can be run over it."""
    expected = _reference().encode("Hello <|im_end|>").ids
    assert conformance.encode(str(EMBEDDED), "Hello <|im_end|>") == expected
    assert conformance.encode(EMBEDDED.read_text(), "Hello <|im_end|>") == expected
    assert json.loads(EMBEDDED.read_text())["model"]["type"] == "BPE"
