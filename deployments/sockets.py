"""ZMQ sockets that read on an event loop by callback, bounded and closed without lingering."""

import asyncio
import contextlib
import contextvars
import os
from collections.abc import Callable

import zmq
from zmq.utils import z85

from deployments.settings import CurveSettings


def open_socket(
    context: zmq.Context,
    kind: int,
    *,
    connect: str | None = None,
    bind: str | None = None,
    receive_hwm: int = 1000,
    send_hwm: int = 1000,
    max_message_bytes: int = 16 << 20,
    curve: CurveSettings | None = None,
    options: dict[int, int | bytes] | None = None,
) -> zmq.Socket:
    """Open one socket; a peer that sends more than ``max_message_bytes`` is disconnected.

    Raises:
        zmq.ZMQError: The endpoint cannot be bound or is malformed.
        ValueError: CURVE is asked for, and the secret key's variable is not set.
    """
    socket = context.socket(kind)
    try:
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.RCVHWM, receive_hwm)
        socket.set(zmq.SNDHWM, send_hwm)
        socket.set(zmq.MAXMSGSIZE, max_message_bytes)
        socket.set(zmq.RECONNECT_IVL_MAX, 2000)
        socket.set(zmq.TCP_KEEPALIVE, 1)  # a host that vanished must not look connected
        for option, value in (options or {}).items():
            socket.set(option, value)
        if curve is not None:
            _encrypt(socket, curve, is_server=bind is not None)
        if bind is not None:
            socket.bind(bind)
        if connect is not None:
            socket.connect(connect)
    except BaseException:
        socket.close(linger=0)
        raise
    return socket


def _encrypt(socket: zmq.Socket, curve: CurveSettings, *, is_server: bool) -> None:
    secret = os.environ.get(curve.secret_key_env)
    if not secret:
        raise ValueError(f"CURVE needs the secret key in the variable {curve.secret_key_env}")
    socket.set(zmq.CURVE_SECRETKEY, secret.encode())
    socket.set(zmq.CURVE_PUBLICKEY, curve.public_key.encode())
    if is_server:
        socket.set(zmq.CURVE_SERVER, 1)
    elif curve.server_key is None:
        raise ValueError("CURVE needs the server_key of the endpoint to connect to")
    else:
        socket.set(zmq.CURVE_SERVERKEY, curve.server_key.encode())


def monitor(socket: zmq.Socket) -> zmq.Socket:
    """Return a socket that gets a message whenever a peer's connection breaks."""
    return socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)


def descriptor(socket: zmq.Socket) -> int:
    """Return the file descriptor that tells of changes."""
    fd = socket.get(zmq.FD)
    assert isinstance(fd, int)  # noqa: S101  # get() is typed for options of any kind
    return fd


def watch(loop: asyncio.AbstractEventLoop, socket: zmq.Socket, wake: Callable[[], None]) -> None:
    """Call ``wake`` when the socket may have something; it must then be read until empty.

    It is called once at first: the descriptor tells of changes only, and of none before the socket
    was found empty. A callback runs in the context it was registered in. That must not be a
    request's, which Serve cancels with the request.
    """
    context = contextvars.Context()
    context.run(loop.add_reader, descriptor(socket), wake)
    context.run(loop.call_soon, lambda: None if socket.closed else wake())


def close_socket(loop: asyncio.AbstractEventLoop | None, socket: zmq.Socket) -> None:
    """Stop watching and close at once."""
    if socket.closed:
        return
    if loop is not None and not loop.is_closed():
        loop.remove_reader(descriptor(socket))
    socket.close(linger=0)


def guard(
    loop: asyncio.AbstractEventLoop, context: zmq.Context, curve: CurveSettings | None
) -> zmq.Socket | None:
    """Let only ``allowed_keys`` into the context's bound sockets; None where all may come in.

    This is ZMQ's own protocol for it (ZAP, RFC 27): libzmq asks here about every client's key.
    """
    if curve is None or not curve.allowed_keys:
        return None
    allowed = {z85.decode(key.encode()) for key in curve.allowed_keys}
    door = context.socket(zmq.REP)
    door.bind("inproc://zeromq.zap.01")

    def judge() -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                version, request, *_, mechanism, key = door.recv_multipart(zmq.NOBLOCK)
                is_known = mechanism == b"CURVE" and key in allowed
                answer = [b"200", b"OK"] if is_known else [b"400", b"unknown key"]
                door.send_multipart([version, request, *answer, b"", b""])

    watch(loop, door, judge)
    return door


def rank_endpoint(endpoint: str, rank: int) -> str:
    """Return the endpoint of a data-parallel rank: TCP ports count up, other names get a suffix."""
    if rank == 0:
        return endpoint
    if not endpoint.startswith("tcp://"):
        return f"{endpoint}_dp{rank}"
    host, _, port = endpoint.rpartition(":")
    return f"{host}:{int(port) + rank}"


def parse_topic(topic: bytes) -> tuple[str | None, str | None]:
    """Return (pod, model) of ``kv@<pod>@<model>``; any other text names the pod as a whole."""
    text = topic.decode("utf-8", "replace")
    parts = text.split("@")
    if len(parts) == 3 and parts[0] == "kv" and parts[1]:
        return parts[1], parts[2] or None
    return text or None, None
