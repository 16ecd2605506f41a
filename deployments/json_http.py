"""JSON over HTTP: bounded, strict reading and fast writing, errors in OpenAI's shape."""

from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from kvcore.errors import InvalidInputError, PromptTooLongError


class JsonResponse(Response):
    """A response whose body is one JSON document."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Encode; numpy numbers pass, NaN becomes null as JSON has none."""
        return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


async def read_object(request: Request, *, max_bytes: int) -> dict[str, Any]:
    """Read a JSON object of at most ``max_bytes``.

    Raises:
        PromptTooLongError: The body is larger; it is not read to its end.
        InvalidInputError: Not JSON (NaN and lone surrogates are not), nested too deep, or
            not an object. The message says at which line and column.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > max_bytes:
        raise PromptTooLongError(int(announced), max_bytes, "bytes of body")
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > max_bytes:
            raise PromptTooLongError(size, max_bytes, "bytes of body")
        chunks.append(chunk)
    try:
        body = orjson.loads(b"".join(chunks))
    except orjson.JSONDecodeError as error:
        raise InvalidInputError(f"the body is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise InvalidInputError("the body must be a JSON object")
    return body
