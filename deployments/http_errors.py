"""How an error leaves over HTTP: OpenAI's shape, one status per class.

    {"error": {"message": str, "type": str, "param": str | null, "code": int}}

The nearest base class decides, so a new error is born with a status.
"""

import logging
from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.requests import Request

from deployments.engines import EngineUnavailableError
from deployments.json_http import JsonResponse
from kvcore import errors

_log = logging.getLogger("ray.serve")

STATUS: dict[type[errors.KvError], int] = {
    errors.KvError: 500,
    errors.InvalidInputError: 400,
    errors.PromptTooLongError: 413,
    errors.UnknownPodError: 404,
    errors.ModelError: 502,
    errors.ModelNotFoundError: 404,
    errors.ModelForbiddenError: 403,
    errors.ModelUnsupportedError: 422,
    errors.HubBusyError: 503,
    errors.HubTimeoutError: 504,
    errors.IndexUnavailableError: 503,
    EngineUnavailableError: 502,
}

_TYPES = {404: "not_found_error", 405: "method_not_allowed_error", 429: "rate_limit_error"}


def status_of(error: errors.KvError) -> int:
    """Return the HTTP status; an error raised in another replica keeps its class."""
    return next(STATUS[base] for base in type(error).__mro__ if base in STATUS)


def error_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JsonResponse:
    """Build OpenAI's error object for a status and a sentence."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    body = {"error": {"message": message, "type": kind, "param": param, "code": status}}
    return JsonResponse(body, status_code=status, headers=headers)


async def on_kv_error(_request: Request, error: Exception) -> JsonResponse:
    """Answer an error that kvcore raised on purpose."""
    assert isinstance(error, errors.KvError)  # noqa: S101 - registered for this class only
    return error_response(status_of(error), str(error), param=getattr(error, "param", None))


async def on_http_error(_request: Request, error: Exception) -> JsonResponse:
    """Answer an unknown route or method."""
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for this class only
    return error_response(error.status_code, error.detail, headers=error.headers)


async def on_crash(request: Request, error: Exception) -> JsonResponse:
    """Answer what nobody foresaw, and log it with its trace."""
    _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return error_response(500, f"internal error: {type(error).__name__}")
