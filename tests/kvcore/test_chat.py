"""A chat request becomes the template's input as in vLLM 0.33, or is refused by name."""

# ruff: noqa: E501 - a case is one line

import json
from contextlib import suppress
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcore.chat import ChatOptions, render_request
from kvcore.chat_fields import check_fields
from kvcore.errors import InvalidFieldError, InvalidInputError
from kvcore.templates import ChatTemplate
from tests.conformance import compiled
from tests.conformance_data import chat_samples

NOW = datetime(2025, 3, 14, 15, 9, 26)  # what the recording froze the clock at
USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f"}}
CHATML = ChatTemplate(
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if tools %}{{ tools|tojson }}{% endif %}{% if flag %}!{% endif %}"
)


def _render(request, template=CHATML, **options):
    check_fields(request)
    return render_request(template, request, {}, ChatOptions(**options), NOW)[0]


def _chat(*messages, **fields):
    return {"messages": list(messages), **fields}


def test_requests_render_as_in_vllm():
    """Recorded from vLLM's own request validation, preparation and renderer."""
    samples = chat_samples()
    failed = []
    for case in samples["chats"]:
        sample = samples["templates"][case["template"]]
        template = compiled(sample["text"])
        options = ChatOptions(template_variables=case["defaults"] or {})
        try:
            check_fields(case["request"])
            got = render_request(template, case["request"], sample["special_tokens"], options, NOW)[
                0
            ]
        except InvalidInputError:
            got = None
        if got != case.get("expected"):
            failed.append((case["template"], case["name"]))
    assert not failed
    assert len(samples["chats"]) == 324


def test_tool_calls_are_written_in_the_order_of_openais_schema():
    """Templates write calls out as JSON; vLLM's validation has put the known fields first."""
    template = ChatTemplate("{% for m in messages %}{{ m.tool_calls|tojson }}{% endfor %}")
    call = {"index": 0, "type": "function", "id": "c1",
            "function": {"name": "f", "x": 1, "arguments": '{"b": 1, "a": 2}'}}  # fmt: skip
    assert _render(_chat({"role": "assistant", "tool_calls": [call]}), template) == (
        '[{"id": "c1", "function": {"arguments": {"b": 1, "a": 2}, "name": "f", "x": 1}, '
        '"type": "function", "index": 0}]'
    )


@pytest.mark.parametrize("arguments", ["", "{", "[1]", "42", "null", None])
def test_bad_arguments_in_the_history_become_an_empty_object(arguments):
    """One bad call must not make every later turn fail."""
    template = ChatTemplate(
        "{% for m in messages %}{{ m.tool_calls[0].function.arguments|tojson }}{% endfor %}"
    )
    call = {"type": "function", "id": "c1", "function": {"name": "f", "arguments": arguments}}
    assert _render(_chat({"role": "assistant", "tool_calls": [call]}), template) == "{}"


PARTS = ChatTemplate(
    "{% for m in messages %}{% for part in m.content %}{% endfor %}{% endfor %}{{ messages|tojson }}"
)


@pytest.mark.parametrize(
    ("role", "content", "expected"),
    [
        ("user", ["a", {"type": "text", "text": "b"}], [("text", "a"), ("text", "b")]),
        ("critic", ["a"], [("text", "a")]),
        ("system", ["x-anthropic-billing-header: 1\nb", {"type": "text", "text": "c"}],
         [("text", "b"), ("text", "c")]),
        ("system", [{"type": "refusal", "refusal": "x-anthropic-billing-header: 1"}],
         [("text", "x-anthropic-billing-header: 1")]),
    ],
)  # fmt: skip
def test_strings_among_parts_are_text(role, content, expected):
    """VLLM takes them, though not as the only parts of a message that fits OpenAI's schema."""
    rendered = json.loads(_render(_chat({"role": role, "content": content}), PARTS))
    assert [(part["type"], part["text"]) for part in rendered[0]["content"]] == expected


def test_a_message_beyond_openais_schema_may_hold_strings_alone():
    """VLLM checks it by a schema of its own, which allows them."""
    message = {"role": "assistant", "content": ["a"], "reasoning": "r"}
    assert json.loads(_render(_chat(message), PARTS))[0]["content"] == [
        {"type": "text", "text": "a"}
    ]


def test_a_text_part_keeps_only_fields_of_no_other_part():
    """Else ``cache_control`` were lost, or an ``image_url`` written out as text."""
    part = {"type": "text", "text": "a", "image_url": "x", "file": {}, "data": "d", "detail": "low"}
    rendered = json.loads(_render(_chat({"role": "user", "content": [part]}), PARTS))
    assert rendered[0]["content"] == [{"type": "text", "text": "a", "detail": "low"}]


