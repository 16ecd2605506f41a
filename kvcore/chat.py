"""From an OpenAI chat request to what the template gets, as vLLM 0.33 prepares it.

Whatever can change the prompt is honoured or refused by name: a score for another
prompt than the engine's would be wrong without a sign.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvcore.content_format import ContentFormat
from kvcore.errors import InvalidFieldError

Json = Any
"""A value as ``json.loads`` gives it."""


@dataclass(frozen=True)
class PreparedChat:
    """What a chat template is rendered with."""

    messages: list[dict[str, Json]]
    tools: list[dict[str, Json]] | None
    documents: list[dict[str, Json]] | None
    variables: dict[str, Json]  # for the template, unfiltered
    add_generation_prompt: bool
    continue_final_message: bool
    add_special_tokens: bool


# Fields that shape the prompt; all others below do not.
_PROMPT_FIELDS = frozenset({
    "messages", "model", "tools", "tool_choice", "reasoning_effort", "documents",
    "chat_template", "chat_template_kwargs", "add_generation_prompt", "continue_final_message",
    "add_special_tokens", "cache_salt",
})  # fmt: skip
# What sampling, streaming, accounting and transport need; the prompt is the same without.
_OTHER_FIELDS = frozenset({
    "allowed_token_ids", "audio", "bad_words", "best_of", "bootstrap_host", "bootstrap_port",
    "bootstrap_room", "data_parallel_rank", "echo", "ec_transfer_params", "frequency_penalty",
    "guided_choice", "guided_decoding_backend", "guided_grammar", "guided_json",
    "guided_regex", "guided_whitespace_pattern", "ignore_eos", "include_reasoning",
    "include_stop_str_in_output", "kv_transfer_params", "length_penalty", "logit_bias",
    "logits_processors", "logprob_token_ids", "logprobs", "max_completion_tokens", "max_tokens",
    "media_io_kwargs", "metadata", "min_p", "min_tokens", "mm_processor_kwargs", "modalities",
    "n", "parallel_tool_calls", "prediction", "presence_penalty", "priority", "prompt_cache_key",
    "prompt_cache_retention", "prompt_logprobs", "repetition_detection", "repetition_penalty",
    "request_id", "response_format", "return_mm_kwargs", "return_prompt_text",
    "return_token_ids", "return_token_offsets", "return_tokens_as_token_ids",
    "return_weight_versions", "routed_experts_prompt_start", "safety_identifier", "seed",
    "separate_reasoning", "service_tier", "session_id", "skip_special_tokens",
    "spaces_between_special_tokens", "stop", "stop_token_ids", "store", "stream",
    "stream_interval", "stream_options", "stream_reasoning", "structured_outputs",
    "temperature", "thinking_token_budget", "top_k", "top_logprobs", "top_p", "use_beam_search",
    "user", "verbosity", "vllm_xargs", "watermarking", "web_search_options",
})  # fmt: skip
# Fields that change the prompt in ways that cannot be followed here.
_REFUSED_FIELDS = {
    "functions": "is deprecated; use tools",
    "function_call": "is deprecated; use tool_choice",
    "truncate_prompt_tokens": "cuts the prompt, which is not supported",
    "truncation_side": "cuts the prompt, which is not supported",
    "prompt_embeds": "has no token ids to look up",
    "mm_payload": "has no token ids to look up",
}
# Parameters of the call that renders, which a request must not reach as template variables.
_RESERVED_VARIABLES = frozenset({
    "chat_template", "conversation", "max_length", "messages", "padding",
    "return_assistant_tokens_mask", "return_dict", "return_tensors", "sanitize_control_tokens",
    "self", "tokenize", "tokenizer_kwargs", "tools", "truncation",
})  # fmt: skip
_REFUSED_MESSAGE_FIELDS = {
    "function_call": "is deprecated; use tool_calls",
    "audio": "cannot be scored; only text can",
}
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
# Content parts that are text, and the field that holds it.
_TEXT_PARTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}
_PART_FIELDS = frozenset({
    "type", "text", "refusal", "thinking", "closed", "uuid", "name", "prompt_cache_breakpoint",
})  # fmt: skip
_BILLING_HEADER = "x-anthropic-billing-header"


def check_fields(request: Mapping[str, Json]) -> None:
    """Refuse a chat request for a field that could change the prompt unseen.

    Raises:
        InvalidFieldError: Names the field.
    """
    for field, value in request.items():
        if field in _PROMPT_FIELDS or field in _OTHER_FIELDS or value is None:
            continue
        raise InvalidFieldError(field, _REFUSED_FIELDS.get(field, "is not a known field"))
    transfer = request.get("kv_transfer_params")
    if isinstance(transfer, Mapping) and transfer.get("prompt_token_ids"):
        raise InvalidFieldError(
            "kv_transfer_params.prompt_token_ids", "replaces the messages; send it as a prompt"
        )


def requested_tools(
    request: Mapping[str, Json], *, exclude_when_none: bool = False
) -> list[dict[str, Json]] | None:
    """Return the request's tools in the form that vLLM hands to templates.

    Raises:
        InvalidFieldError: They are not what OpenAI's API defines.
    """
    tools, choice = request.get("tools"), request.get("tool_choice")
    if tools is None:
        if choice not in (None, "none"):
            raise InvalidFieldError("tool_choice", "needs tools")
        return None
    if not isinstance(tools, list) or not tools:
        raise InvalidFieldError("tools", "must be an array with at least one tool")
    normal = [_normal_tool(tool, f"tools[{at}]") for at, tool in enumerate(tools)]
    if isinstance(choice, Mapping):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        if name not in [tool["function"]["name"] for tool in normal]:
            raise InvalidFieldError("tool_choice", "names none of the tools")
    elif choice not in (None, "none", "auto", "required"):
        raise InvalidFieldError("tool_choice", 'must be "none", "auto", "required" or a tool')
    return None if choice == "none" and exclude_when_none else normal


def _normal_tool(tool: Json, field: str) -> dict[str, Json]:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or tool.get("type", "function") != "function":
        raise InvalidFieldError(field, 'must be {"type": "function", "function": {…}}')
    if not isinstance(function.get("name"), str):
        raise InvalidFieldError(f"{field}.function.name", "must be a string")
    for key, kind in (("description", str), ("parameters", Mapping), ("strict", bool)):
        if not isinstance(function.get(key), (kind, type(None))):
            raise InvalidFieldError(f"{field}.function.{key}", "has the wrong type")
    defer = tool.get("defer_loading")
    normal = {key: function.get(key) for key in ("name", "description", "parameters")}
    for key, value in (
        ("strict", function.get("strict")),
        ("defer_loading", function.get("defer_loading", defer)),
    ):
        if value is not None:
            normal[key] = value
    outer = {} if defer is None else {"defer_loading": defer}
    return {"type": "function", "function": normal, **outer}


def prepare_chat(
    request: Mapping[str, Json],
    *,
    tools: list[dict[str, Json]] | None,
    content_format: ContentFormat,
    knows_developer: bool,
    defaults: Mapping[str, Json] | None = None,
) -> PreparedChat:
    """Prepare a request for a template, as vLLM does before it renders.

    Args:
        request: The parsed body; `check_fields` has passed it.
        tools: What `requested_tools` returned.
        content_format: What the template wants message content as.
        knows_developer: Whether the template has a word for the developer role.
        defaults: The engine's own template variables; the request's win.

    Raises:
        InvalidFieldError: Names the field that is wrong or cannot be honoured.
    """
    messages = request.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InvalidFieldError("messages", "must be an array with at least one message")
    chat = [
        _prepare_message(message, f"messages[{at}]", content_format)
        for at, message in enumerate(messages)
    ]
    if not knows_developer and any(message["role"] == "developer" for message in chat):
        chat = _merge_system(chat)
    generate = _flag(request, "add_generation_prompt", True)
    resume = _flag(request, "continue_final_message", False)
    if resume and request.get("add_generation_prompt"):
        raise InvalidFieldError(
            "continue_final_message", "cannot be combined with add_generation_prompt"
        )
    documents = request.get("documents")
    if documents is not None and not (
        isinstance(documents, list) and all(isinstance(d, Mapping) for d in documents)
    ):
        raise InvalidFieldError("documents", "must be an array of objects")
    variables = _variables(request, defaults or {})
    return PreparedChat(
        messages=chat,
        tools=tools,
        documents=documents if documents is not None else variables.pop("documents", None),
        variables={
            name: value
            for name, value in variables.items()
            if name not in ("add_generation_prompt", "continue_final_message", "documents")
        },
        add_generation_prompt=generate,
        continue_final_message=resume,
        add_special_tokens=_flag(request, "add_special_tokens", False),
    )


def _flag(request: Mapping[str, Json], field: str, default: bool) -> bool:
    value = request.get(field)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise InvalidFieldError(field, "must be true or false")
    return value


def _variables(request: Mapping[str, Json], defaults: Mapping[str, Json]) -> dict[str, Json]:
    own = request.get("chat_template_kwargs") or {}
    if not isinstance(own, Mapping):
        raise InvalidFieldError("chat_template_kwargs", "must be an object")
    for name in own:
        if name in _RESERVED_VARIABLES or name.startswith("_"):
            raise InvalidFieldError(f"chat_template_kwargs.{name[:100]}", "may not be set")
    own = dict(own)
    effort = request.get("reasoning_effort")
    if effort is not None:
        if effort not in _EFFORTS:
            raise InvalidFieldError("reasoning_effort", f"must be one of {', '.join(_EFFORTS)}")
        own["reasoning_effort"] = effort
        # Asking for reasoning switches it on in templates that want to be asked.
        own.setdefault("enable_thinking", effort != "none")
    # To vLLM null and "auto" mean: not set.
    return {**defaults, **{k: v for k, v in own.items() if v is not None and v != "auto"}}


def _prepare_message(message: Json, field: str, content_format: ContentFormat) -> dict[str, Json]:
    if not isinstance(message, Mapping):
        raise InvalidFieldError(field, "must be an object")
    role = message.get("role")
    if not isinstance(role, str):
        raise InvalidFieldError(f"{field}.role", "must be a string")
    for key, reason in _REFUSED_MESSAGE_FIELDS.items():
        if message.get(key) is not None:
            raise InvalidFieldError(f"{field}.{key}", reason)
    parts = _text_parts(message.get("content"), f"{field}.content", role)
    prepared: dict[str, Json] = {"role": role, "content": _content(parts, role, content_format)}
    if role == "assistant":
        _add_assistant_fields(prepared, message, field)
    elif role == "tool" and "tool_call_id" in message:
        prepared["tool_call_id"] = message["tool_call_id"]
    for key in ("name", "task"):
        if isinstance(message.get(key), str):
            prepared[key] = message[key]
    if role == "developer":
        prepared["tools"] = message.get("tools")
    return prepared


def _content(parts: list[dict[str, Json]], role: str, content_format: ContentFormat) -> Json:
    if content_format == "string":
        texts = [part["text"] if "text" in part else part["name"] for part in parts]
        return "\n".join(text for text in texts if text)
    if role == "tool" and all(part["type"] == "text" for part in parts):
        # Most templates know a tool's answer only as a string.
        return "\n".join(part["text"] for part in parts)
    return parts


def _add_assistant_fields(
    prepared: dict[str, Json], message: Mapping[str, Json], field: str
) -> None:
    if message.get("tool_calls"):
        prepared["tool_calls"] = _tool_calls(message["tool_calls"], f"{field}.tool_calls")
    reasoning = message.get("reasoning")
    if reasoning is None:
        reasoning = message.get("reasoning_content")
    if reasoning is not None:
        if not isinstance(reasoning, str):
            raise InvalidFieldError(f"{field}.reasoning", "must be a string")
        prepared["reasoning"] = prepared["reasoning_content"] = reasoning


def _text_parts(content: Json, field: str, role: str) -> list[dict[str, Json]]:
    if content is None:
        return []
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise InvalidFieldError(field, "must be a string or an array of parts")
    parts = []
    for at, part in enumerate(content):
        prepared = _text_part(part, f"{field}[{at}]")
        if prepared is None:
            continue
        text = prepared.get("text")
        if role == "system" and isinstance(text, str) and text.startswith(_BILLING_HEADER):
            # It changes with every request of that client; vLLM drops the line, too.
            rest = text.partition("\n")[2]
            if not rest:
                continue
            prepared = {**prepared, "text": rest}
        parts.append(prepared)
    return parts


def _text_part(part: Json, field: str) -> dict[str, Json] | None:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise InvalidFieldError(field, "must be a string or an object")
    kind = part.get("type")
    if kind == "tool_reference":
        return {"type": kind, "name": part.get("name")}
    if kind not in _TEXT_PARTS:
        raise InvalidFieldError(f"{field}.type", f"{kind!r} cannot be scored; only text can")
    text = part.get(_TEXT_PARTS[kind])
    if text is None and kind in ("text", "refusal"):
        return None
    if not isinstance(text, str):
        raise InvalidFieldError(f"{field}.{_TEXT_PARTS[kind]}", "must be a string")
    extra = {key: value for key, value in part.items() if key not in _PART_FIELDS}
    return {"type": "text", "text": text, **extra}


def _tool_calls(calls: Json, field: str) -> list[dict[str, Json]]:
    if not isinstance(calls, list):
        raise InvalidFieldError(field, "must be an array")
    prepared = []
    for at, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or call.get("type", "function") != "function":
            raise InvalidFieldError(f"{field}[{at}]", 'must be of type "function"')
        arguments = _parse_arguments(function.get("arguments"))
        prepared.append({**call, "function": {**function, "arguments": arguments}})
    return prepared


def _parse_arguments(arguments: Json) -> dict[str, Json]:
    if isinstance(arguments, str) and arguments:
        try:
            arguments = json.loads(arguments)
        except ValueError:
            # A bad call stays in the history for ever; vLLM renders it as one without arguments.
            return {}
    return dict(arguments) if isinstance(arguments, Mapping) else {}


def _merge_system(chat: Sequence[dict[str, Json]]) -> list[dict[str, Json]]:
    """Turn developer messages into system ones, and all system ones into one at the start."""
    chat = [
        {key: value for key, value in {**message, "role": "system"}.items() if key != "tools"}
        if message["role"] == "developer"
        else message
        for message in chat
    ]
    if not any(message["role"] == "system" for message in chat[1:]):
        return chat
    texts = [_plain_text(message["content"]) for message in chat if message["role"] == "system"]
    merged = {"role": "system", "content": "\n\n".join(text for text in texts if text)}
    return [merged, *(message for message in chat if message["role"] != "system")]


def _plain_text(content: str | list[dict[str, Json]]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if "text" in part)


def find_surrogate(text: str, request: Mapping[str, Json]) -> None:
    """Refuse a rendered ``text`` that is not Unicode, and say where the request has it from.

    Raises:
        InvalidFieldError: Names the field that holds half of a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        field, at = next(_surrogates(request, ""), ("messages", 0))
        raise InvalidFieldError(
            field, f"is not valid Unicode: character {at} is a lone surrogate"
        ) from None


def _surrogates(value: Json, field: str) -> Iterator[tuple[str, int]]:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            yield field, error.start
    elif isinstance(value, list):
        for at, item in enumerate(value):
            yield from _surrogates(item, f"{field}[{at}]")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _surrogates(key, f"a key of {field or 'the request'}")
            yield from _surrogates(item, f"{field}.{key}" if field else str(key))
