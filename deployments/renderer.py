"""Chats to prompts, with the template of the model that is asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from deployments.models import Model, ModelStore
from deployments.sandbox import TemplateSandbox
from deployments.settings import ModelsSettings, RendererSettings
from kvcore.chat import ChatOptions, render_request
from kvcore.chat_fields import check_fields
from kvcore.errors import InvalidFieldError, ModelUnsupportedError, PromptTooLongError
from kvcore.templates import ChatTemplate
from kvcore.tool_calls import requested_tools

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
        self._sandbox = TemplateSandbox(self._settings)
        self._options = ChatOptions(
            content_format=self._settings.content_format,
            template_variables=self._settings.default_template_kwargs,
            exclude_tools_when_none=self._settings.exclude_tools_when_tool_choice_none,
            transformers_5_21=self._settings.transformers_5_21,
        )

    async def render(self, request: Mapping[str, Any]) -> Rendered:
        """Render an OpenAI chat request, parsed from JSON.

        Raises:
            InvalidFieldError: Names a field that is wrong or cannot be honoured.
            RenderError: The template refuses the chat or fails on it.
            PromptTooLongError: Too many messages or characters.
            ModelError: The model is not to be had; the subclass says why.
        """
        check_fields(request)
        is_short = self._check_size(request)
        name, named = request.get("model"), request.get("chat_template")
        for field, value in (("model", name), ("chat_template", named)):
            if not isinstance(value, (str, type(None))):
                raise InvalidFieldError(field, "must be a string")
        if named is not None and not self._settings.trust_request_chat_template:
            raise InvalidFieldError("chat_template", "may not come with a request here")
        named = named or None  # to vLLM an empty one is none, where it may come at all
        model = await self._store.get(name)
        if model.rendered_by is not None:
            raise ModelUnsupportedError(
                f"engines render {model.name}'s chats with {model.rendered_by}, not with its "
                "template; send the prompt or its token ids instead"
            )
        chosen = model.choose(
            named=named,
            tools=requested_tools(request, exclude_when_none=self._options.exclude_tools_when_none),
        )
        template = model.compiled.get(chosen)
        if template is None:
            text, special = await self._sandbox.render(
                chosen, request, model.special_tokens, self._options, self._now()
            )
        else:
            text, special = await self._render_own(template, model, request, is_short=is_short)
        return Rendered(text, model.name, special, model.fallback_reason)

    async def _render_own(
        self, template: ChatTemplate, model: Model, request: Mapping[str, Any], *, is_short: bool
    ) -> tuple[str, bool]:
        job = (template, request, model.special_tokens, self._options, self._now())
        if is_short:
            return render_request(*job)
        return await asyncio.to_thread(render_request, *job)

    async def warm(self) -> None:
        """Load the default model.

        Raises:
            ModelError: It is not to be had, nor is the embedded one.
        """
        await self._store.get()

    def close(self) -> None:
        """End the process that waits for a request's template, if there is one."""
        self._sandbox.close()

    def _check_size(self, request: Mapping[str, Any]) -> bool:
        """Refuse what is too much; returns whether it is little enough to render in place."""
        messages = request.get("messages")
        n_messages = len(messages) if isinstance(messages, list) else 0
        if n_messages > self._settings.max_messages:
            raise PromptTooLongError(n_messages, self._settings.max_messages, "messages")
        n_chars = _count_chars(request)
        if n_chars > self._settings.max_chars:
            raise PromptTooLongError(n_chars, self._settings.max_chars, "characters")
        return n_messages <= _INLINE_MESSAGES and n_chars <= _INLINE_CHARS


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
