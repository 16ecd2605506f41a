"""A closed-loop HTTP client: ``python -m tests.bench.http_load < JOB`` prints one result as JSON.

A process of its own, so that it shares no interpreter with what it measures, and raw
sockets, so that on a small machine it takes little of the server's CPU. JOB is JSON:
port, path, bodies (texts), connections, warm_up_s, seconds.
"""

import asyncio
import json
import sys
import time
from itertools import cycle


class Connection(asyncio.Protocol):
    """Keep one request under way; note when each answer was complete and what it took."""

    def __init__(self, requests: "cycle[bytes]", ended: "asyncio.Future[None]") -> None:
        self._requests, self._ended, self._sent_at = requests, ended, 0.0
        self._buffer, self._transport = b"", None
        self.answers: list[tuple[float, float]] = []  # finished at, seconds taken

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the first request."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail the run: a server that drops keep-alive connections measures something else."""
        self._fail(f"the server closed a connection ({exc!r})")

    def data_received(self, data: bytes) -> None:
        """Note a complete answer and send the next request."""
        self._buffer += data
        head, blank_line, body = self._buffer.partition(b"\r\n\r\n")
        if not blank_line:
            return
        _, found, rest = head.lower().partition(b"content-length:")
        if not head.startswith(b"HTTP/1.1 200") or not found:
            self._fail(f"not a plain 200: {self._buffer[:500]!r}")
        elif len(body) >= int(rest.split(b"\r\n", 1)[0]):
            now = time.perf_counter()
            self.answers.append((now, now - self._sent_at))
            self._buffer = b""
            self._send()

    def _send(self) -> None:
        assert self._transport is not None
        self._sent_at = time.perf_counter()
        self._transport.write(next(self._requests))

    def _fail(self, why: str) -> None:
        if not self._ended.done():
            self._ended.set_exception(RuntimeError(why))


async def run(job: dict) -> dict[str, float]:
    """Load a server for a while; return requests/s and percentiles in ms."""
    head = f"POST {job['path']} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    bodies = [body.encode() for body in job["bodies"]]
    requests = cycle(
        [head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body for body in bodies]
    )
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    connections = []
    for _ in range(job["connections"]):
        _, connection = await loop.create_connection(
            lambda: Connection(requests, ended), "127.0.0.1", job["port"]
        )
        connections.append(connection)
    begin = time.perf_counter() + job["warm_up_s"]
    end = begin + job["seconds"]
    await asyncio.wait([ended], timeout=end - time.perf_counter())
    if ended.done():
        ended.result()
    ended.cancel()  # from here on a closing connection is nobody's failure
    taken = sorted(
        seconds for each in connections for at, seconds in each.answers if begin <= at < end
    )
    if not taken:
        raise RuntimeError(f"no answer came in {job['seconds']} s")
    return {
        "per_s": len(taken) / job["seconds"],
        "p50_ms": taken[len(taken) // 2] * 1e3,
        "p99_ms": taken[len(taken) * 99 // 100] * 1e3,
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run(json.load(sys.stdin)))))
