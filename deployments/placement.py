"""Call a plain object or a Serve handle by the same words."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import RayServeException

from kvcore.errors import IndexUnavailableError


def call(target: Any, method: str) -> Callable[..., Awaitable[Any]]:
    """Return the async method of an object in this process, or of one behind a handle.

    A DeploymentHandle's method has ``remote``, whose response is awaitable and raises the
    callee's own error; a plain object's bound coroutine function is that already.
    """
    bound = getattr(target, method)
    return getattr(bound, "remote", bound)


def call_indexer(indexer: Any, method: str, timeout_s: float) -> Callable[..., Awaitable[Any]]:
    """Return a method of the indexer that answers in time, or raises IndexUnavailableError.

    There is one indexer: while it is replaced, calls to it would wait for half a minute.
    """
    ask = call(indexer, method)

    async def ask_in_time(*arguments: Any) -> Any:
        try:
            return await asyncio.wait_for(ask(*arguments), timeout_s)
        except (TimeoutError, asyncio.TimeoutError) as error:
            raise IndexUnavailableError(f"the index did not answer in {timeout_s:g} s") from error
        except (RayActorError, RayServeException) as error:
            raise IndexUnavailableError("the indexer is gone; another one starts") from error

    return ask_in_time
