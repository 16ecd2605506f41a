"""The way of a scored request to a pod, and of the pod's answer back to the client."""

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import orjson
from starlette.responses import Response, StreamingResponse

from deployments import own_answer
from deployments.engines import Engines, Reply
from deployments.json_http import JsonResponse
from deployments.metrics import IngressMetrics
from deployments.schemas import Mode, ScoreAnswer

_CACHED_TOKENS = re.compile(rb'"cached_tokens":\s*(\d+)')
_MAX_SCORES_IN_HEADER = 16


class Router:
    """Sends requests to the best pod, says in headers why, and compares what came of it."""

    def __init__(
        self, engines: Engines, metrics: IngressMetrics, ask_pods: Callable[[], Awaitable[Any]]
    ) -> None:
        """Take the indexer's ``status``, which is asked whenever its pods have changed."""
        self.engines, self._metrics, self._ask_pods = engines, metrics, ask_pods
        self.pods_version = -1

    async def route(
        self,
        path: str,
        *,
        request_id: str,
        body: dict[str, Any],
        answer: ScoreAnswer,
        mode: Mode,
        reason: str | None,
    ) -> Response:
        """Send a request to the pod with the best score and relay what it answers."""
        if answer.pods_version != self.pods_version:
            status = await self._ask_pods()
            self.engines.update({pod.name: pod.url for pod in status.endpoints if pod.url})
            self.pods_version = status.pods_version
        scores = answer.pod_scores()
        headers = _score_headers(scores, mode, reason)
        is_chat = path == "/v1/chat/completions"
        stream = bool(body.get("stream"))
        if not self.engines:
            text = own_answer.answer_text(answer, scores, mode, reason)
            made = own_answer.answer_body(text, body["model"], request_id, answer, is_chat)
            if not stream:
                return JsonResponse(made, headers=headers)
            events = own_answer.answer_events(made, body)
            return StreamingResponse(events, headers=headers, media_type="text/event-stream")
        reply = await self.engines.forward(
            path,
            orjson.dumps(body),
            self.engines.ranking(scores),
            request_id,
        )
        headers["x-kvatlas-pod"] = reply.pod
        predicted: int | None = None
        if mode != "UNAVAILABLE":
            predicted = answer.cached_tokens.get(reply.pod, 0)
            headers["x-kvatlas-predicted-cached-tokens"] = str(predicted)
        if reply.failed_over_from:
            headers["x-kvatlas-failed-over-from"] = _ascii("; ".join(reply.failed_over_from))
        if stream and reply.status == 200:
            return StreamingResponse(
                self._relay(reply, predicted),
                status_code=reply.status,
                headers=headers,
                media_type=reply.content_type,
            )
        content = await reply.read()
        self._compare(reply.pod, predicted, content)
        return Response(content, reply.status, headers=headers, media_type=reply.content_type)

    async def _relay(self, reply: Reply, predicted: int | None) -> AsyncIterator[bytes]:
        tail = b""
        async for chunk in reply.chunks():
            tail = (tail + chunk)[-1024:]
            yield chunk
        self._compare(reply.pod, predicted, tail)

    def _compare(self, pod: str, predicted: int | None, content: bytes) -> None:
        """Record what we predicted beside what the engine reports, where both are known."""
        found = _CACHED_TOKENS.findall(content[-1024:])
        if found and predicted is not None:
            self._metrics.compared(pod, predicted, int(found[-1]))


def _score_headers(
    scores: dict[str, int | float], mode: Mode, reason: str | None
) -> dict[str, str]:
    top = dict(sorted(scores.items(), key=lambda item: -item[1])[:_MAX_SCORES_IN_HEADER])
    headers = {"x-kvatlas-mode": mode, "x-kvatlas-scores": _ascii(orjson.dumps(top).decode())}
    if reason is not None:
        headers["x-kvatlas-reason"] = _ascii(reason)
    return headers


def _ascii(text: str) -> str:
    """Make a text safe for a header, on one line."""
    return " ".join(text.split()).encode("ascii", "backslashreplace").decode()[:1024]
