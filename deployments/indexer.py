"""The deployment that owns the index; everything else asks it by handle."""

import asyncio
import contextlib
import contextvars
import gc
import importlib
import logging
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from deployments.metrics import PodMetrics
from deployments.schemas import ScoreAnswer, ScoreQuery
from deployments.settings import PodEndpoint, Settings
from kvcore.errors import KvError

if TYPE_CHECKING:
    from deployments.index_service import IndexService

_log = logging.getLogger("ray.serve")
_REPORT_S = 5.0


class IndexStatus(NamedTuple):
    """A look at the index from outside."""

    pods: list[dict[str, Any]]  # one per rank; see `PodStatus`
    endpoints: list[PodEndpoint]
    pods_version: int
    n_blocks: int


class Indexer:
    """One replica around one `IndexService`; whoever asks early waits until it has started.

    A restart goes on from the snapshot, or refills the index from the engines' replay sockets.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._tending: asyncio.Task[None] | None = None
        self._is_ending = asyncio.Event()
        # Serve constructs replicas on a running loop and has no other hook to start from.
        context = contextvars.Context()
        self._starting = context.run(asyncio.get_running_loop().create_task, self._start())

    async def _start(self) -> "IndexService":
        started = time.perf_counter()
        # Here and not at the top, because importing it compiles the kernels: the process that
        # describes the graph imports this file too, and would compile for nothing.
        module = await asyncio.to_thread(importlib.import_module, "deployments.index_service")
        _log.info("indexer: kernels compiled in %.1f s", time.perf_counter() - started)
        service: IndexService = await asyncio.to_thread(module.IndexService, self._settings)
        published_at = await service.start()
        # What start-up made stays: looking through it again stops everything for 0.1 s and more.
        gc.collect()
        gc.freeze()
        _log.info(
            "indexer is up: %d pods, blocks of %d tokens, scores published at %s",
            len(service.endpoints()), self._settings.block_size, published_at,
        )  # fmt: skip
        self._tending = asyncio.get_running_loop().create_task(self._tend(service))
        return service

    async def _tend(self, service: "IndexService") -> None:
        """Report the pods' states, and save a snapshot, now and then until the end."""
        interval_s = self._settings.index.snapshot_interval_s
        pods, saved_at = PodMetrics(), time.monotonic()
        while not self._is_ending.is_set():
            try:
                pods.report(service.pods())
                if time.monotonic() - saved_at >= interval_s:
                    saved_at = time.monotonic()
                    await service.save()
            except Exception:
                # A full disk must not end the reports; an older snapshot stays as it is.
                _log.exception("indexer: the pods' states or the snapshot could not be written")
            with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                await asyncio.wait_for(self._is_ending.wait(), min(_REPORT_S, interval_s))

    async def _service(self) -> "IndexService":
        return await asyncio.shield(self._starting)

    async def check_health(self) -> None:
        """Fail the replica loudly where a socket could not be opened; staleness is no failure."""
        if self._starting.done():
            self._starting.result()

    async def score(self, queries: list[ScoreQuery]) -> list[ScoreAnswer | Exception]:
        """Answer a batch in order; a query's own error stands in its place."""
        service = await self._service()
        answers: list[ScoreAnswer | Exception] = []
        for query in queries:
            try:
                answers.append(service.answer(query))
            except KvError as error:
                answers.append(error)
        return answers

    async def status(self) -> IndexStatus:
        """Return what is known of every pod."""
        service = await self._service()
        pods = service.pods()
        n_blocks = sum(pod["blocks"] for pod in pods)
        return IndexStatus(pods, service.endpoints(), service.pods_version, n_blocks)

    async def add_pod(self, pod: PodEndpoint) -> None:
        """Follow a pod from now on; see `IndexService.add_pod`."""
        await (await self._service()).add_pod(pod)

    async def remove_pod(self, name: str) -> int:
        """Forget a pod and return how many blocks it held; see `IndexService.remove_pod`."""
        return await (await self._service()).remove_pod(name)

    async def close(self) -> None:
        """Flush what was published, save the snapshot and close the sockets."""
        if (
            self._starting.done()
            and not self._starting.cancelled()
            and not self._starting.exception()
        ):
            self._is_ending.set()
            if self._tending is not None:
                await self._tending
            published = await self._starting.result().close()
            _log.info("indexer: published events flushed, sockets closed: %s", published)
        self._starting.cancel()

    async def __del__(self) -> None:
        """Serve's only hook at a replica's end; it awaits it."""
        await self.close()
