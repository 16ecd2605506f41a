"""The sockets of an engine: a publisher and its replay, over real ZMQ, in a thread of its own.

Behaves as vLLM 0.26 does (binds, numbers from 0, keeps a buffer, answers a DEALER), and can be
told to misbehave: to lose, repeat and reorder messages, to answer a replay badly or not at all.
"""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable

import msgpack
import zmq

END = b"\xff" * 8


def pack(body: object) -> bytes:
    """Encode what an engine would."""
    return bytes(msgpack.packb(body) or b"")


Message = tuple[bytes, int, bytes]  # topic, number, payload


class RecordedEngine:
    """Publish given messages; rank ``r`` uses the endpoints with vLLM's suffix for it."""

    def __init__(
        self,
        context: zmq.Context,
        endpoint: str,
        rank: int = 0,
        *,
        buffer: int = 10_000,
        is_old_protocol: bool = False,
        connect: str | None = None,
        send_hwm: int = 0,
        curve: tuple[bytes, bytes] | None = None,
        answer: Callable[[list[Message]], list[Message] | None] = lambda found: found,
    ) -> None:
        self._context = context
        self._suffix = f"_dp{rank}" if rank else ""
        self._endpoint, self._is_old_protocol = endpoint, is_old_protocol
        self._connect, self._send_hwm, self._curve = connect, send_hwm, curve
        self.answer = answer  # what of a reply is sent; None: nothing, not even its end
        self.kept: deque[Message] = deque(maxlen=buffer)
        self.n_asked = 0
        self._is_open = False
        self._open()

    @property
    def last_seq(self) -> int | None:
        """Number of the last published message."""
        return self.kept[-1][1] if self.kept else None

    def _open(self) -> None:
        self._pub = self._socket(zmq.XPUB, self._send_hwm)
        if self._connect is not None:
            self._pub.connect(self._connect)
        else:
            self._pub.bind(f"{self._endpoint}.events{self._suffix}")
        self._router = self._socket(zmq.ROUTER, 0)
        self._router.bind(f"{self._endpoint}.replay{self._suffix}")
        self._is_open = True
        self._has_subscriber = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _socket(self, kind: int, send_hwm: int) -> zmq.Socket:
        socket = self._context.socket(kind)
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.SNDHWM, send_hwm)
        if self._curve is not None:
            public, secret = self._curve
            socket.set(zmq.CURVE_PUBLICKEY, public)
            socket.set(zmq.CURVE_SECRETKEY, secret)
            socket.set(zmq.CURVE_SERVER, 1)
        return socket

    def _serve(self) -> None:
        with contextlib.suppress(zmq.ZMQError):  # closed by a test that failed
            while not self._stop.is_set():
                if self._router.poll(20):
                    self._answer(*self._router.recv_multipart())

    def _answer(self, asker: bytes, _: bytes, start: bytes) -> None:
        self.n_asked += 1
        first = int.from_bytes(start, "big")
        found = self.answer([m for m in list(self.kept) if m[1] >= first])
        if found is None:
            return
        for topic, seq, payload in found:
            head = [asker, b""] if self._is_old_protocol else [asker, b"", topic]
            self._router.send_multipart([*head, seq.to_bytes(8, "big"), payload])
        end = [END, b""] if self._is_old_protocol else [b"", END, b""]
        self._router.send_multipart([asker, b"", *end])

    async def publish(self, topic: bytes, seq: int, payload: bytes) -> None:
        """Publish one message to a subscriber that is certainly there."""
        while not self._has_subscriber:
            try:
                self._has_subscriber = self._pub.recv(zmq.NOBLOCK)[:1] == b"\x01"
            except zmq.Again:
                await asyncio.sleep(0.002)
        self.keep(topic, seq, payload)
        self.send(topic, seq, payload)

    def keep(self, topic: bytes, seq: int, payload: bytes) -> None:
        """Put a message into the replay buffer."""
        self.kept.append((topic, seq, payload))

    def send(self, topic: bytes, seq: int, payload: bytes) -> None:
        """Put a message on the wire."""
        self._pub.send_multipart([topic, seq.to_bytes(8, "big"), payload])

    def restart(self) -> None:
        """Die and come back: new sockets, an empty buffer."""
        self.close()
        self.kept.clear()
        self._open()

    def close(self) -> None:
        """Stop the replay thread and close the sockets."""
        if self._is_open:
            self._is_open = False
            self._stop.set()
            self._thread.join()
            self._pub.close(0)
            self._router.close(0)
