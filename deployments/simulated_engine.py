"""One simulated engine: real paging, real events, real HTTP; only the arithmetic is missing.

It answers OpenAI's routes as vLLM does, keeps its KV memory by vLLM's rules
(``kvcore.paged_cache``), publishes BlockStored and BlockRemoved in vLLM's wire format,
serves their replay, and reports ``cached_tokens``. Its words are drawn from the prompt
and a seed: the same requests in the same order give the same run.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from hashlib import sha256
from random import Random
from typing import Any

import msgpack
import orjson
from aiohttp import web

from deployments.event_log import EventLog
from deployments.renderer import Renderer
from deployments.settings import FleetSettings, PublisherSettings
from deployments.tokenizer import Tokenizer
from kvcore.errors import InvalidInputError, KvError
from kvcore.paged_cache import CacheEvent, PagedCache, RemovedBlock
from kvcore.tokens import Tokens, as_tokens

_WORDS = (
    "a block of the cache is held by one pod and the next pod will ask for it again so we keep"
    " every prefix in the index and say which engine has most of it when a new prompt comes in"
).split()
_OPENINGS = ("The", "A", "This", "In", "We", "It", "One", "Most")


@dataclass(frozen=True)
class _Ask:
    """What one request wants generated."""

    prompt: Tokens
    max_tokens: int
    salt: str | None
    is_chat: bool
    stream: bool
    stream_usage: bool
    return_token_ids: bool


@dataclass
class _Reply:
    """What was generated so far."""

    token_ids: list[int]
    cached_tokens: int = 0
    finish_reason: str | None = None


class SimulatedEngine:
    """A pod that a router cannot tell from a small vLLM server.

    The event loop that starts it owns it. Requests that do not fit the free KV memory
    wait for running ones; those that never could are refused with 400.
    """

    def __init__(
        self, name: str, rank: int, settings: FleetSettings, block_size: int,
        model: str, renderer: Renderer, tokenizer: Tokenizer,
    ) -> None:  # fmt: skip
        self.name, self._model, self._settings = name, model, settings
        self._renderer, self._tokenizer = renderer, tokenizer
        self.cache = PagedCache(capacity_blocks=settings.capacity_blocks, block_size=block_size)
        self._http_port = settings.first_http_port + rank
        self._endpoints = PublisherSettings(
            endpoint=f"tcp://127.0.0.1:{settings.first_event_port + rank}",
            replay_endpoint=f"tcp://127.0.0.1:{settings.first_replay_port + rank}",
        )
        self._events = EventLog(self._endpoints, first_seq=0)
        self._topic = f"kv@{name}@{model}".encode()
        self._memory_freed = asyncio.Condition()
        self._n_requests = 0
        self._words: list[tuple[str, int]] = []
        self._openings: list[tuple[str, int]] = []
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        """Where it answers OpenAI's routes."""
        return f"http://127.0.0.1:{self._http_port}"

    async def start(self) -> None:
        """Open the sockets and the HTTP port; raises OSError naming a port in use."""
        self._openings = await self._single_tokens(_OPENINGS)
        self._words = await self._single_tokens([f" {word}" for word in _WORDS])
        await self._events.start()
        app = web.Application(client_max_size=64 << 20, middlewares=[_errors_as_json])
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/v1/models", self._models),
                web.get("/kv_event_sources", self._event_sources),
                web.get("/blocks", self._blocks),
                web.post("/reset_prefix_cache", self._reset),
                web.post("/v1/chat/completions", self._chat),
                web.post("/v1/completions", self._completion),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._http_port).start()

    async def close(self) -> None:
        """Stop answering, flush the last events, close the sockets."""
        if self._runner is not None:
            await self._runner.cleanup()
        await self._events.close()

    # --- generation -----------------------------------------------------------------

    async def _generate(self, ask: _Ask, reply: _Reply) -> AsyncIterator[str]:
        """Run one sequence, yielding its text token by token; ``reply`` fills alongside."""
        words = self._draw(ask)
        # The last sampled token is never computed, so its KV never exists.
        n_total = len(ask.prompt) + len(words)
        if not self.cache.could_ever_fit(n_total):
            raise InvalidInputError(
                f"{n_total:,} tokens exceed this engine's KV memory of "
                f"{self.cache.capacity_blocks * self.cache.block_size:,}"
            )
        async with self._memory_freed:
            await self._memory_freed.wait_for(lambda: self.cache.fits(n_total))
            sequence = self.cache.start(ask.prompt, n_new_tokens=len(words), salt=ask.salt)
        try:
            reply.cached_tokens = sequence.n_cached_tokens
            self._publish()
            n_computed = len(ask.prompt) - sequence.n_cached_tokens
            await asyncio.sleep(n_computed * self._settings.prefill_us_per_token / 1e6)
            stops_by_itself = len(words) < ask.max_tokens
            for position, (text, token) in enumerate(words):
                reply.token_ids.append(token)
                if stops_by_itself or position < len(words) - 1:
                    self.cache.extend(sequence, token)
                    self._publish()
                if self._settings.decode_ms_per_token:
                    await asyncio.sleep(self._settings.decode_ms_per_token / 1e3)
                yield text
            reply.finish_reason = "stop" if stops_by_itself else "length"
        finally:
            self.cache.finish(sequence)
            async with self._memory_freed:
                self._memory_freed.notify_all()

    def _draw(self, ask: _Ask) -> list[tuple[str, int]]:
        digest = sha256(f"{self._settings.seed}:".encode() + ask.prompt.tobytes()).digest()
        random = Random(digest)  # noqa: S311 - repeatable words, not secrets
        wanted = random.randint(1, self._settings.max_output_tokens)
        count = max(1, min(wanted, ask.max_tokens))
        return [random.choice(self._openings), *random.choices(self._words, k=count - 1)]

    async def _single_tokens(self, words: list[str] | tuple[str, ...]) -> list[tuple[str, int]]:
        """Keep the words that are one token, so that text and ids stay in step."""
        found = []
        for word in words:
            encoded = await self._tokenizer.encode(self._model, word, add_special_tokens=False)
            if len(encoded.tokens) == 1:
                found.append((word, int(encoded.tokens[0])))
        if not found:
            raise KvError(f"the tokenizer of {self._model} has none of the simulated words")
        return found

    def _publish(self) -> None:
        events = self.cache.take_events()
        if events:
            batch = [time.time(), [self._wire(event) for event in events], 0]
            self._events.send(self._topic, msgpack.packb(batch))

    def _wire(self, event: CacheEvent) -> dict[str, Any]:
        """Write an event as vLLM 0.30 does: a map with the type as a tag."""
        if isinstance(event, RemovedBlock):
            return {"type": "BlockRemoved", "block_hashes": [event.hash], "medium": "GPU"}
        return {
            "type": "BlockStored",
            "block_hashes": event.hashes,
            "parent_block_hash": event.parent,
            "token_ids": event.tokens,
            "block_size": self.cache.block_size,
            "lora_id": None,
            "medium": "GPU",
            "lora_name": None,
            "extra_keys": event.extra_keys,
            "group_idx": 0,
        }

    # --- routes ---------------------------------------------------------------------

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await _read(request)
        rendered = await self._renderer.render(body)
        encoded = await self._tokenizer.encode(
            rendered.model, rendered.text, add_special_tokens=rendered.add_special_tokens
        )
        limit = body.get("max_completion_tokens") or body.get("max_tokens")
        return await self._answer(request, body, _ask(body, encoded.tokens, limit, is_chat=True))

    async def _completion(self, request: web.Request) -> web.StreamResponse:
        body = await _read(request)
        prompt = body.get("prompt")
        if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
            prompt = prompt[0]
        if isinstance(prompt, str):
            encoded = await self._tokenizer.encode(
                self._model, prompt, add_special_tokens=body.get("add_special_tokens", True)
            )
            tokens = encoded.tokens
        else:
            tokens = as_tokens(prompt)
        ask = _ask(body, tokens, body.get("max_tokens") or 16, is_chat=False)
        return await self._answer(request, body, ask)

    async def _answer(
        self, request: web.Request, body: dict[str, Any], ask: _Ask
    ) -> web.StreamResponse:
        self._n_requests += 1
        head = {
            "id": f"{'chatcmpl' if ask.is_chat else 'cmpl'}-{self.name}-{self._n_requests}",
            "object": "chat.completion" if ask.is_chat else "text_completion",
            "created": int(time.time()),
            "model": body.get("model") or self._model,
        }
        reply = _Reply([])
        if not ask.stream:
            text = "".join([piece async for piece in self._generate(ask, reply)])
            choice: dict[str, Any] = {"index": 0, "finish_reason": reply.finish_reason}
            choice |= (
                {"message": {"role": "assistant", "content": text}}
                if ask.is_chat
                else {"text": text, "logprobs": None}
            )
            extra: dict[str, Any] = {}
            if ask.return_token_ids:
                choice["token_ids"] = reply.token_ids
                extra["prompt_token_ids"] = ask.prompt.tolist()
            return _json({**head, "choices": [choice], "usage": _usage(ask, reply), **extra})
        return await self._stream(request, ask, reply, head)

    async def _stream(
        self, request: web.Request, ask: _Ask, reply: _Reply, head: dict[str, Any]
    ) -> web.StreamResponse:
        head["object"] = "chat.completion.chunk" if ask.is_chat else "text_completion"
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        pieces = self._generate(ask, reply)
        first = await anext(pieces)  # refusals become a status, not a broken stream
        await response.prepare(request)

        async def send(text: str | None, finish: str | None) -> None:
            choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
            if ask.is_chat:
                choice["delta"] = {} if text is None else {"content": text}
            else:
                choice["text"] = text or ""
            await response.write(_event({**head, "choices": [choice]}))

        if ask.is_chat:
            role = {"index": 0, "finish_reason": None, "delta": {"role": "assistant", "content": ""}}
            await response.write(_event({**head, "choices": [role]}))
        await send(first, None)
        async for piece in pieces:
            await send(piece, None)
        await send(None, reply.finish_reason)
        if ask.stream_usage:
            await response.write(_event({**head, "choices": [], "usage": _usage(ask, reply)}))
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, _request: web.Request) -> web.Response:
        return _json({"object": "list", "data": [{"id": self._model, "object": "model"}]})

    async def _event_sources(self, _request: web.Request) -> web.Response:
        sockets = self._endpoints.model_dump(include={"endpoint", "replay_endpoint"})
        return _json({"0": {**sockets, "publisher": "zmq", "topic": self._topic.decode()}})

    async def _blocks(self, _request: web.Request) -> web.Response:
        """Tell the truth: copies per engine hash, to compare an index with."""
        return _json({"copies": {str(key): n for key, n in self.cache.copies().items()}})

    async def _reset(self, _request: web.Request) -> web.Response:
        if not self.cache.clear():
            raise InvalidInputError("a sequence is running; the cache was not cleared")
        batch = [time.time(), [{"type": "AllBlocksCleared"}], 0]
        self._events.send(self._topic, msgpack.packb(batch))
        return web.Response()


