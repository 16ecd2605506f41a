"""The answer given where no engine is configured: what the index found, in OpenAI's shape."""

import time
from collections.abc import AsyncIterator
from typing import Any

import orjson

from deployments.schemas import Mode, ScoreAnswer


def answer_text(
    answer: ScoreAnswer, scores: dict[str, int | float], mode: Mode, reason: str | None
) -> str:
    """Say in a paragraph what rendering and the index found."""
    size = f"{answer.n_tokens} tokens, {answer.n_blocks} blocks of {answer.block_size}"
    if scores:
        ranked = sorted(scores.items(), key=lambda item: (-item[1], item[0]))
        found = "leading blocks held: " + ", ".join(f"{pod} {n}" for pod, n in ranked)
    else:
        found = "no pod holds its first block"
    why = f" ({reason})" if reason else ""
    return (
        f"Based on the rendered template and KV-cache analysis ({size}): {found}. "
        f"Mode {mode}{why}. No engine is configured, so nothing was generated."
    )


def answer_body(
    text: str, model: str, request_id: str, answer: ScoreAnswer, is_chat: bool
) -> dict[str, Any]:
    """Wrap the text as a chat completion or a completion."""
    choice: dict[str, Any] = {"index": 0, "finish_reason": "stop", "logprobs": None}
    choice |= {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
    return {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{request_id}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [choice],
        "usage": {
            "prompt_tokens": answer.n_tokens,
            "completion_tokens": 0,  # nothing was generated, so nothing is counted
            "total_tokens": answer.n_tokens,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


async def answer_events(body: dict[str, Any], request: dict[str, Any]) -> AsyncIterator[bytes]:
    """Yield the same answer as server-sent events, ending in ``[DONE]``."""
    (choice,) = body["choices"]
    head = {key: body[key] for key in ("id", "created", "model")}
    is_chat = "message" in choice
    head["object"] = "chat.completion.chunk" if is_chat else "text_completion"
    content = {"delta": choice["message"]} if is_chat else {"text": choice["text"]}
    end = {"delta": {}} if is_chat else {"text": ""}
    yield _event({**head, "choices": [{"index": 0, "finish_reason": None, **content}]})
    yield _event({**head, "choices": [{"index": 0, "finish_reason": "stop", **end}]})
    if (request.get("stream_options") or {}).get("include_usage"):
        yield _event({**head, "choices": [], "usage": body["usage"]})
    yield b"data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(body) + b"\n\n"
