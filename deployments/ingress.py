"""The HTTP face: reads requests, asks renderer, tokenizer and indexer, routes to a pod."""

import asyncio
import contextvars
import gc
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from deployments import http_errors
from deployments.coalescer import Coalescer
from deployments.engines import Engines
from deployments.json_http import JsonResponse, read_object
from deployments.metrics import IngressMetrics
from deployments.models import ModelStore
from deployments.placement import call, call_indexer
from deployments.renderer import Renderer
from deployments.request_log import RequestLog, request_id_of
from deployments.routing import Router
from deployments.schemas import (
    CompletionRequest,
    Mode,
    ScoreAnswer,
    ScoreQuery,
    ScoreRequest,
    TokenizeOptions,
    TokenizeRequest,
    parse,
)
from deployments.settings import PodEndpoint, Settings
from deployments.tokenizer import Tokenizer
from kvcore.errors import IndexUnavailableError, InvalidFieldError, KvError
from kvcore.tokens import Tokens, as_tokens

_log = logging.getLogger("ray.serve")


class Ingress:
    """One replica of the front: state is a few counters and pooled connections.

    Renderer and tokenizer live in this process or behind a handle, as configured; the
    code that calls them is the same. The indexer is always a deployment of its own.
    """

    def __init__(
        self,
        settings: Settings,
        indexer: Any,
        renderer: Any | None = None,
        tokenizer: Any | None = None,
        fleet: Any | None = None,
    ) -> None:
        self._settings = settings
        store = ModelStore(settings.model_store)  # loads on first use, so unused it costs nothing
        inline = (
            None if renderer else Renderer(settings.model_store, settings.renderer, store=store)
        )
        self._inline_renderer, renderer = inline, inline or renderer
        tokenizer = tokenizer or Tokenizer(settings.model_store, settings.tokenizer, store=store)
        self._render = call(renderer, "render")
        self._encode, self._models_known = call(tokenizer, "encode"), call(tokenizer, "models")
        self._token_strings = call(tokenizer, "token_strings")
        in_time = settings.index.answer_timeout_s
        self._indexer_status = call_indexer(indexer, "status", in_time)
        self._add_pod = call_indexer(indexer, "add_pod", in_time)
        self._remove_pod = call_indexer(indexer, "remove_pod", in_time)
        self._scorer: Coalescer[ScoreQuery, ScoreAnswer] = Coalescer(
            call_indexer(indexer, "score", in_time)
        )
        self._metrics = IngressMetrics()
        self._engines = Engines(settings.engines)
        self._router = Router(self._engines, self._metrics, self._indexer_status)
        waits = [call(tokenizer, "warm"), call(renderer, "warm"), call(indexer, "status")]
        if fleet is not None:
            waits.append(call(fleet, "ready"))
        # Serve constructs replicas on a running loop and has no other hook to start from.
        context = contextvars.Context()
        self._started = context.run(asyncio.get_running_loop().create_task, _all(waits))

    def __serve_build_asgi_app__(self) -> Starlette:
        """Return the ASGI app, built in the replica so that nothing of it is pickled."""
        return self.app()

    def app(self) -> Any:
        """Return the routes as an ASGI app."""
        post, get = ["POST"], ["GET"]
        app = Starlette(
            routes=[
                Route("/score_completions", self._score_completions, methods=post),
                Route("/v1/chat/completions", self._chat_completions, methods=post),
                Route("/v1/completions", self._completions, methods=post),
                Route("/tokenize", self._tokenize, methods=post),
                Route("/render", self._render_chat, methods=post),
                Route("/health", self._health, methods=get),
                Route("/ready", self._ready, methods=get),
                Route("/v1/models", self._models, methods=get),
                Route("/pods", self._pods, methods=get),
                Route("/pods", self._pods_add, methods=post),
                Route("/pods/{name}", self._pods_remove, methods=["DELETE"]),
            ],
            exception_handlers={
                KvError: http_errors.on_kv_error,
                HTTPException: http_errors.on_http_error,
                Exception: http_errors.on_crash,
            },
        )
        return RequestLog(app, self._metrics)

    async def check_health(self) -> None:
        """Fail the replica loudly where a part that it needs could not start."""
        if self._started.done():
            self._started.result()

    async def close(self) -> None:
        """Drop the connections to the engines."""
        self._started.cancel()
        if self._inline_renderer is not None:
            self._inline_renderer.close()
        await self._engines.close()
        _log.info("ingress: connections to engines closed")

    async def __del__(self) -> None:
        """Serve's only hook at a replica's end; it awaits it."""
        await self.close()

    # --- scoring --------------------------------------------------------------------

    async def _score_completions(self, request: Request) -> Response:
        body = parse(ScoreRequest, await self._body(request))
        model = body.model or self._settings.model
        tokens, fallback = await self._tokens(model, body.prompt, body.add_special_tokens)
        answer, mode, reason = await self._score(
            ScoreQuery(
                tokens=tokens.tobytes(),
                model=model,
                request_id=request_id_of(request),
                lora=body.lora_name,
                salt=body.cache_salt,
                pods=None if body.pods is None else tuple(body.pods),
                prompt=body.prompt if isinstance(body.prompt, str) else None,
            ),
            fallback,
        )
        return JsonResponse(
            {
                "pod_scores": answer.pod_scores(),
                "model": model,
                "prompt": body.prompt,
                "mode": mode,
                "reason": reason,
                "block_size": answer.block_size,
                "n_tokens": answer.n_tokens,
                "n_blocks": answer.n_blocks,
                "cached_tokens": answer.cached_tokens,
                "ranks": [score._asdict() for score in answer.scores],
                "request_id": request_id_of(request),
            }
        )

    async def _chat_completions(self, request: Request) -> Response:
        started = time.time()
        body = await self._body(request)
        rendered = await self._render(body)
        encoded = await self._encode(
            rendered.model, rendered.text, add_special_tokens=rendered.add_special_tokens
        )
        request_id = request_id_of(request)
        answer, mode, reason = await self._score_or_go_on(
            ScoreQuery(
                tokens=encoded.tokens.tobytes(),
                model=rendered.model,
                request_id=request_id,
                lora=None,
                salt=body.get("cache_salt"),
                chat={
                    "id": f"chatcmpl-{request_id}",
                    "messages": body["messages"],
                    "rendered_template": rendered.text,
                    "template_vars": body.get("chat_template_kwargs") or {},
                    "received_at": started,
                },
            ),
            rendered.fallback_reason or encoded.fallback_reason,
        )
        body["model"] = rendered.model
        return await self._router.route(
            "/v1/chat/completions",
            request_id=request_id,
            body=body,
            answer=answer,
            mode=mode,
            reason=reason,
        )

    async def _completions(self, request: Request) -> Response:
        body = await self._body(request)
        wanted = parse(CompletionRequest, body)
        if "kv_transfer_params" in body:
            raise InvalidFieldError("kv_transfer_params", "is not accepted from a client")
        prompt, model = wanted.single_prompt(), wanted.model or self._settings.model
        tokens, fallback = await self._tokens(model, prompt, wanted.add_special_tokens)
        answer, mode, reason = await self._score_or_go_on(
            ScoreQuery(
                tokens=tokens.tobytes(),
                model=model,
                request_id=request_id_of(request),
                salt=wanted.cache_salt,
                prompt=prompt if isinstance(prompt, str) else None,
            ),
            fallback,
        )
        body["model"] = model
        return await self._router.route(
            "/v1/completions",
            request_id=request_id_of(request),
            body=body,
            answer=answer,
            mode=mode,
            reason=reason,
        )

    async def _score(
        self, query: ScoreQuery, fallback: str | None
    ) -> tuple[ScoreAnswer, Mode, str | None]:
        """Ask the indexer; mode and reason say what of index and model is to be trusted."""
        answer = await self._scorer.ask(query)
        mode, reason = _degradation(answer, fallback)
        self._metrics.scored(mode, answer.n_tokens)
        return answer, mode, reason

    async def _score_or_go_on(
        self, query: ScoreQuery, fallback: str | None
    ) -> tuple[ScoreAnswer, Mode, str | None]:
        """Score a request that an engine serves in any case; without engines it needs the index."""
        try:
            return await self._score(query, fallback)
        except IndexUnavailableError as error:
            if not self._engines:
                raise
            size = self._settings.block_size
            n_tokens = len(query.tokens) // 4
            answer = ScoreAnswer(
                scores=[],
                cached_tokens={},
                mode="UNAVAILABLE",
                reason=str(error),
                n_tokens=n_tokens,
                n_blocks=n_tokens // size,
                block_size=size,
                pods_version=self._router.pods_version,
            )
            mode, reason = _degradation(answer, fallback)
            self._metrics.scored(mode, n_tokens)
            return answer, mode, reason

    async def _tokens(
        self, model: str, prompt: str | list[int], add_special_tokens: bool
    ) -> tuple[Tokens, str | None]:
        if isinstance(prompt, list):
            return as_tokens(prompt), None
        encoded = await self._encode(model, prompt, add_special_tokens=add_special_tokens)
        return encoded.tokens, encoded.fallback_reason

    # --- looking in -----------------------------------------------------------------

    async def _tokenize(self, request: Request) -> Response:
        """Return the ids of a prompt or chat, as vLLM's route of this name does."""
        body = await self._body(request)
        if "messages" in body:
            wanted = parse(TokenizeOptions, body)
            rendered = await self._render(body)
            model, text = rendered.model, rendered.text
            special = rendered.add_special_tokens
        else:
            wanted = parse(TokenizeRequest, body)
            model, text = wanted.model or self._settings.model, wanted.prompt
            special = wanted.add_special_tokens
        encoded = await self._encode(model, text, add_special_tokens=special)
        mode, reason = (
            ("FALLBACK", encoded.fallback_reason) if encoded.fallback_reason else ("EXACT", None)
        )
        tokens = np.asarray(encoded.tokens)
        strings = await self._token_strings(model, tokens) if wanted.return_token_strs else None
        return JsonResponse(
            {
                "model": model,
                "count": len(tokens),
                "max_model_len": None,  # vLLM's field; the engines know it
                "tokens": tokens,
                "token_strs": strings,
                "mode": mode,
                "reason": reason,
            }
        )

    async def _render_chat(self, request: Request) -> Response:
        """Return the text that a chat becomes before it is tokenized."""
        rendered = await self._render(await self._body(request))
        mode = "FALLBACK" if rendered.fallback_reason else "EXACT"
        return JsonResponse(
            {
                "model": rendered.model,
                "prompt": rendered.text,
                "mode": mode,
                "reason": rendered.fallback_reason,
            }
        )

    async def _health(self, _request: Request) -> Response:
        return JsonResponse({"status": "ok"})

    async def _ready(self, _request: Request) -> Response:
        """Answer 200 once a prompt can be scored: default model, index and fleet are up."""
        if not self._started.done():
            return JsonResponse({"status": "starting"}, status_code=503)
        self._started.result()
        status = await self._indexer_status()
        index = {"blocks": status.n_blocks, "pods": len(status.endpoints)}
        return JsonResponse({"status": "ready", "index": index})

    async def _models(self, _request: Request) -> Response:
        known = [asdict(model) for model in await self._models_known()]
        data = [
            {
                "id": model.pop("name"),
                "object": "model",
                "created": 0,
                "owned_by": "kvatlas",
                **model,
            }
            for model in known
        ]
        return JsonResponse({"object": "list", "data": data})

    async def _pods(self, _request: Request) -> Response:
        status = await self._indexer_status()
        urls = {pod.name: pod.url for pod in status.endpoints}
        running = self._engines.load()
        pods = [
            {**pod, "url": urls.get(pod["pod"]), "requests_running": running.get(pod["pod"], 0)}
            for pod in status.pods
        ]
        return JsonResponse({"pods": pods, "block_size": self._settings.block_size})

    async def _pods_add(self, request: Request) -> Response:
        """Follow a pod from now on; the body is one entry of ``events.pods``."""
        pod = parse(PodEndpoint, await self._body(request))
        await self._add_pod(pod)
        return JsonResponse({"added": pod.name}, status_code=201)

    async def _pods_remove(self, request: Request) -> Response:
        """Forget a pod and drop its blocks."""
        name = request.path_params["name"]
        n_blocks = await self._remove_pod(name)
        return JsonResponse({"removed": name, "blocks": n_blocks})

    async def _body(self, request: Request) -> dict[str, Any]:
        return await read_object(request, max_bytes=self._settings.http.max_body_bytes)


async def _all(calls: list[Callable[[], Awaitable[Any]]]) -> None:
    for ask in calls:
        await ask()
    # What start-up made stays: looking through it again stops every request for 0.1 s and more.
    gc.collect()
    gc.freeze()


def _degradation(answer: ScoreAnswer, fallback: str | None) -> tuple[Mode, str | None]:
    """Merge what the index and the model say into the worse mode and all reasons."""
    if fallback is None:
        return answer.mode, answer.reason
    mode = "UNAVAILABLE" if answer.mode == "UNAVAILABLE" else "FALLBACK"
    return mode, fallback if answer.reason is None else f"{fallback}; {answer.reason}"
