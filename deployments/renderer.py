"""Chats to prompts, with the template of the model that is asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from deployments.models import Model, ModelStore
from deployments.settings import ModelsSettings, RendererSettings
from kvcore.chat import PreparedChat, check_fields, find_surrogate, prepare_chat, requested_tools
from kvcore.content_format import ContentFormat
from kvcore.errors import (
    InvalidFieldError,
    ModelUnsupportedError,
    PromptTooLongError,
)
from kvcore.templates import ChatTemplate

# Up to here a render takes well below 1 ms, less than a thread's round trip is worth.
_INLINE_MESSAGES, _INLINE_CHARS = 40, 100_000


@dataclass(frozen=True)
class Rendered:
    """A chat as the text that the engine tokenizes."""

    text: str
    model: str
    add_special_tokens: bool  # for the tokenizer; False unless the request says otherwise
    fallback_reason: str | None  # why the text may differ from the engine's


class Renderer:
    """Renders chats; a plain class for one event loop, and a deployment in ``app.py``."""

    def __init__(
        self,
        models: ModelsSettings,
        settings: RendererSettings | None = None,
        *,
        store: ModelStore | None = None,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """Take settings; ``store`` shares loaded models with a tokenizer in this process."""
        self._settings = settings or RendererSettings()
        self._store = store or ModelStore(models)
        self._now = now

    async def render(self, request: Mapping[str, Any]) -> Rendered:
        """Render an OpenAI chat request, parsed from JSON.

        Raises:
            InvalidFieldError: Names a field that is wrong or cannot be honoured.
            RenderError: The template refuses the chat or fails on it.
            PromptTooLongError: Too many messages or characters.
            ModelError: The model is not to be had; the subclass says why.
        """
        check_fields(request)
        self._check_size(request)
        name = request.get("model")
        if not isinstance(name, (str, type(None))):
            raise InvalidFieldError("model", "must be a string")
        if request.get("chat_template") is not None:
            raise InvalidFieldError("chat_template", "may not come with a request here")
        model = await self._store.get(name)
        if model.rendered_by is not None:
            raise ModelUnsupportedError(
                f"engines render {model.name}'s chats with {model.rendered_by}, not with its "
                "template; send the prompt or its token ids instead"
            )
        tools = requested_tools(
            request, exclude_when_none=self._settings.exclude_tools_when_tool_choice_none
        )
        template = model.template(tools=tools)
        chat = prepare_chat(
            request,
            tools=tools,
            content_format=self._content_format(template),
            knows_developer=template.knows_developer,
            defaults=self._settings.default_template_kwargs,
        )
        text = await self._run(template, model, chat, request)
        return Rendered(text, model.name, chat.add_special_tokens, model.fallback_reason)

    async def warm(self) -> None:
        """Load the default model.

        Raises:
            ModelError: It is not to be had, nor is the embedded one.
        """
        await self._store.get()

    def _content_format(self, template: ChatTemplate) -> ContentFormat:
        configured = self._settings.content_format
        return template.content_format if configured == "auto" else configured

    async def _run(
        self, template: ChatTemplate, model: Model, chat: PreparedChat, request: Mapping[str, Any]
    ) -> str:
        def render() -> str:
            text = template.render(
                chat.messages,
                tools=chat.tools,
                documents=chat.documents,
                variables={
                    **model.special_tokens,
                    **{k: v for k, v in chat.variables.items() if k in template.variables},
                },
                add_generation_prompt=chat.add_generation_prompt,
                continue_final_message=chat.continue_final_message,
                now=self._now(),
            )
            if not text.isascii():
                find_surrogate(text, request)
            return text

        if len(chat.messages) <= _INLINE_MESSAGES and _count_chars(request) <= _INLINE_CHARS:
            return render()
        return await asyncio.to_thread(render)

    def _check_size(self, request: Mapping[str, Any]) -> None:
        messages = request.get("messages")
        n_messages = len(messages) if isinstance(messages, list) else 0
        if n_messages > self._settings.max_messages:
            raise PromptTooLongError(n_messages, self._settings.max_messages, "messages")
        n_chars = _count_chars(request)
        if n_chars > self._settings.max_chars:
            raise PromptTooLongError(n_chars, self._settings.max_chars, "characters")


def _count_chars(request: Mapping[str, Any]) -> int:
    """Characters in what the template gets, whatever its shape."""
    n_chars, pending = 0, [request.get("messages"), request.get("tools"), request.get("documents")]
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            n_chars += len(value)
        elif isinstance(value, list):
            pending.extend(value)
        elif isinstance(value, Mapping):
            pending.extend(value.values())
    return n_chars
