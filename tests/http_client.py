"""A small HTTP client for tests: JSON in, status, headers and JSON out."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, NamedTuple


class Answer(NamedTuple):
    """What came back."""

    status: int
    headers: Any
    raw: bytes

    @property
    def body(self) -> Any:
        """The body as JSON."""
        return json.loads(self.raw)


def ask(url: str, body: Any = None, *, method: str | None = None, headers: Any = None) -> Answer:
    """Send one request; a dict or list is sent as JSON, bytes as they are."""
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers or {}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return Answer(reply.status, reply.headers, reply.read())
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, error.headers, error.read())


def wait_until(is_so: Callable[[], Any], what: str, timeout_s: float = 20.0) -> Any:
    """Return the first true value; fail with ``what`` where none comes in time."""
    deadline = time.monotonic() + timeout_s
    while not (value := is_so()):
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}, after {timeout_s} s")
        time.sleep(0.005)
    return value
