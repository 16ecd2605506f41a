"""A socket on which engines' events come in."""

import asyncio
import contextlib
from collections.abc import Callable

import zmq

from deployments import sockets
from deployments.settings import EventsSettings, PodEndpoint


class Inlet:
    """One SUB socket: connected to a rank of a pod, or the bound one that all others share."""

    def __init__(
        self, settings: EventsSettings, context: zmq.Context, pod: PodEndpoint | None, rank: int
    ) -> None:
        self.pod, self.rank = pod.name if pod else None, rank
        self.is_broken = False  # a connection broke; what came before it is to be read first
        self._loop: asyncio.AbstractEventLoop | None = None
        connect = sockets.rank_endpoint(pod.events, rank) if pod and pod.events else None
        self._socket = sockets.open_socket(
            context,
            zmq.SUB,
            connect=connect,
            bind=settings.bind if pod is None else None,
            receive_hwm=settings.receive_hwm,
            max_message_bytes=settings.max_message_bytes,
            curve=pod.curve if pod else settings.curve,
        )
        self._socket.subscribe(settings.topic_prefix)
        self._monitor = sockets.monitor(self._socket)

    @property
    def endpoint(self) -> str:
        """The address of the socket, with the port that a wildcard was given."""
        return self._socket.get_string(zmq.LAST_ENDPOINT)

    def watch(self, loop: asyncio.AbstractEventLoop, wake: Callable[["Inlet"], None]) -> None:
        """Call ``wake`` when there may be messages, or a connection broke."""
        self._loop = loop

        def note_break() -> None:
            with contextlib.suppress(zmq.ZMQError):
                while self._monitor.recv_multipart(zmq.NOBLOCK):
                    self.is_broken = True
                    wake(self)

        sockets.watch(loop, self._socket, lambda: wake(self))
        sockets.watch(loop, self._monitor, note_break)

    def receive(self) -> list[bytes] | None:
        """Return a message's frames, or None when there is none."""
        try:
            return self._socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return None

    def close(self) -> None:
        """Close at once."""
        # In this order: libzmq says goodbye to the monitor, and would wait for one that is closed.
        self._socket.disable_monitor()
        sockets.close_socket(self._loop, self._monitor)
        sockets.close_socket(self._loop, self._socket)
