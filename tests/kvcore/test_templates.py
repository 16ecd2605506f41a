"""Rendering equals transformers 5.23, byte for byte, and stays inside Jinja's sandbox."""

# ruff: noqa: E501 - a case is one line

import json
import threading
from datetime import datetime

import pytest

from kvcore.errors import RenderError, TemplateSyntaxError
from kvcore.templates import (
    ChatTemplate,
    choose_template,
    collect_special_tokens,
    collect_templates,
)
from tests import conformance
from tests.conformance_data import chat_samples, full_set, full_template, selection_samples

NOW = datetime(2025, 3, 14, 15, 9, 26)  # what the recordings froze the clock at
HI = [{"role": "user", "content": "hi"}]


def _outcome(case, text):
    arguments = ("messages", "tools", "documents", "special_tokens", "kwargs",
                 "add_generation_prompt", "continue_final_message")  # fmt: skip
    try:
        values = {name: case[name] for name in arguments}
        return {"expected": conformance.render(text, **values, frozen_now=case.get("frozen_now"))}
    except RenderError as error:
        return {"error": str(error)}


def _differs(case, text):
    """Whether a case fails; errors of Jinja and Python need not say the same."""
    got = _outcome(case, text)
    if "expected" in case:
        return got != {"expected": case["expected"]}
    if case["error"]["kind"] in ("raise_exception", "transformers"):
        return got != {"error": case["error"]["message"]}
    return "error" not in got


def test_renders_the_recorded_chats_as_transformers_does():
    """One byte off and the prompt's blocks are never found."""
    samples = chat_samples()
    failed = [
        case["id"]
        for case in samples["cases"]
        if _differs(case, samples["templates"][case["template"]]["text"])
    ]
    assert not failed
    assert len(samples["cases"]) == 360


def test_renders_the_full_set_as_transformers_does():
    """The same for 90 templates of 28 families."""
    failed = [
        case["id"]
        for case in full_set("cases.jsonl.gz")
        if _differs(case, full_template(case["template"]))
    ]
    assert not failed


def test_assistant_spans_are_those_of_transformers():
    """Values stay as given here, None included; the spans cover what the assistant wrote."""
    samples = chat_samples()
    for case in samples["assistant_spans"]:
        _check_spans(case, samples["templates"][case["template"]]["text"])


def test_assistant_spans_of_the_full_set_are_those_of_transformers():
    """The same for all templates, with and without a generation block."""
    for case in full_set("render_jinja_template_cases.jsonl.gz"):
        _check_spans(case, full_template(case["template"]))


def _check_spans(case, text):
    spans = [] if case["return_assistant_tokens_mask"] else None
    arguments = {
        "tools": case["tools"], "documents": case["documents"],
        "variables": case["template_kwargs"], "now": NOW, "spans": spans,
        "add_generation_prompt": case["add_generation_prompt"],
        "continue_final_message": case["continue_final_message"],
    }  # fmt: skip
    template = conformance.compiled(text)
    if "error" in case:
        with pytest.raises(RenderError):
            template.render_as_given(case["messages"], **arguments)
        return
    assert [template.render_as_given(case["messages"], **arguments)] == case["rendered_chats"]
    if spans is not None:
        assert [[list(span) for span in spans]] == case["generation_indices"], case["id"]


def test_follows_transformers_5_23_where_versions_differ():
    """Engines on transformers 4.57 to 5.20 render two kinds of chats otherwise.

    They keep message keys whose value is None (vLLM's own preparation leaves none), and
    hand a message's reasoning to templates only under the name it came by, so templates
    that read ``thinking`` miss a ``reasoning_content``.
    """
    rows = full_set("version_sensitive.jsonl")
    ids = {row["id"] for row in rows}
    current = {case["id"]: case for case in full_set("cases.jsonl.gz") if case["id"] in ids}
    for row in rows:
        case = current[row["id"]]
        assert not _differs(case, full_template(case["template"]))
        assert row.get("expected") != case.get("expected"), f"{row['id']} does not differ"
        has_none = any(None in message.values() for message in case["messages"])
        has_reasoning = any("reasoning_content" in message for message in case["messages"])
        assert has_none or has_reasoning