@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        ([{"z": 1, "type": "function", "function": {"q": 1, "strict": None, "parameters": {}, "name": "f"}}],
         '[{"function": {"name": "f", "parameters": {}, "strict": null, "q": 1}, "type": "function", "z": 1}]'),
        ([{"function": {"description": "d", "name": "f"}}], '[{"function": {"description": "d", "name": "f"}}]'),
        (["f"], '["f"]'),
    ],
)  # fmt: skip
def test_a_developers_tools_are_in_the_order_of_openais_schema(tools, expected):
    """Where they follow it; what does not passes through vLLM as it is."""
    template = ChatTemplate("{# 'developer' #}{{ messages[0].tools|tojson }}")
    message = {"role": "developer", "content": "d", "tools": tools}
    assert _render(_chat(message), template) == expected


def test_reasoning_is_named_thinking_where_the_engines_transformers_does_so():
    """No vLLM up to 0.33 allows that version, so templates of LFM2.5 show no reasoning there."""
    template = ChatTemplate("{% for m in messages %}{{ m|tojson }}{% endfor %}")
    chat = _chat(
        {"role": "assistant", "content": "a", "reasoning": "r"},
        {"role": "tool", "content": "c", "tool_call_id": None},
    )
    assert _render(chat, template) == (
        '{"role": "assistant", "content": "a", "reasoning": "r", "reasoning_content": "r"}'
        '{"role": "tool", "content": "c", "tool_call_id": null}'
    )
    assert _render(chat, template, transformers_5_21=True) == (
        '{"thinking": "r", "role": "assistant", "content": "a", "reasoning": "r", '
        '"reasoning_content": "r"}{"role": "tool", "content": "c"}'
    )


def test_engine_defaults_give_way_to_the_request():
    """As --default-chat-template-kwargs; null in a request means: not set."""
    flag = {"flag": True}
    assert _render(_chat(USER), template_variables=flag) == "<user>hi!"
    own = {"chat_template_kwargs": {"flag": False}}
    assert _render(_chat(USER, **own), template_variables=flag) == "<user>hi"
    unset = {"chat_template_kwargs": {"flag": None}}
    assert _render(_chat(USER, **unset), template_variables=flag) == "<user>hi!"


def test_tools_stay_away_where_the_engine_leaves_them_out():
    """As --exclude-tools-when-tool-choice-none."""
    request = _chat(USER, tools=[TOOL], tool_choice="none")
    assert "f" in _render(request)
    assert _render(request, exclude_tools_when_none=True) == "<user>hi"


