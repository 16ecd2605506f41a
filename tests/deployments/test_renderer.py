"""The renderer honours or refuses what a request says, and foreign templates stay harmless."""

# ruff: noqa: E501 - a case is one line

import asyncio
import time
from datetime import datetime
from pathlib import Path

import pytest

from deployments.models import ModelStore
from deployments.renderer import Renderer
from deployments.sandbox import TemplateSandbox
from deployments.settings import ModelsSettings, RendererSettings
from kvcore.errors import (
    InvalidFieldError,
    InvalidInputError,
    ModelNotFoundError,
    ModelUnsupportedError,
    PromptTooLongError,
    RenderError,
    RenderLimitError,
    TemplateSyntaxError,
)

OFFLINE = ModelsSettings(use_hub=False, cache_dir="/nonexistent", fastokens=False)
USER = {"role": "user", "content": "hi"}


def _render(request, *, models=OFFLINE, **settings):
    async def run():
        renderer = Renderer(models, RendererSettings(**settings), now=lambda: datetime(2025, 1, 1))
        try:
            return await renderer.render(request)
        finally:
            renderer.close()

    return asyncio.run(run())


def _model(tmp_path, **files):
    (tmp_path / "tokenizer.json").write_text(
        '{"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", '
        '"vocab": {"a": 0}, "unk_token": "a"}}'
    )
    for name, text in files.items():
        (tmp_path / name.replace("__", ".")).write_text(text)
    return ModelsSettings(default="m", folders={"m": str(tmp_path)})


def test_the_embedded_model_renders_chatml():
    """What a first request meets on a machine without a hub."""
    call = {"type": "function", "id": "c", "function": {"name": "f", "arguments": '{"a": 1}'}}
    rendered = _render({
        "messages": [
            {"role": "developer", "content": "Be brief."}, USER,
            {"role": "assistant", "content": None, "reasoning": "hm", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "-3"}]},
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    })  # fmt: skip
    assert rendered.text == (
        "<|im_start|>system\nBe brief.\n\n# Tools\n\n"
        '{"type": "function", "function": {"name": "f", "description": null, "parameters": null}}'
        "<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\nhm\n</think>\n\n"
        '\n<tool_call>\n{"arguments": {"a": 1}, "name": "f"}\n</tool_call><|im_end|>\n'
        "<|im_start|>tool\n-3<|im_end|>\n<|im_start|>assistant\n"
    )
    assert rendered.model == OFFLINE.default
    assert rendered.add_special_tokens is False
    assert "stands in" in str(rendered.fallback_reason)


def test_the_models_own_template_and_tokens_are_used(tmp_path):
    """Only variables that the template uses reach it; the clock is the injected one."""
    models = _model(
        tmp_path,
        chat_template__jinja="{{ bos_token }}{{ x }}{{ strftime_now('%Y') }}{{ messages[0].content }}",
        tokenizer_config__json='{"bos_token": "<s>"}',
    )
    request = {"messages": [USER], "chat_template_kwargs": {"x": "X", "unused": 1}}
    assert _render(request, models=models).text == "<s>X2025hi"
    bos = {"messages": [USER], "chat_template_kwargs": {"bos_token": "B"}}
    assert _render(bos, models=models).text == "B2025hi"


def test_a_chat_for_an_engine_that_renders_otherwise_is_refused(tmp_path):
    """A wrong score would look like a right one."""
    models = _model(
        tmp_path,
        chat_template__jinja="{{ messages }}",
        config__json='{"architectures": ["GptOssForCausalLM"]}',
    )
    with pytest.raises(ModelUnsupportedError, match="harmony"):
        _render({"messages": [USER]}, models=models)


def test_a_model_without_a_template_is_refused(tmp_path):
    """Base models take prompts only."""
    with pytest.raises(RenderError, match="no chat template"):
        _render({"messages": [USER]}, models=_model(tmp_path))


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        ({"messages": [USER], "model": "other/model"}, ModelNotFoundError),
        ({"messages": [USER], "model": 5}, InvalidFieldError),
        ({"messages": 5}, InvalidFieldError),
        ({}, InvalidFieldError),
        ({"messages": [USER], "chat_template": "x"}, InvalidFieldError),
        ({"messages": [USER], "chat_template": 5}, InvalidFieldError),
        ({"messages": [USER] * 2049}, PromptTooLongError),
        ({"messages": [USER] * 100_000}, PromptTooLongError),
        ({"messages": [{"role": "user", "content": "x" * 10_000_000}]}, PromptTooLongError),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 5_000_000}]}]},
         PromptTooLongError),
        ({"messages": [USER], "tools": [{"function": {"name": "x" * 5_000_000}}]}, PromptTooLongError),
    ],
)  # fmt: skip
def test_what_is_too_much_or_not_allowed_is_refused_first(request_, error):
    """Before any work that a client could make us do."""
    with pytest.raises(error):
        _render(request_)


def test_a_long_chat_renders_the_same_off_the_event_loop():
    """Up to the limits; a heartbeat shows that the loop goes on meanwhile."""
    messages = [{"role": "user", "content": f"{at} " * 50} for at in range(2000)]

    async def run():
        renderer = Renderer(OFFLINE)
        await renderer.warm()
        beats, done = 0, asyncio.Event()

        async def beat():
            nonlocal beats
            while not done.is_set():
                await asyncio.sleep(0)
                beats += 1

        heart = asyncio.create_task(beat())
        rendered = await renderer.render({"messages": messages})
        done.set()
        await heart
        return rendered.text, beats

    text, beats = asyncio.run(run())
    assert text.count("<|im_start|>") == 2001
    assert beats > 2


