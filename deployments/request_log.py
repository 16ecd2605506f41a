"""Know every request by the id that its answer carries, and count how it ended."""

import re
import time
import uuid
from collections.abc import MutableMapping
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.metrics import IngressMetrics

_PRINTABLE = re.compile(rb"[\x21-\x7e]{1,128}")


def request_id_of(request: Request) -> str:
    """Return the id of a request: the client's own, or the one that Serve gave it."""
    return request.scope["kvatlas_request_id"]


class RequestLog:
    """ASGI middleware. Serve puts ``x-request-id`` on requests without one, and echoes it."""

    def __init__(self, app: ASGIApp, metrics: IngressMetrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; lifespan and websocket scopes go through untouched."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        is_usable = _PRINTABLE.fullmatch(given) is not None
        scope["kvatlas_request_id"] = given.decode() if is_usable else uuid.uuid4().hex
        started, status = time.perf_counter(), 500

        async def send_and_note(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        finally:
            route = scope["path"] if "endpoint" in scope else "unknown"
            self._metrics.answered(route, status, time.perf_counter() - started)
