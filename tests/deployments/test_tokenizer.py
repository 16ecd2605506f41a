"""The tokenizer answers with arrays, refuses what is too long, and never blocks its loop."""

import asyncio
import pickle

import numpy as np
import pytest

from deployments.settings import ModelsSettings, TokenizerSettings
from deployments.tokenizer import Tokenizer
from kvcore.errors import InvalidInputError, ModelNotFoundError, PromptTooLongError

OFFLINE = ModelsSettings(use_hub=False, cache_dir="/nonexistent")


def _encode(text, *, model=None, models=OFFLINE, special=False, **settings):
    async def run():
        tokenizer = Tokenizer(models, TokenizerSettings(**settings))
        return await tokenizer.encode(model, text, add_special_tokens=special)

    return asyncio.run(run())


@pytest.mark.parametrize("fastokens", [True, False])
def test_short_and_long_prompts_get_the_same_ids(fastokens):
    """One is encoded on the event loop, the other in a thread."""
    models = OFFLINE.model_copy(update={"fastokens": fastokens})
    text = "The quick brown fox. " * 2000
    inline = _encode(text, models=models, inline_chars=1_000_000)
    threaded = _encode(text, models=models, inline_chars=0)
    assert np.array_equal(inline.tokens, threaded.tokens)
    assert inline.tokens.dtype == np.uint32


def test_answers_are_cheap_to_send():
    """A deployment's answer is pickled: four bytes a token and a little."""
    encoded = _encode("word " * 10_000)
    assert len(pickle.dumps(encoded)) < 4 * len(encoded.tokens) + 1000
    assert "stands in" in str(encoded.fallback_reason)


def test_a_prompt_over_the_limit_is_refused_before_any_model_is_asked_for():
    """A client must not make us load or tokenize for a prompt that no engine takes."""
    with pytest.raises(PromptTooLongError, match="4,194,305 characters, the limit is 4,194,304"):
        _encode("x" * (4 * 1024 * 1024 + 1), model="no/such")


def test_unknown_models_and_bad_text_are_typed_errors():
    """They become 404 and 400."""
    with pytest.raises(ModelNotFoundError):
        _encode("x", model="no/such")
    with pytest.raises(InvalidInputError, match="character 1"):
        _encode("x\ud800")


@pytest.mark.parametrize("fastokens", [True, False])
def test_the_event_loop_goes_on_while_a_megabyte_is_tokenized(fastokens):
    """Other requests are served meanwhile; how well is measured in tests/bench."""
    models = OFFLINE.model_copy(update={"fastokens": fastokens})
    text = " ".join(f"word{at % 977}x{at}" for at in range(90_000))

    async def run():
        tokenizer = Tokenizer(models)
        await tokenizer.warm()
        beats, done = 0, asyncio.Event()

        async def beat():
            nonlocal beats
            while not done.is_set():
                await asyncio.sleep(0)
                beats += 1

        heart = asyncio.create_task(beat())
        encoded = await tokenizer.encode(None, text, add_special_tokens=False)
        done.set()
        await heart
        return len(encoded.tokens), beats

    n_tokens, beats = asyncio.run(run())
    assert n_tokens > 300_000
    assert beats > 20


def test_status_names_each_model_and_its_fallback():
    """For /ready and /v1/models."""

    async def run():
        tokenizer = Tokenizer(OFFLINE.model_copy(update={"allowed": ("a/b",)}))
        before = await tokenizer.loaded()
        return before, await tokenizer.warm(), await tokenizer.loaded()

    before, statuses, loaded = asyncio.run(run())
    assert before == []
    assert [(status.name, status.is_loaded) for status in statuses] == [
        (OFFLINE.default, True), ("a/b", False),
    ]  # fmt: skip
    assert [status.name for status in loaded] == [OFFLINE.default]
    assert loaded[0].source == "embedded"
    assert loaded[0].size_bytes > 1 << 20