def test_content_format_and_variables_are_what_vllm_finds():
    """A string where the template loops over parts renders one letter per part."""
    for file, sample in chat_samples()["templates"].items():
        template = ChatTemplate(sample["text"])
        assert template.content_format == sample["content_format"], file
        assert template.variables == set(sample["undeclared"]) - {"raise_exception"}, file


def test_content_formats_of_the_full_set_are_what_vllm_finds():
    """All 90 templates, through aliases, slices, filters, namespaces and macros."""
    for entry in full_set("templates.json"):
        template = conformance.compiled(full_template(entry["file"]))
        assert template.content_format == entry["content_format"], entry["file"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}", "openai"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "string"),
        ("{% set x = messages[1:] %}{% for m in x %}{% for c in m['content'] %}{% endfor %}{% endfor %}", "openai"),
        ("{% set ns = namespace(r=messages) %}{% for m in ns.r %}{% for c in m.content %}{% endfor %}{% endfor %}", "openai"),
        ("{% macro f(x) %}{% for c in x %}{% endfor %}{% endmacro %}{% for m in messages %}{{ f(m.content) }}{% endfor %}", "openai"),
        ("{% macro f(x) %}{% for c in x %}{% endfor %}{% endmacro %}{% for m in messages %}{{ f(m.role) }}{% endfor %}", "string"),
        ("{% for m in messages %}{% set content = m.content %}{% for c in content %}{% endfor %}{% endfor %}", "openai"),
        ("{% for a, b in messages %}{% for c in a.content %}{% endfor %}{% endfor %}", "string"),
        ("{% set a = messages %}{% set b = a %}{% set a = b %}{% for m in b %}{% for c in m.content %}{% endfor %}{% endfor %}", "openai"),
    ],
)  # fmt: skip
def test_content_format_follows_names(text, expected):
    """The ways that templates pass messages and content along; cycles end."""
    assert ChatTemplate(text).content_format == expected


def test_selection_takes_the_template_that_transformers_takes():
    """By files, by tools and by name; a wrong choice renders another model's prompt."""
    samples = selection_samples()
    for case in samples["cases"]:
        files = samples["fixtures"][case["fixture"]]
        config = json.loads(files["tokenizer_config.json"])
        additional = {
            name.rpartition("/")[2].removesuffix(".jinja"): text
            for name, text in files.items()
            if name.startswith("additional_chat_templates/")
        }
        templates = collect_templates(config, files.get("chat_template.jinja"), additional)
        tokens = collect_special_tokens(config)
        assert tokens == case["special_tokens_map"]

        def render(templates=templates, tokens=tokens, case=case):
            text = choose_template(templates, named=case["chat_template_arg"], tools=case["tools"])
            return ChatTemplate(text).render(HI, tools=case["tools"], variables=tokens, now=NOW)

        if "error" in case:
            with pytest.raises(RenderError):
                render()
        else:
            assert render() == case["expected"], case


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__ }}{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{{ messages[0]['__class__'] }}{{ messages[0].__class__.mro() }}",
        "{{ '{0.__class__.mro}'.format('')[0] }}{{ '{0.__class__}'.format(1) }}{{ ''|attr('__class__') }}{{ (''|attr('__class__')).mro() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ strftime_now.__self__ }}{{ strftime_now.__self__.x }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ dict.__call__ }}{{ dict.__call__.x }}",
        "{{ self.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}{{ raise_exception.__globals__.x }}",
        "{% set ns = namespace(f=''.format) %}{{ ns.f.__self__.__class__.x }}",
        "{{ ({}|attr('__class__')).x }}",
        "{{ messages.__getitem__(0) }}",
        "{% for x in range(999999) %}{% endfor %}",
        "{{ raise_exception('no') }}",
        "{{ missing.attribute }}",
        "{{ messages|tojson(indent={}.x.y) }}",
    ],
)  # fmt: skip
def test_sandbox_holds(text):
    """The short ways through the sandbox must not be ways out of it."""
    with pytest.raises(RenderError):
        ChatTemplate(text).render(HI, now=NOW)


