"""A numbered stream of messages on a PUB socket, with the last ones kept for replay.

Frames are the engines' own: topic, 8-byte big-endian sequence, payload. The replay socket speaks
the protocol of vLLM 0.26, but never loses a message of a reply: it waits for the asker.
"""

import asyncio
import contextlib
import contextvars
import logging
import time
from collections import deque
from dataclasses import dataclass

import zmq

from deployments.settings import PublisherSettings
from deployments.sockets import close_socket, guard, open_socket, watch

log = logging.getLogger(__name__)

_END = b"\xff" * 8
_MAX_REPLIES = 64  # running at once; an asker beyond them is refused
_TURN_MESSAGES = 64
_RETRY_S = 0.01
_PATIENCE_S = 10.0  # for an asker that does not read
_FLUSH_MS = 250


@dataclass
class EventLogCounters:
    """What became of our messages."""

    published: int = 0
    dropped: int = 0  # sends that at least one slow subscriber missed
    replays: int = 0
    replayed: int = 0
    replays_refused: int = 0
    replays_abandoned: int = 0


@dataclass
class _Reply:
    """A replay under way."""

    asker: bytes
    next_seq: int
    progressed_at: float


class EventLog:
    """Publish numbered messages; lives on one event loop. Without an endpoint it is idle."""

    def __init__(self, settings: PublisherSettings, *, first_seq: int) -> None:
        self.counters = EventLogCounters()
        self._settings, self._next_seq = settings, first_seq
        self._buffer: deque[tuple[int, bytes, bytes]] = deque(maxlen=settings.buffer_batches)
        self._buffer_bytes = 0
        self._context: zmq.Context | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pub: zmq.Socket | None = None
        self._router: zmq.Socket | None = None
        self._door: zmq.Socket | None = None
        self._replies: deque[_Reply] = deque()
        self._retry: asyncio.TimerHandle | None = None

    @property
    def is_on(self) -> bool:
        """Whether anything is published at all."""
        return self._pub is not None

    @property
    def bound_endpoint(self) -> str | None:
        """The address of the events, with the port that a wildcard was given."""
        return None if self._pub is None else self._pub.get_string(zmq.LAST_ENDPOINT)

    @property
    def last_seq(self) -> int | None:
        """The number of the newest message; None before the first."""
        return self._buffer[-1][0] if self._buffer else None

    async def start(self) -> None:
        """Bind the sockets.

        Raises:
            zmq.ZMQError: An endpoint is malformed or already bound.
        """
        settings = self._settings
        if settings.endpoint is None:
            return
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        self._door = guard(self._loop, self._context, settings.curve)
        self._pub = open_socket(
            self._context,
            zmq.XPUB,
            bind=settings.endpoint,
            send_hwm=settings.send_hwm,
            curve=settings.curve,
            options={zmq.XPUB_NODROP: 1},
        )
        if settings.replay_endpoint is not None:
            self._router = open_socket(
                self._context,
                zmq.ROUTER,
                bind=settings.replay_endpoint,
                send_hwm=settings.send_hwm,
                max_message_bytes=1024,
                curve=settings.curve,
                options={zmq.ROUTER_MANDATORY: 1},
            )
            watch(self._loop, self._router, self._serve)

    async def close(self) -> None:
        """Flush what subscribers have still to get, for a quarter of a second at most; close."""
        if self._retry is not None:
            self._retry.cancel()
        for socket in (self._door, self._router):
            if socket is not None:
                close_socket(self._loop, socket)
        if self._pub is not None:
            self._pub.close(linger=_FLUSH_MS)
        self._pub = self._router = self._door = None
        if self._context is not None:
            self._context.destroy(linger=_FLUSH_MS)

    def send(self, topic: bytes, payload: bytes) -> None:
        """Publish one message and keep it for replay; does nothing where it is off."""
        if self._pub is None:
            return
        self._drain_subscriptions(self._pub)
        seq, self._next_seq = self._next_seq, self._next_seq + 1
        self._remember(seq, topic, payload)
        frames = [topic, seq.to_bytes(8, "big"), payload]
        self.counters.published += 1
        try:
            self._pub.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            # Some queue is full: count that, and let the subscribers that keep up have it.
            self.counters.dropped += 1
            self._pub.set(zmq.XPUB_NODROP, 0)
            self._pub.send_multipart(frames, zmq.NOBLOCK)
            self._pub.set(zmq.XPUB_NODROP, 1)

    @staticmethod
    def _drain_subscriptions(pub: zmq.Socket) -> None:
        with contextlib.suppress(zmq.Again):
            while True:  # an XPUB queues who subscribes to what; nobody here wants to know
                pub.recv(zmq.NOBLOCK)

    def _remember(self, seq: int, topic: bytes, payload: bytes) -> None:
        buffer = self._buffer
        if len(buffer) == buffer.maxlen:
            self._buffer_bytes -= len(buffer[0][2])
        buffer.append((seq, topic, payload))
        self._buffer_bytes += len(payload)
        while self._buffer_bytes > self._settings.buffer_bytes and len(buffer) > 1:
            self._buffer_bytes -= len(buffer.popleft()[2])

    # -- replay

    def _serve(self) -> None:
        """Take new questions, and go on with one reply; the rest waits for the next turn."""
        router = self._router
        if router is None or self._loop is None:
            return
        try:
            self._take_questions(router)
            if self._replies:
                reply = self._replies.popleft()
                if self._go_on(router, reply):
                    self._replies.append(reply)
        except Exception:
            log.exception("the replay socket failed")
        if self._replies and self._retry is None:
            self._retry = contextvars.Context().run(self._loop.call_later, 0, self._again)

    def _again(self) -> None:
        self._retry = None
        self._serve()

    def _take_questions(self, router: zmq.Socket) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                frames = router.recv_multipart(zmq.NOBLOCK)
                if len(frames) != 3 or len(frames[2]) != 8 or len(self._replies) >= _MAX_REPLIES:
                    self.counters.replays_refused += 1
                    continue
                start = int.from_bytes(frames[2], "big")
                self.counters.replays += 1
                self._replies.append(_Reply(frames[0], start, time.monotonic()))

    def _go_on(self, router: zmq.Socket, reply: _Reply) -> bool:
        """Send a part of a reply; tell whether there is more to send."""
        try:
            for _ in range(_TURN_MESSAGES):
                entry = self._entry(reply.next_seq)
                if entry is None:
                    router.send_multipart([reply.asker, b"", b"", _END, b""], zmq.NOBLOCK)
                    return False
                seq, topic, payload = entry
                number = seq.to_bytes(8, "big")
                router.send_multipart([reply.asker, b"", topic, number, payload], zmq.NOBLOCK)
                reply.next_seq, reply.progressed_at = seq + 1, time.monotonic()
                self.counters.replayed += 1
        except zmq.Again:
            if time.monotonic() - reply.progressed_at > _PATIENCE_S:
                self.counters.replays_abandoned += 1
                return False
            if self._retry is None and self._loop is not None:
                self._retry = contextvars.Context().run(
                    self._loop.call_later, _RETRY_S, self._again
                )
        except zmq.ZMQError as exc:
            if exc.errno != zmq.EHOSTUNREACH:
                raise
            self.counters.replays_abandoned += 1
            return False  # the asker is gone
        return True

    def _entry(self, seq: int) -> tuple[int, bytes, bytes] | None:
        """Return the first kept message from ``seq`` on."""
        if not self._buffer or seq >= self._next_seq:
            return None
        return self._buffer[max(0, seq - self._buffer[0][0])]
