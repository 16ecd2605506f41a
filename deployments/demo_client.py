"""The tour's two lines to a service: its HTTP API, and the events that it publishes."""

import http.client
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import msgpack
import orjson
import zmq

_TIMEOUT_S = 30.0  # for a connection, and for each piece of an answer


class TourError(Exception):
    """The tour cannot go on; the message is the one sentence to show."""


@dataclass(frozen=True)
class Answer:
    """What one request got."""

    status: int
    headers: dict[str, str]  # by lower-case name
    body: dict[str, Any]
    took_ms: float  # HTTP included

    @property
    def pod(self) -> str | None:
        """The pod that served it, or None where no engine is configured."""
        return self.headers.get("x-kvatlas-pod")

    def held_blocks(self) -> dict[str, int]:
        """Return, of a score, the leading blocks that the best rank of each pod holds."""
        held: dict[str, int] = {}
        for rank in self.body["ranks"]:
            held[rank["pod"]] = max(held.get(rank["pod"], 0), rank["blocks"])
        return held

    def cached_tokens(self) -> int | None:
        """Return what the engine reports as cached, or None where it reports nothing."""
        if self.pod is None:
            return None
        details = self.body["usage"].get("prompt_tokens_details") or {}
        return details.get("cached_tokens")


class Client:
    """One HTTP connection; goes straight to the service, whatever proxy is configured.

    Raises:
        TourError: The URL is not one.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            parts = urlsplit(self.url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise TourError(f"{url} is not a URL: {error}") from error
        kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        if parts.scheme not in kinds or not host:
            raise TourError(f"{url} is not a URL like http://127.0.0.1:8080")
        self._connection = kinds[parts.scheme](host, port, timeout=_TIMEOUT_S)
        self._prefix = parts.path
        self.statuses: dict[str, int] = {}  # the last one of each "METHOD /route"

    def get(self, path: str) -> Answer:
        """Ask; raises TourError unless the answer is a JSON object."""
        return self._ask("GET", path, None, {})

    def post(self, path: str, body: dict[str, Any], request_id: str | None = None) -> Answer:
        """Send a JSON body; raises TourError unless the answer is a JSON object and a success."""
        headers = {"content-type": "application/json"}
        if request_id is not None:
            headers["x-request-id"] = request_id
        answer = self._ask("POST", path, orjson.dumps(body), headers)
        if answer.status >= 400:
            raise TourError(f"POST {path} answered {answer.status}: {error_message(answer.body)}")
        return answer

    def close(self) -> None:
        """Drop the connection; the next request would open another."""
        self._connection.close()

    def _ask(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> Answer:
        started = time.perf_counter()
        try:
            self._connection.request(method, self._prefix + path, body, headers)
            response = self._connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            self.close()
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise TourError(
                f"no service answers at {self.url} ({method} {path}: {why}); `make run` starts one"
            ) from error
        took_ms = (time.perf_counter() - started) * 1e3
        try:
            decoded = orjson.loads(content)
        except orjson.JSONDecodeError:
            decoded = None
        if not isinstance(decoded, dict):
            raise TourError(
                f"what answers at {self.url} is not kvatlas, or not up yet: {method} {path} "
                f"gave status {response.status} and no JSON object"
            )
        self.statuses[f"{method} {path}"] = response.status
        names = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, names, decoded, took_ms)


def error_message(body: dict[str, Any]) -> str:
    """Return the sentence in an error of OpenAI's shape, or the body."""
    error = body.get("error")
    message = error.get("message") if isinstance(error, dict) else None
    return message if isinstance(message, str) else orjson.dumps(body).decode()[:300]


@dataclass(frozen=True)
class Event:
    """One published event."""

    topic: str
    seq: int
    request_id: str
    scores: dict[str, float]


class EventFeed:
    """A subscriber to ``kv.`` topics. It may stay silent; that never stops the tour."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint, self.n_arrived, self.n_unreadable = endpoint, 0, 0
        self._by_request: dict[str, Event] = {}
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.subscribe(b"kv.")

    def connect(self, wait_s: float) -> str | None:
        """Connect, and return what is wrong if there is no publisher after ``wait_s``."""
        # Without the handshake a first event would be published before we are subscribed.
        monitor = self._socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        try:
            self._socket.connect(self.endpoint)
            if monitor.poll(int(wait_s * 1e3)):
                return None
        except zmq.ZMQError as error:
            return f"{self.endpoint} cannot be subscribed to: {error}"
        finally:
            self._socket.disable_monitor()
            monitor.close(linger=0)
        return f"no publisher answers at {self.endpoint}"

    def wait_for(self, request_id: str, wait_s: float) -> Event | None:
        """Return the event of one request, or None if it has not come after ``wait_s``."""
        deadline = time.monotonic() + wait_s
        while request_id not in self._by_request:
            left_ms = int((deadline - time.monotonic()) * 1e3)
            if left_ms < 0 or not self._socket.poll(left_ms):
                break
            self._take(self._socket.recv_multipart())
        return self._by_request.pop(request_id, None)

    def close(self) -> None:
        """Close the socket at once."""
        self._socket.close(linger=0)
        self._context.destroy(linger=0)

    def _take(self, frames: list[bytes]) -> None:
        self.n_arrived += 1
        event = decode_event(frames)
        if event is None:
            self.n_unreadable += 1
        else:
            self._by_request[event.request_id] = event


def decode_event(frames: list[bytes]) -> Event | None:
    """Read topic, 8-byte big-endian sequence and msgpack payload; None if they are not that."""
    if len(frames) != 3 or len(frames[1]) != 8:
        return None
    try:
        body = msgpack.unpackb(frames[2])
    except (ValueError, msgpack.UnpackException):
        return None
    if not isinstance(body, dict):
        return None
    scores, request_id = body.get("pod_scores", body.get("kv_scores")), body.get("request_id")
    if not isinstance(scores, dict) or not isinstance(request_id, str):
        return None
    topic = frames[0].decode("utf-8", "replace")
    return Event(topic, int.from_bytes(frames[1], "big"), request_id, scores)