def test_short_ways_read_what_the_sandbox_reads():
    """Keys that are also methods, missing keys and plain methods behave as in Jinja."""
    template = ChatTemplate(
        "{{ m.items is callable }} {{ m['items'] }} {{ m.none is none }} {{ m.missing is defined }}"
        " {{ m['missing'] is defined }} {{ m.get('a') }} {{ m.s.upper() }} {{ m.l.index(2) }}"
        " {% set ns = namespace(a=m, f='{}'.format) %}{{ ns.a.a }} {{ ns.f(1) }} {{ ns.zz is defined }}"
        " {% for k, v in m.items() %}{{ k }}{% endfor %} {{ m.s.format is callable }}"
    )
    m = {"items": 1, "none": None, "a": 2, "s": "x", "l": [1, 2]}
    assert template.render(HI, variables={"m": m}, now=NOW) == (
        "True 1 True False False 2 X 1 2 1 False itemsnoneasl True"
    )


@pytest.mark.parametrize("text", ["{{", "{% for %}", "{{ x|nofilter }}", "{% generation %}"])
def test_a_broken_template_is_a_typed_error(text):
    """A model with one is refused when it is loaded, with a reason."""
    with pytest.raises(TemplateSyntaxError, match="does not compile"):
        ChatTemplate(text)


def test_rendering_leaves_the_messages_alone():
    """The same request is rendered, scored and passed on to an engine."""
    messages = [*HI, {"role": "assistant", "content": [{"type": "text", "text": "so "}]}]
    before = json.dumps(messages)
    text = ChatTemplate(
        "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}"
    ).render(messages, continue_final_message=True, now=NOW)
    assert text == "so "
    assert json.dumps(messages) == before


def test_threads_may_share_a_template():
    """Long renders run in threads beside those on the event loop."""
    template = ChatTemplate(
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    failures = []

    def work(name):
        messages = [{"role": "user", "content": name}] * 50
        for _ in range(50):
            spans = []
            text = template.render_as_given(messages, now=NOW, spans=spans)
            if text != name * 50 or len(spans) != 50:
                failures.append(text)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("ab", "cde")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_special_tokens_are_texts_and_only_those_that_are_set():
    """To a template an unset token is undefined, not None."""
    config = {"bos_token": {"content": "<s>"}, "eos_token": None, "image_token": "<i>",
              "add_bos_token": True, "unk_token": "<u>"}  # fmt: skip
    assert collect_special_tokens(config, {"eos_token": "</s>"}) == {
        "bos_token": "<s>", "image_token": "<i>", "unk_token": "<u>", "eos_token": "</s>",
    }  # fmt: skip
    listed = {**config, "added_tokens_decoder": {}}
    assert "eos_token" not in collect_special_tokens(listed, {"eos_token": "</s>"})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"tokenizer_class": "GPT2Tokenizer"}, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}),
        ({"tokenizer_class": "LlamaTokenizerFast", "eos_token": "</e>"}, {"bos_token": "<s>", "eos_token": "</e>"}),
        ({"tokenizer_class": "GemmaTokenizer", "bos_token": None, "eos_token": None}, {}),
        ({"tokenizer_class": "Qwen2Tokenizer"}, {"eos_token": "<|endoftext|>"}),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, {}),
    ],
)  # fmt: skip
def test_a_class_has_its_own_tokens_where_the_config_is_silent(config, expected):
    """As read from AutoTokenizer of transformers 5.19; a template that writes BOS is off by one else."""
    assert collect_special_tokens(config) == expected
