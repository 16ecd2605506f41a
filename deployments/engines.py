"""The pods' own HTTP side: choose one by its score, forward the request, relay the answer."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import aiohttp

from deployments.settings import EngineClientSettings
from kvcore.errors import KvError


class EngineUnavailableError(KvError):
    """No pod could be reached with this request."""


@dataclass
class _Engine:
    """What this replica knows about one pod as a server."""

    name: str
    url: str
    n_running: int = 0  # requests of this replica only
    avoid_until: float = 0.0  # clock time; set when a connection failed


class Reply:
    """A pod's answer: status and headers are in, the body streams.

    Whoever holds it ends it: by reading ``chunks`` to the end, or by ``close``.
    """

    def __init__(
        self, engine: _Engine, response: aiohttp.ClientResponse, failures: list[str]
    ) -> None:
        self.pod, self.status, self.failed_over_from = engine.name, response.status, failures
        self.content_type = response.headers.get("content-type", "application/json")
        self._engine, self._response, self._is_open = engine, response, True

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the body as it comes.

        Raises:
            EngineUnavailableError: The pod broke off in the middle.
        """
        try:
            async for chunk in self._response.content.iter_any():
                yield chunk
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            raise EngineUnavailableError(f"{self.pod} broke off: {error!r}") from error
        finally:
            self.close()

    async def read(self) -> bytes:
        """Return the whole body."""
        return b"".join([chunk async for chunk in self.chunks()])

    def close(self) -> None:
        """Give the connection back; safe to repeat."""
        if self._is_open:
            self._is_open = False
            self._engine.n_running -= 1
            self._response.close()


class Engines:
    """The clients of every pod that has a URL.

    One event loop owns it. Load is counted per replica of the ingress: with several
    replicas each balances its own requests.
    """

    def __init__(
        self, settings: EngineClientSettings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings, self._clock = settings, clock
        self._engines: dict[str, _Engine] = {}
        self._session: aiohttp.ClientSession | None = None

    def __bool__(self) -> bool:
        return bool(self._engines)

    def update(self, urls: dict[str, str]) -> None:
        """Take the current pods; known ones keep their load."""
        self._engines = {
            name: known
            if (known := self._engines.get(name)) and known.url == url
            else _Engine(name, url.rstrip("/"))
            for name, url in urls.items()
        }

    def load(self) -> dict[str, int]:
        """Return the requests running on each pod, as this replica sees it."""
        return {engine.name: engine.n_running for engine in self._engines.values()}

    def ranking(self, scores: dict[str, int | float]) -> list[str]:
        """Order the pods: reachable first, then best score, then least loaded, then name."""
        now = self._clock()

        def worth(engine: _Engine) -> tuple[bool, float, int, str]:
            avoided = engine.avoid_until > now
            return avoided, -scores.get(engine.name, 0), engine.n_running, engine.name

        return [engine.name for engine in sorted(self._engines.values(), key=worth)]

    async def forward(self, path: str, body: bytes, pods: list[str], request_id: str) -> Reply:
        """Send a request to the first of ``pods`` that takes the connection.

        Only a connection that failed moves on to the next pod: once a pod may have
        started, sending it again would run it twice.

        Raises:
            EngineUnavailableError: No pod took it; the message names each and why.
        """
        failures: list[str] = []
        for pod in pods:
            engine = self._engines.get(pod)
            if engine is None:
                continue
            engine.n_running += 1
            try:
                response = await self._client().post(
                    engine.url + path,
                    data=body,
                    headers={"content-type": "application/json", "x-request-id": request_id},
                )
            except aiohttp.ClientConnectorError as error:
                engine.n_running -= 1
                engine.avoid_until = self._clock() + self._settings.avoid_s
                failures.append(f"{pod} ({error.strerror or error})")
                continue
            except (aiohttp.ClientError, asyncio.TimeoutError) as error:
                engine.n_running -= 1
                raise EngineUnavailableError(f"{pod} broke off: {error or type(error).__name__}") from error
            except BaseException:
                engine.n_running -= 1
                raise
            return Reply(engine, response, failures)
        raise EngineUnavailableError("no engine can be reached: " + "; ".join(failures))

    async def close(self) -> None:
        """Drop the pooled connections."""
        if self._session is not None:
            await self._session.close()

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            timeout = aiohttp.ClientTimeout(
                total=None, connect=self._settings.connect_timeout_s,
                sock_read=self._settings.read_timeout_s,
            )  # fmt: skip
            self._session = aiohttp.ClientSession(
                timeout=timeout, connector=aiohttp.TCPConnector(limit=0, limit_per_host=0)
            )
        return self._session
