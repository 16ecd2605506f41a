"""Share one costly call among all the requests that wait for it.

A hop between replicas costs more than scoring a prompt does. While one call is under way,
whatever arrives waits and rides the next one together: nothing is added at low load, and
at high load the hop's price is divided by the number of riders.
"""

import asyncio
import contextvars
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Coalescer(Generic[Item, Answer]):
    """Turn single items into batched calls, at most ``max_in_flight`` at a time.

    The callee returns one answer per item, in order; an exception in an item's place is
    raised to that item's caller alone, while a failure of the call reaches all its riders.
    A caller that goes away leaves the others untouched. Bound to one event loop.
    """

    def __init__(
        self,
        call: Callable[[list[Item]], Awaitable[list[Answer | Exception]]],
        *,
        max_batch: int = 128,
        max_in_flight: int = 2,
    ) -> None:
        self._call, self._max_batch, self._max_in_flight = call, max_batch, max_in_flight
        self._waiting: list[tuple[Item, asyncio.Future[Answer]]] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def ask(self, item: Item) -> Answer:
        """Return the answer for one item, riding the next call."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        self._send_if_idle()
        return await future

    def _send_if_idle(self) -> None:
        while self._waiting and len(self._tasks) < self._max_in_flight:
            batch = self._waiting[: self._max_batch]
            del self._waiting[: self._max_batch]
            # An own context: a task started inside a request inherits Serve's request
            # context, and is stopped for good when that one client disconnects.
            context = contextvars.Context()
            task = context.run(asyncio.get_running_loop().create_task, self._ride(batch))
            self._tasks.add(task)
            task.add_done_callback(self._arrived)

    def _arrived(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        self._send_if_idle()

    async def _ride(self, batch: list[tuple[Item, "asyncio.Future[Answer]"]]) -> None:
        try:
            answers = await self._call([item for item, _ in batch])
            if len(answers) != len(batch):
                raise RuntimeError(f"{len(answers)} answers came for {len(batch)} items")  # noqa: TRY301 - same way out
        except BaseException as error:
            for _, future in batch:
                if not future.done():
                    failure = error if isinstance(error, Exception) else RuntimeError(repr(error))
                    future.set_exception(failure)
            if not isinstance(error, Exception):
                raise
            return
        for (_, future), answer in zip(batch, answers, strict=True):
            if future.done():  # its caller went away
                continue
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)