@web.middleware
async def _errors_as_json(request: web.Request, handler: Any) -> web.StreamResponse:
    try:
        return await handler(request)
    except KvError as error:
        kind = "invalid_request_error"
        return _json({"error": {"message": str(error), "type": kind, "param": None, "code": 400}}, 400)


async def _read(request: web.Request) -> dict[str, Any]:
    try:
        body = orjson.loads(await request.read())
    except orjson.JSONDecodeError as error:
        raise InvalidInputError(f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise InvalidInputError("the body is not a JSON object")
    return body


def _ask(body: dict[str, Any], prompt: Tokens, limit: int | None, *, is_chat: bool) -> _Ask:
    return _Ask(
        prompt=prompt,
        max_tokens=limit or 1 << 30,
        salt=body.get("cache_salt"),
        is_chat=is_chat,
        stream=bool(body.get("stream")),
        stream_usage=bool((body.get("stream_options") or {}).get("include_usage")),
        return_token_ids=bool(body.get("return_token_ids")),
    )


def _usage(ask: _Ask, reply: _Reply) -> dict[str, Any]:
    n_prompt, n_out = len(ask.prompt), len(reply.token_ids)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_out,
        "total_tokens": n_prompt + n_out,
        "prompt_tokens_details": {"cached_tokens": reply.cached_tokens},
    }


def _json(body: dict[str, Any], status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(body), status=status, content_type="application/json")


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(body) + b"\n\n"
