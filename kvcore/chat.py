"""From an OpenAI chat request to what the template gets, as vLLM 0.33 prepares it.

Whatever can change the prompt is honoured or refused by name: a score for another
prompt than the engine's would be wrong without a sign.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, NamedTuple

from kvcore.chat_fields import RESERVED_VARIABLES
from kvcore.content_format import ContentFormat
from kvcore.errors import InvalidFieldError
from kvcore.templates import ChatTemplate
from kvcore.tool_calls import developer_tools, history_calls, requested_tools

Json = Any
"""A value as ``json.loads`` gives it."""


class ChatOptions(NamedTuple):
    """How the engines were started, as far as their prompts depend on it."""

    content_format: Literal["auto", "string", "openai"] = "auto"
    template_variables: Mapping[str, Json] = {}  # --default-chat-template-kwargs
    exclude_tools_when_none: bool = False  # --exclude-tools-when-tool-choice-none
    # They run an older transformers, as vLLM up to 0.33 does: no reasoning named ``thinking``.
    before_transformers_5_21: bool = False


@dataclass(frozen=True)
class PreparedChat:
    """What a chat template is rendered with."""

    messages: list[dict[str, Json]]
    tools: list[dict[str, Json]] | None
    documents: list[dict[str, Json]] | None
    variables: dict[str, Json]  # what the template uses of the request's own
    add_generation_prompt: bool
    continue_final_message: bool
    add_special_tokens: bool  # for the tokenizer


# Variables that the request sets by fields of its own; those win.
_ARGUMENTS = frozenset({"add_generation_prompt", "continue_final_message", "documents"})
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
# Fields of content parts of any kind; templates get all others of a part as they are.
_PART_FIELDS = frozenset({
    "audio_embeds", "audio_url", "closed", "data", "file", "image_embeds", "image_pil",
    "image_url", "input_audio", "name", "prompt_cache_breakpoint", "refusal", "text", "thinking",
    "type", "uuid", "video_embeds", "video_url",
})  # fmt: skip
# Fields of messages to which vLLM applies OpenAI's schema; others may hold a list of strings.
_OPENAI_FIELDS = {
    **dict.fromkeys(
        ("developer", "system", "user", "assistant"), frozenset({"role", "content", "name"})
    ),
    "tool": frozenset({"role", "content", "tool_call_id"}),
}
_BILLING_HEADER = "x-anthropic-billing-header"


def render_request(
    template: ChatTemplate,
    request: Mapping[str, Json],
    special_tokens: Mapping[str, str],
    options: ChatOptions,
    now: datetime,
) -> tuple[str, bool]:
    """Render a chat request.

    Args:
        template: The one that `choose_template` gave for the request's tools.
        request: The parsed body; `check_fields` has passed it.
        special_tokens: The model's, by name.
        options: How the engines were started.
        now: Local time.

    Returns:
        The prompt, and whether the tokenizer is to add special tokens.

    Raises:
        InvalidFieldError: Names the field that is wrong or cannot be honoured.
        RenderError: The template refuses the chat or fails on it.
    """
    chat = prepare_chat(template, request, options)
    text = template.render(
        chat.messages,
        tools=chat.tools,
        documents=chat.documents,
        variables={**special_tokens, **chat.variables},
        add_generation_prompt=chat.add_generation_prompt,
        continue_final_message=chat.continue_final_message,
        before_5_21=options.before_transformers_5_21,
        now=now,
    )
    if not text.isascii():
        _refuse_surrogates(text, request)
    return text, chat.add_special_tokens


def prepare_chat(
    template: ChatTemplate, request: Mapping[str, Json], options: ChatOptions
) -> PreparedChat:
    """Prepare a request for a template, as vLLM does before it renders.

    Raises:
        InvalidFieldError: Names the field that is wrong or cannot be honoured.
    """
    messages = request.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InvalidFieldError("messages", "must be an array with at least one message")
    content_format = (
        template.content_format if options.content_format == "auto" else options.content_format
    )
    chat = [
        _prepare_message(message, f"messages[{at}]", content_format)
        for at, message in enumerate(messages)
    ]
    if not template.knows_developer and any(message["role"] == "developer" for message in chat):
        chat = _merge_system(chat)
    resume = _flag(request, "continue_final_message", False)
    if resume and request.get("add_generation_prompt"):
        raise InvalidFieldError(
            "continue_final_message", "cannot be combined with add_generation_prompt"
        )
    variables = _variables(request, options.template_variables)
    documents = request.get("documents")
    if documents is None:
        documents = variables.get("documents")
    elif not _are_texts(documents):
        raise InvalidFieldError("documents", "must be an array of objects whose values are strings")
    if documents is not None and not (
        isinstance(documents, list) and all(isinstance(d, Mapping) for d in documents)
    ):
        raise InvalidFieldError("documents", "must be an array of objects")
    return PreparedChat(
        messages=chat,
        tools=requested_tools(request, exclude_when_none=options.exclude_tools_when_none),
        documents=documents,
        variables={
            name: value
            for name, value in variables.items()
            if name in template.variables and name not in _ARGUMENTS
        },
        add_generation_prompt=_flag(request, "add_generation_prompt", True),
        continue_final_message=resume,
        add_special_tokens=_flag(request, "add_special_tokens", False),
    )


def _are_texts(documents: Json) -> bool:
    return isinstance(documents, list) and all(
        isinstance(document, Mapping) and all(isinstance(v, str) for v in document.values())
        for document in documents
    )


def _flag(request: Mapping[str, Json], field: str, default: bool) -> bool:
    value = request.get(field, default)
    if not isinstance(value, bool):
        raise InvalidFieldError(field, "must be true or false")
    return value


def _variables(request: Mapping[str, Json], defaults: Mapping[str, Json]) -> dict[str, Json]:
    own = request.get("chat_template_kwargs")
    own = {} if own is None else own
    if not isinstance(own, Mapping):
        raise InvalidFieldError("chat_template_kwargs", "must be an object")
    for name in own:
        if name in RESERVED_VARIABLES or name.startswith("_"):
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
    content = message.get("content")
    if content is None and "content" in message and role not in ("assistant", "function"):
        raise InvalidFieldError(f"{field}.content", "must be a string or an array of parts")
    takes_strings = not message.keys() <= _OPENAI_FIELDS.get(role, frozenset())
    parts = _text_parts(content, f"{field}.content", role, takes_strings=takes_strings)
    prepared: dict[str, Json] = {"role": role, "content": _content(parts, role, content_format)}
    if role == "assistant":
        _add_assistant_fields(prepared, message, field)
    elif role == "tool" and "tool_call_id" in message:
        prepared["tool_call_id"] = message["tool_call_id"]
        if not isinstance(prepared["tool_call_id"], (str, type(None))):
            raise InvalidFieldError(f"{field}.tool_call_id", "must be a string")
    for key in ("name", "task"):
        if key in message:
            if not isinstance(message[key], str):
                raise InvalidFieldError(f"{field}.{key}", "must be a string")
            prepared[key] = message[key]
    if role == "developer":
        prepared["tools"] = developer_tools(message.get("tools"))
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
        prepared["tool_calls"] = history_calls(message["tool_calls"], f"{field}.tool_calls")
    reasoning = message.get("reasoning")
    if reasoning is None:
        reasoning = message.get("reasoning_content")
    if reasoning is not None:
        if not isinstance(reasoning, str):
            raise InvalidFieldError(f"{field}.reasoning", "must be a string")
        prepared["reasoning"] = prepared["reasoning_content"] = reasoning


def _text_parts(
    content: Json, field: str, role: str, *, takes_strings: bool
) -> list[dict[str, Json]]:
    if content is None:
        return []
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise InvalidFieldError(field, "must be a string or an array of parts")
    if takes_strings or any(isinstance(part, Mapping) for part in content):
        content = [{"type": "text", "text": p} if isinstance(p, str) else p for p in content]
    parts = []
    for at, part in enumerate(content):
        prepared = _text_part(part, f"{field}[{at}]")
        if prepared is None:
            continue
        text = prepared.get("text", "")
        if role == "system" and part["type"] == "text" and text.startswith(_BILLING_HEADER):
            # It changes with every request of that client; vLLM drops the line, too.
            rest = text.partition("\n")[2]
            if not rest:
                continue
            prepared = {**prepared, "text": rest}
        parts.append(prepared)
    return parts


def _text_part(part: Json, field: str) -> dict[str, Json] | None:
    if not isinstance(part, Mapping):
        raise InvalidFieldError(field, "must be an object")
    kind = part.get("type")
    if kind == "tool_reference":
        if not isinstance(part.get("name"), (str, type(None))):
            raise InvalidFieldError(f"{field}.name", "must be a string")
        return {"type": kind, "name": part.get("name")}
    if not isinstance(kind, str) or kind not in _TEXT_PARTS:
        raise InvalidFieldError(f"{field}.type", f"{kind!r} cannot be scored; only text can")
    if part.get("uuid") is not None:
        raise InvalidFieldError(f"{field}.uuid", "belongs to media; only text can be scored")
    text = part.get(_TEXT_PARTS[kind])
    if text is None and kind in ("text", "refusal"):
        return None
    if not isinstance(text, str):
        raise InvalidFieldError(f"{field}.{_TEXT_PARTS[kind]}", "must be a string")
    extra = {key: value for key, value in part.items() if key not in _PART_FIELDS}
    return {"type": "text", "text": text, **extra}


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


def _refuse_surrogates(text: str, request: Mapping[str, Json]) -> None:
    """Refuse a rendered ``text`` that is not Unicode, and say where the request has it from.

    Raises:
        InvalidFieldError: Names the field that holds half of a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        try:
            field, at = next(_surrogates(request, ""))
            reason = f"is not valid Unicode: character {at} is a lone surrogate"
        except (StopIteration, RecursionError):  # inside JSON text, or nested very deeply
            field, reason = "messages", "are not valid Unicode: one holds a lone surrogate"
        raise InvalidFieldError(field, reason) from None


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
