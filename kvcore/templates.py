"""Chat templates, compiled and rendered as transformers 5 does it, with jinja2 alone.

A template is the model's own code and runs in Jinja's immutable sandbox. The sandbox
confines what a template can reach, not what it can burn: a template from a request
belongs into a process with limits (``deployments/sandbox.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import meta

from kvcore.content_format import ContentFormat, detect_content_format
from kvcore.errors import ModelDamagedError, RenderError, TemplateSyntaxError
from kvcore.template_environment import SPANS, build_environment

Message = Mapping[str, Any]
"""One message of a chat, as parsed from JSON."""
Templates = str | Mapping[str, str]
"""What a model brings: one template, or several by name."""

# Where a template reads a message's reasoning; the first name is the usual one.
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
# BOS and EOS of classes that have them where the config is silent; null there means none.
_CLASS_TOKENS: Mapping[str, tuple[str | None, str]] = {
    "CodeLlamaTokenizer": ("<s>", "</s>"),
    "CohereTokenizer": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    "GPT2Tokenizer": ("<|endoftext|>", "<|endoftext|>"),
    "GPTNeoXTokenizer": ("<|endoftext|>", "<|endoftext|>"),
    "GemmaTokenizer": ("<bos>", "<eos>"),
    "LlamaTokenizer": ("<s>", "</s>"),
    "Qwen2Tokenizer": (None, "<|endoftext|>"),
}
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "


class ChatTemplate:
    """A compiled template; it never changes, and threads may share it.

    Compiling takes 3-48 ms, so keep it by its text.
    """

    def __init__(self, text: str) -> None:
        """Compile ``text``.

        Raises:
            TemplateSyntaxError: Jinja cannot compile it.
        """
        self.text = text
        try:
            tree = _ENVIRONMENT.parse(text)
            self.content_format: ContentFormat = detect_content_format(tree)
            self.variables = frozenset(meta.find_undeclared_variables(tree))
            self.knows_developer = '"developer"' in text or "'developer'" in text
            self._template = _ENVIRONMENT.from_string(text)
        except MemoryError:
            raise
        except Exception as error:  # Python's own compiler has its say, too
            raise TemplateSyntaxError(f"the chat template does not compile: {error}") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        now: datetime,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        variables: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        before_5_21: bool = False,
    ) -> str:
        """Render a chat to the prompt's text.

        Args:
            messages: At least one; a key whose value is None counts as absent.
            now: Local time, for templates that write the date.
            tools: As the template expects them; None and ``[]`` can differ.
            documents: As the template expects them.
            variables: Further variables: special tokens, then the request's own.
            add_generation_prompt: Open the assistant's turn at the end.
            continue_final_message: End inside the last message, after its
                ``content`` or the field named here.
            before_5_21: As transformers did before 5.21: None stays a value, and
                a message's reasoning goes by no other name than its own.

        Raises:
            RenderError: The chat is empty, or the template refuses it or fails on it.
        """
        if not messages:
            raise RenderError(
                "Cannot apply chat template to an empty conversation. Provide at least one message."
            )
        if continue_final_message and add_generation_prompt:
            raise RenderError(_CONTINUE_AND_GENERATE)
        if not before_5_21:
            messages = [
                {key: value for key, value in message.items() if value is not None}
                for message in messages
            ]
        return self.render_as_given(
            messages,
            now=now,
            tools=tools,
            documents=documents,
            variables=variables,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            before_5_21=before_5_21,
        )

    def render_as_given(
        self,
        messages: Sequence[Message],
        *,
        now: datetime,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        variables: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        before_5_21: bool = False,
        spans: list[tuple[int, int]] | None = None,
    ) -> str:
        """Render without the checks of `render`; None stays a value.

        ``spans``, where given, receives the start and end, in characters, of each
        ``{% generation %}`` block: what the assistant wrote.
        """
        prepare = dict if before_5_21 else _alias_reasoning
        chat = [prepare(message) for message in messages]
        given = {
            "messages": chat,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
            "strftime_now": now.strftime,
            **(variables or {}),
        }
        if continue_final_message:
            field = continue_final_message if isinstance(continue_final_message, str) else "content"
            final = self._mark_final_message(chat, field)
            return _cut_at_mark(self._run(given, spans), final)
        return self._run(given, spans)

    def _run(self, given: dict[str, Any], spans: list[tuple[int, int]] | None) -> str:
        try:
            if spans is None:
                return self._template.render(given)
            written: list[str] = []
            given[SPANS] = (written, spans)
            # Piece by piece, so that a generation block knows how much precedes it.
            for piece in self._template.generate(given):
                written.append(piece)
            return "".join(written)
        except MemoryError:
            raise
        except Exception as error:  # a template is foreign code and can raise anything
            raise RenderError(str(error)) from error

    def _mark_final_message(self, chat: list[dict[str, Any]], field: str) -> str:
        """Put the tag behind the last message's text; returns that text."""
        if not chat:
            raise RenderError("continue_final_message is set but the conversation is empty!")
        last = chat[-1] = dict(chat[-1])
        final = last.get(field)
        if final is None:
            raise RenderError(
                f'continue_final_message is set but the final message has no "{field}" to continue!'
            )
        fields = [field]
        if field in _REASONING_FIELDS:
            fields = [name for name in _REASONING_FIELDS if last.get(name) == final]
        if not any(name in self.text for name in fields):
            raise RenderError(
                f'continue_final_message is set to "{field}" but this is not an accepted field '
                "in the chat_template"
            )
        if isinstance(final, str):
            for name in fields:
                last[name] = final + _TAG
            return final
        if isinstance(final, list):
            parts = last[field] = list(final)
            for at in reversed(range(len(parts))):
                text = parts[at].get("text") if isinstance(parts[at], Mapping) else None
                if isinstance(text, str):
                    parts[at] = {**parts[at], "text": text + _TAG}
                    return text
        raise RenderError(
            "continue_final_message is set but we could not find any text to continue in the "
            "final message!"
        )


