"""Prompts to token ids, with the tokenizer of the model that is asked for."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from deployments.models import Model, ModelStore
from deployments.settings import ModelsSettings, TokenizerSettings
from kvcore.errors import PromptTooLongError
from kvcore.tokenization import Tokens


@dataclass(frozen=True)
class Encoded:
    """A prompt's token ids [n_tokens] uint32, perhaps read-only."""

    tokens: Tokens
    model: str
    fallback_reason: str | None  # why the ids may differ from the engine's


@dataclass(frozen=True)
class ModelStatus:
    """What is known of one model, for people and for ``/ready``."""

    name: str
    is_loaded: bool
    source: str | None = None
    backend: str | None = None  # of the tokenizer
    size_bytes: int = 0
    fallback_reason: str | None = None
    warning: str | None = None


class Tokenizer:
    """Tokenizes prompts; a plain class for one event loop, and a deployment in ``app.py``."""

    def __init__(
        self,
        models: ModelsSettings,
        settings: TokenizerSettings | None = None,
        *,
        store: ModelStore | None = None,
    ) -> None:
        """Take settings; ``store`` shares loaded models with a renderer in this process."""
        self._settings = settings or TokenizerSettings()
        self._store = store or ModelStore(models)

    async def encode(self, model: str | None, text: str, *, add_special_tokens: bool) -> Encoded:
        """Return the ids of ``text`` for a model, the default one for None.

        Raises:
            PromptTooLongError: More characters than the settings allow; nothing was tokenized.
            InvalidInputError: ``text`` holds a lone surrogate; the message says where.
            ModelError: The model is not to be had; the subclass says why.
        """
        if len(text) > self._settings.max_chars:
            raise PromptTooLongError(len(text), self._settings.max_chars, "characters")
        found = await self._store.get(model)
        encode, inline_chars = found.tokenizer.encode, self._settings.inline_chars
        if found.tokenizer.backend != "fastokens":
            inline_chars //= 8  # it is that much slower on what it has not seen
        if len(text) <= inline_chars:
            tokens = encode(text, add_special_tokens=add_special_tokens)
        else:
            tokens = await asyncio.to_thread(encode, text, add_special_tokens=add_special_tokens)
        return Encoded(tokens, found.name, found.fallback_reason)

    async def token_strings(self, model: str | None, tokens: Tokens) -> list[str]:
        """Return what each id is called in a model's vocabulary.

        Raises:
            ModelError: The model is not to be had; the subclass says why.
        """
        found = await self._store.get(model)
        return await asyncio.to_thread(found.tokenizer.strings, tokens)

    async def warm(self) -> list[ModelStatus]:
        """Load the default model and return what is known of all.

        Raises:
            ModelError: Neither it nor the embedded one is to be had.
        """
        await self._store.get()
        return await self.models()

    async def models(self) -> list[ModelStatus]:
        """Return the configured and the loaded models, the default one first."""
        return [_status(name, model) for name, model in self._store.known().items()]

    async def loaded(self) -> list[ModelStatus]:
        """Return the models that are ready for use."""
        return [status for status in await self.models() if status.is_loaded]


def _status(name: str, model: Model | None) -> ModelStatus:
    if model is None:
        return ModelStatus(name, is_loaded=False)
    return ModelStatus(
        name,
        is_loaded=True,
        source=model.source,
        backend=model.tokenizer.backend,
        size_bytes=model.size_bytes,
        fallback_reason=model.fallback_reason,
        warning=model.warning,
    )
