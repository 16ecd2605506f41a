"""The embedded default fleet: a deployment that runs a few simulated engines."""

import asyncio
import contextvars
import logging

from deployments.models import ModelStore
from deployments.renderer import Renderer
from deployments.settings import Settings
from deployments.simulated_engine import SimulatedEngine
from deployments.tokenizer import Tokenizer

_log = logging.getLogger("ray.serve")


class Fleet:
    """Several engines in one process, each with ports of its own on loopback.

    They reach the rest only as real ones would: events over ZMQ, requests over HTTP.
    """

    def __init__(self, settings: Settings) -> None:
        if settings.fleet is None:
            raise ValueError("no fleet is configured")
        store = ModelStore(settings.model_store)
        # With the settings by which the ingress predicts what engines render.
        self._renderer = Renderer(settings.model_store, settings.renderer, store=store)
        tokenizer = Tokenizer(settings.model_store, store=store)
        self._engines = [
            SimulatedEngine(
                pod.name,
                rank=rank,
                settings=settings.fleet,
                block_size=settings.block_size,
                model=settings.model,
                renderer=self._renderer,
                tokenizer=tokenizer,
            )
            for rank, pod in enumerate(settings.fleet.pods(settings.model))
        ]
        # Serve constructs replicas on a running loop and has no other hook to start from.
        context = contextvars.Context()
        self._started = context.run(asyncio.get_running_loop().create_task, self._start())

    async def _start(self) -> None:
        for engine in self._engines:
            await engine.start()
            _log.info("simulated engine %s is up at %s", engine.name, engine.url)

    async def check_health(self) -> None:
        """Fail the replica loudly where an engine could not open its ports."""
        if self._started.done():
            self._started.result()

    async def ready(self) -> list[str]:
        """Return the engines' names once all of them answer."""
        await asyncio.shield(self._started)
        return [engine.name for engine in self._engines]

    async def close(self) -> None:
        """Stop every engine: finish its answers, flush its events, close its sockets."""
        self._started.cancel()
        for engine in self._engines:
            await engine.close()
        self._renderer.close()
        _log.info("%d simulated engines stopped", len(self._engines))

    async def __del__(self) -> None:
        """Serve's only hook at a replica's end; it awaits it."""
        await self.close()
