"""Call a plain object or a Serve handle by the same words."""

from collections.abc import Awaitable, Callable
from typing import Any


def call(target: Any, method: str) -> Callable[..., Awaitable[Any]]:
    """Return the async method of an object in this process, or of one behind a handle.

    A DeploymentHandle's method has ``remote``, whose response is awaitable and raises the
    callee's own error; a plain object's bound coroutine function is that already.
    """
    bound = getattr(target, method)
    return getattr(bound, "remote", bound)
