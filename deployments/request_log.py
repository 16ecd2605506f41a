"""Give every request an id, echo it, and count how the request ended."""

import re
import time
import uuid
from collections.abc import MutableMapping
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.metrics import IngressMetrics

_GIVEN = re.compile(rb"[\x21-\x7e]{1,128}")
_HEADER = b"x-request-id"


def request_id_of(request: Request) -> str:
    """Return the id that this request's answer will carry."""
    return request.scope["kvatlas_request_id"]


class RequestLog:
    """ASGI middleware; a client's printable ``x-request-id`` is kept, else one is made."""

    def __init__(self, app: ASGIApp, metrics: IngressMetrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; lifespan and websocket scopes go through untouched."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == _HEADER), b"")
        request_id = given if _GIVEN.fullmatch(given) else uuid.uuid4().hex.encode()
        scope["kvatlas_request_id"] = request_id.decode()
        started, status = time.perf_counter(), 500

        async def send_with_id(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (_HEADER, request_id)]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            route = scope["path"] if "endpoint" in scope else "unknown"
            self._metrics.answered(route, status, time.perf_counter() - started)