@pytest.mark.parametrize(
    ("param", "request_"),
    [
        ("messages", {}),
        ("messages", {"messages": []}),
        ("messages", {"messages": "hi"}),
        ("messages[0]", _chat("hi")),
        ("messages[0].role", _chat({"content": "hi"})),
        ("messages[0].name", _chat({**USER, "name": 5})),
        ("messages[0].name", _chat({**USER, "name": None})),
        ("messages[0].tool_call_id", _chat({"role": "tool", "content": "x", "tool_call_id": 5})),
        ("messages[1].content", _chat(USER, {"role": "user", "content": 5})),
        ("messages[0].content", _chat({"role": "user", "content": None})),
        ("messages[0].content[0].name", _chat({"role": "user", "content": [{"type": "tool_reference", "name": {}}]})),
        ("messages[0].content[0].uuid", _chat({"role": "user", "content": [{"type": "text", "text": "a", "uuid": "u"}]})),
        ("messages[0].content[0]", _chat({"role": "user", "content": ["hi"]})),
        ("messages[0].content[1].type", _chat({"role": "user", "content": [
            {"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]})),
        ("messages[0].content[0].type", _chat({"role": "user", "content": [{"type": "input_audio"}]})),
        ("messages[0].content[0].text", _chat({"role": "user", "content": [{"type": "text", "text": 5}]})),
        ("messages[0].audio", _chat({"role": "assistant", "audio": {"id": "a"}})),
        ("messages[0].function_call", _chat({"role": "assistant", "function_call": {"name": "f"}})),
        ("messages[0].reasoning", _chat({"role": "assistant", "reasoning": 5})),
        ("messages[0].tool_calls", _chat({"role": "assistant", "tool_calls": {"a": 1}})),
        ("messages[0].tool_calls[0]", _chat({"role": "assistant", "tool_calls": [{"type": "custom"}]})),
        ("messages[0].tool_calls[0].function.arguments", _chat({"role": "assistant", "tool_calls": [
            {"function": {"name": "f", "arguments": "[" * 100_000}}]})),
        ("tools", _chat(USER, tools=[])),
        ("tools", _chat(USER, tools={"a": 1})),
        ("tools[1]", _chat(USER, tools=[TOOL, {"type": "custom"}])),
        ("tools[0].function.name", _chat(USER, tools=[{"function": {}}])),
        ("tools[0].function.parameters", _chat(USER, tools=[{"function": {"name": "f", "parameters": []}}])),
        ("tool_choice", _chat(USER, tool_choice="auto")),
        ("tool_choice", _chat(USER, tools=[TOOL], tool_choice="g")),
        ("tool_choice", _chat(USER, tools=[TOOL], tool_choice={"function": {"name": "g"}})),
        ("tool_choice", _chat(USER, tools=[TOOL], tool_choice={"type": "custom", "function": {"name": "f"}})),
        ("tools[0].defer_loading", _chat(USER, tools=[{**TOOL, "defer_loading": "yes"}])),
        ("tools[0].function.defer_loading", _chat(USER, tools=[{"function": {"name": "f", "defer_loading": 1}}])),
        ("documents", _chat(USER, documents=["x"])),
        ("documents", _chat(USER, documents=[{"text": 5}])),
        ("documents", _chat(USER, chat_template_kwargs={"documents": {"text": "x"}})),
        ("reasoning_effort", _chat(USER, reasoning_effort="extreme")),
        ("add_generation_prompt", _chat(USER, add_generation_prompt="yes")),
        ("add_generation_prompt", _chat(USER, add_generation_prompt=None)),
        ("continue_final_message", _chat(USER, continue_final_message=True, add_generation_prompt=True)),
        ("cache_salt", _chat(USER, cache_salt="")),
        ("cache_salt", _chat(USER, cache_salt=5)),
        ("chat_template_kwargs", _chat(USER, chat_template_kwargs=[1])),
        ("chat_template_kwargs", _chat(USER, chat_template_kwargs=[])),
        ("chat_template_kwargs.tokenize", _chat(USER, chat_template_kwargs={"tokenize": True})),
        ("chat_template_kwargs.messages", _chat(USER, chat_template_kwargs={"messages": []})),
        ("chat_template_kwargs.tools", _chat(USER, chat_template_kwargs={"tools": []})),
        ("chat_template_kwargs.chat_template", _chat(USER, chat_template_kwargs={"chat_template": "x"})),
        ("chat_template_kwargs.__class__", _chat(USER, chat_template_kwargs={"__class__": 1})),
        ("truncate_prompt_tokens", _chat(USER, truncate_prompt_tokens=5)),
        ("functions", _chat(USER, functions=[])),
        ("promt_style", _chat(USER, promt_style="x")),
        ("kv_transfer_params.prompt_token_ids", _chat(USER, kv_transfer_params={"prompt_token_ids": [1]})),
        ("messages[1].content", _chat(USER, {"role": "user", "content": "a\ud800"})),
        ("messages[0].content[0].text", _chat({"role": "user", "content": [{"type": "text", "text": "\udfff"}]})),
        ("tools[0].function.description", _chat(USER, tools=[{"function": {"name": "f", "description": "\ud83d"}}])),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(param, request_):
    """A request that is quietly rendered otherwise than by the engine scores wrongly."""
    template = ChatTemplate(
        "{% for m in messages %}{{ m.content }}{% endfor %}{{ tools|tojson }}{{ enable_thinking }}"
    )
    with pytest.raises(InvalidFieldError) as caught:
        _render(request_, template)
    assert caught.value.param == param


def test_sampling_fields_are_accepted():
    """They cannot change the prompt, and a client sends them to be passed on."""
    fields = {"temperature": 0.5, "stream": True, "n": 2, "seed": 1, "stop": ["x"], "user": "u",
              "response_format": {"type": "json_object"}, "unheard_of": None, "mm_payload": "none",
              "return_token_strs": True, "cache_salt": "s"}  # fmt: skip
    assert _render(_chat(USER, **fields)) == "<user>hi"


def test_preparing_leaves_the_request_alone():
    """It is passed on to the engine afterwards."""
    request = _chat(
        {"role": "developer", "content": "d", "tools": [TOOL]},
        {"role": "assistant", "reasoning_content": "r",
         "tool_calls": [{"type": "function", "id": "1", "function": {"name": "f", "arguments": "{}"}}]},
        tools=[TOOL], chat_template_kwargs={"flag": True}, reasoning_effort="low",
    )  # fmt: skip
    before = json.dumps(request)
    _render(request)
    assert json.dumps(request) == before


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "content", "type", "text", "tool_calls", "function", "name",
                         "arguments", "reasoning", "tools"]), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(st.lists(_JSON, max_size=3), _JSON, _JSON)
def test_any_json_renders_or_is_a_typed_error(messages, tools, kwargs):
    """Whatever a client sends, it never looks like a failure of ours."""
    roles = ("user", "assistant", "tool", "system", "developer")
    chat = [
        {"role": roles[at % 5], **m} if isinstance(m, dict) else m for at, m in enumerate(messages)
    ]
    with suppress(InvalidInputError):
        _render({"messages": chat, "tools": tools, "chat_template_kwargs": kwargs})
