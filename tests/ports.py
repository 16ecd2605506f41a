"""Loopback ports that nobody uses."""

import contextlib
import random
import socket


def free_ports(n: int) -> int:
    """Return the first of ``n`` consecutive ports that are free, below Serve's (30000)."""
    for first in random.SystemRandom().sample(range(20_000, 29_000, n), min(200, 9_000 // n)):
        with contextlib.ExitStack() as probes, contextlib.suppress(OSError):
            for port in range(first, first + n):
                probes.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise RuntimeError(f"no {n} consecutive ports are free")
