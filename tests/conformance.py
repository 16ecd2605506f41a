"""The product's renderer and tokenizer behind two plain functions, for any set of cases."""

from __future__ import annotations

from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from kvcore.templates import ChatTemplate
from kvcore.tokenization import PromptTokenizer

compiled = lru_cache(maxsize=512)(ChatTemplate)  # by text, as a model keeps its own


def render(  # noqa: PLR0917 - the order of arguments that callers of such a check expect
    template: str,
    messages: list[dict[str, Any]],
    tools: list[Any] | None,
    documents: list[Any] | None,
    special_tokens: dict[str, str],
    kwargs: dict[str, Any],
    add_generation_prompt: bool,
    continue_final_message: bool | str,
    frozen_now: str | None,
) -> str:
    """Render as ``apply_chat_template(..., tokenize=False)`` does; raises as it does."""
    return compiled(template).render(
        messages,
        tools=tools,
        documents=documents,
        variables={**special_tokens, **kwargs},
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        now=datetime.fromisoformat(frozen_now) if frozen_now else datetime.now(),
    )


def encode(tokenizer_json: str | Path, text: str) -> list[int]:
    """Tokenize without special tokens; ``tokenizer_json`` is the file's path or its text."""
    return _tokenizer(str(tokenizer_json)).encode(text, add_special_tokens=False).tolist()


@lru_cache(maxsize=2)  # a large one takes half a gigabyte
def _tokenizer(tokenizer_json: str) -> PromptTokenizer:
    if tokenizer_json.lstrip().startswith("{"):
        return PromptTokenizer.from_json(tokenizer_json)
    with open(tokenizer_json, encoding="utf-8") as file:
        return PromptTokenizer.from_json(file.read())