def test_a_renderer_and_a_tokenizer_can_share_models():
    """One load and one copy in memory, where both are in one process."""

    async def run():
        store = ModelStore(OFFLINE)
        await Renderer(OFFLINE, store=store).warm()
        return list(store.known().values())

    assert asyncio.run(run())[0] is not None


# --- templates that come with a request ---------------------------------------------

TRUSTING = {"trust_request_chat_template": True, "request_template_timeout_s": 1.0}


def test_an_allowed_template_renders_as_the_models_own_would():
    """As vLLM's --trust-request-chat-template."""
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ strftime_now('%Y') }}{{ x }}"
    request = {"messages": [{"role": "developer", "content": "é"}, USER], "chat_template": template,
               "chat_template_kwargs": {"x": [1]}}  # fmt: skip
    assert _render(request, **TRUSTING).text == "[system]é[user]hi2025[1]"


def test_an_empty_template_is_none(tmp_path):
    """VLLM takes the model's then, where requests may bring one at all."""
    models = _model(tmp_path, chat_template__jinja="own")
    request = {"messages": [USER], "chat_template": ""}
    assert _render(request, models=models, **TRUSTING).text == "own"
    with pytest.raises(InvalidFieldError, match="chat_template"):
        _render(request, models=models)


def test_a_template_smuggled_in_the_kwargs_is_refused_even_then():
    """It would not be the one that was checked."""
    request = {"messages": [USER], "chat_template_kwargs": {"chat_template": "x"}}
    with pytest.raises(InvalidFieldError, match="chat_template"):
        _render(request, **TRUSTING)


HOSTILE = [
    ("{{ messages|tojson(indent=100000000) }}", RenderLimitError),
    ("{{ 'a' * 200000000 }}", RenderLimitError),
    ("{{ 9 ** 9999999 }}", RenderLimitError),
    ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", RenderLimitError),
    ("{% set n = namespace(x='a') %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}", RenderLimitError),
    ("{{ [1] * 100000000 }}", RenderLimitError),
    ("{{ 'x' * 5000000 }}", PromptTooLongError),
    ("{{ ''.__class__.__mro__ }}", RenderError),
    ("{{ cycler.__init__.__globals__.os }}", RenderError),
    ("{{ '%1000000000d' % 1 }}", RenderLimitError),
    ("{{ raise_exception('said so') }}", RenderError),
    ("{{ messages.append(1) }}", RenderError),
    ("{% include '/etc/passwd' %}", RenderError),
    ("{{" + "(" * 3000 + "1" + ")" * 3000 + "}}", TemplateSyntaxError),
    ("{% for a in b %}" * 100 + "{% endfor %}" * 100, TemplateSyntaxError),
    ("{{", TemplateSyntaxError),
]  # fmt: skip


@pytest.mark.parametrize(("template", "error"), HOSTILE)
def test_a_hostile_template_is_an_error_within_its_limits(template, error):
    """Each of these burnt seconds or gigabytes in some server; none hurts the next request."""

    async def run():
        renderer = Renderer(OFFLINE, RendererSettings(**TRUSTING))
        started = time.monotonic()
        with pytest.raises(InvalidInputError) as caught:
            await renderer.render({"messages": [USER], "chat_template": template})
        took_s = time.monotonic() - started
        after = await renderer.render({"messages": [USER], "chat_template": "fine"})
        renderer.close()
        return caught.value, took_s, after.text

    caught, took_s, after = asyncio.run(run())
    assert type(caught) is error, caught
    assert after == "fine"
    assert took_s < 20  # the limit is 1 s; a slow machine starts Python slowly


def test_templates_wait_in_a_line_that_ends():
    """A flood of them is refused, instead of queued without end."""

    async def run():
        renderer = Renderer(OFFLINE, RendererSettings(**TRUSTING))
        await renderer.warm()
        request = {"messages": [USER], "chat_template": "ok"}
        results = await asyncio.gather(
            *(renderer.render(request) for _ in range(20)), return_exceptions=True
        )
        renderer.close()
        return results

    results = asyncio.run(run())
    refused = [result for result in results if isinstance(result, RenderLimitError)]
    assert len(refused) == 4
    assert len(results) - len(refused) == 16


def test_a_client_that_goes_away_leaves_no_disorder():
    """Its render ends by its own limits, and the next one waits for that."""

    async def run():
        renderer = Renderer(OFFLINE, RendererSettings(**TRUSTING))
        await renderer.warm()
        hostile = {"messages": [USER], "chat_template": "{{ 9 ** 9999999 }}"}
        gone = [asyncio.create_task(renderer.render(hostile)) for _ in range(2)]
        while renderer._sandbox._n_waiting < 2:  # noqa: ASYNC110 - it has no event for this
            await asyncio.sleep(0)
        for task in gone:
            task.cancel()
        rendered = await renderer.render({"messages": [USER], "chat_template": "ok"})
        renderer.close()
        return rendered.text, [task.cancelled() for task in gone]

    assert asyncio.run(run()) == ("ok", [True, True])


def test_the_limited_process_knows_no_secrets(monkeypatch):
    """Should a template break out of Jinja's sandbox, it finds an empty environment."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    sandbox = TemplateSandbox(RendererSettings(**TRUSTING))
    process = sandbox._start()
    try:
        environment = b""
        while not environment and process.poll() is None:  # empty until the program is loaded
            environment = Path(f"/proc/{process.pid}/environ").read_bytes()
    finally:
        process.kill()
        process.communicate()
    assert b"hf_secret" not in environment
    assert b"PYTHONPATH" in environment