def choose_template(
    templates: Templates | None, *, named: str | None = None, tools: object | None = None
) -> str:
    """Return the text of the template that transformers takes.

    Args:
        templates: The model's.
        named: The request's choice: a name, or else a template's text.
        tools: Whatever the request brought; ``[]`` counts as tools here.

    Raises:
        RenderError: The model has no template, or several and no default.
    """
    if isinstance(templates, Mapping):
        if named is not None:
            return templates.get(named, named)
        if tools is not None and "tool_use" in templates:
            return templates["tool_use"]
        if "default" in templates:
            return templates["default"]
        raise RenderError(
            "This model has multiple chat templates with no default specified! Please either "
            "pass a chat template or the name of the template you wish to use to the "
            "`chat_template` argument. Available template names are "
            f"{sorted(templates)}."
        )
    if named is not None:
        return named
    if templates is None:
        raise RenderError("the model has no chat template: send a prompt, not messages")
    return templates


def collect_templates(
    tokenizer_config: Mapping[str, Any], jinja: str | None, additional: Mapping[str, str]
) -> Templates | None:
    """Return a model's templates; files replace what ``tokenizer_config.json`` holds.

    Args:
        tokenizer_config: Parsed ``tokenizer_config.json``.
        jinja: Text of ``chat_template.jinja``.
        additional: Texts of ``additional_chat_templates/*.jinja`` by stem.

    Raises:
        ModelDamagedError: The configured ones are neither a text nor named texts.
    """
    if additional:
        return {**({} if jinja is None else {"default": jinja}), **additional}
    if jinja is not None:
        return jinja
    configured = tokenizer_config.get("chat_template")
    try:
        if isinstance(configured, list):
            configured = {str(entry["name"]): str(entry["template"]) for entry in configured}
    except (TypeError, KeyError):
        raise ModelDamagedError("chat_template in tokenizer_config.json is malformed") from None
    if configured is None or isinstance(configured, (str, dict)):
        return configured
    raise ModelDamagedError("chat_template in tokenizer_config.json is malformed")


def collect_special_tokens(
    tokenizer_config: Mapping[str, Any], special_tokens_map: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Return the special tokens that templates may name, such as ``bos_token``.

    Unset ones are left out: to a template they are undefined, not None.
    """
    tokenizer_class = str(tokenizer_config.get("tokenizer_class")).removesuffix("Fast")
    bos, eos = _CLASS_TOKENS.get(tokenizer_class, (None, None))
    found = {"bos_token": bos, "eos_token": eos, **tokenizer_config}
    if "added_tokens_decoder" not in tokenizer_config:
        found.update(special_tokens_map or {})
    extra = found.get("extra_special_tokens")
    if isinstance(extra, Mapping):
        found.update(extra)
    tokens = {}
    for key, value in found.items():
        text = value.get("content") if isinstance(value, Mapping) else value
        if key.endswith("_token") and isinstance(text, str):
            tokens[key] = text
    return tokens


def _alias_reasoning(message: Message) -> dict[str, Any]:
    for field in _REASONING_FIELDS:
        reasoning = message.get(field)
        if reasoning is not None:
            return {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return dict(message)


def _cut_at_mark(text: str, final: str) -> str:
    mark = _TAG.strip()
    if final.strip() not in text or mark not in text:
        raise RenderError(
            "continue_final_message is set but the final message does not appear in the chat "
            "after applying the chat template! This can happen if the chat template deletes "
            "portions of the final message. Please verify the chat template and final message "
            "in your chat to ensure they are compatible."
            f"Final message to continue: {final.strip()}\nRendered chat:\n{text}"
        )
    at = text.rindex(mark)
    if text.startswith(_TAG, at):
        return text[:at]
    # The template trims messages, so it would have trimmed this one's end as well.
    return text[:at].rstrip()


_CONTINUE_AND_GENERATE = (
    "continue_final_message and add_generation_prompt are not compatible. "
    "Use continue_final_message when you want the model to continue the final message, and "
    "add_generation_prompt when you want to add a header that will prompt it to start a new "
    "assistant message instead."
)

_ENVIRONMENT = build_environment()
