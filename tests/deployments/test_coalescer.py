"""One call in flight carries everybody who waits; one rider's trouble is that rider's alone."""

import asyncio

import pytest

from deployments.coalescer import Coalescer


class _Callee:
    """A call that ends when the test says so."""

    def __init__(self):
        self.batches, self.gate = [], asyncio.Event()

    async def __call__(self, items):
        self.batches.append(items)
        await self.gate.wait()
        return [ValueError(item) if item < 0 else item * 10 for item in items]


async def _settle():
    for _ in range(5):
        await asyncio.sleep(0)


def test_what_arrives_meanwhile_rides_together():
    async def main():
        callee = _Callee()
        coalescer = Coalescer(callee, max_in_flight=1)
        tasks = [asyncio.create_task(coalescer.ask(i)) for i in range(5)]
        await _settle()
        callee.gate.set()
        assert await asyncio.gather(*tasks) == [0, 10, 20, 30, 40]
        assert callee.batches == [[0], [1, 2, 3, 4]]

    asyncio.run(main())


def test_one_bad_item_hurts_nobody_else():
    async def main():
        callee = _Callee()
        callee.gate.set()
        coalescer = Coalescer(callee, max_in_flight=1)
        answers = await asyncio.gather(*map(coalescer.ask, (1, -2, 3)), return_exceptions=True)
        assert answers[0] == 10
        assert isinstance(answers[1], ValueError)
        assert answers[2] == 30

    asyncio.run(main())


def test_a_failed_call_reaches_every_rider_and_the_next_call_runs():
    async def main():
        fail = True

        async def call(items):
            if fail:
                raise ConnectionError("gone")
            return items

        coalescer = Coalescer(call, max_in_flight=1)
        with pytest.raises(ConnectionError):
            await coalescer.ask(1)
        fail = False
        assert await coalescer.ask(2) == 2

    asyncio.run(main())


def test_a_client_that_goes_away_freezes_nobody():
    """The first rider's cancellation must not cancel the call that others share."""

    async def main():
        callee = _Callee()
        coalescer = Coalescer(callee, max_in_flight=1)
        leaver = asyncio.create_task(coalescer.ask(1))
        await _settle()
        stayers = [asyncio.create_task(coalescer.ask(i)) for i in (2, 3)]
        leaver.cancel()
        await _settle()
        callee.gate.set()
        assert await asyncio.gather(*stayers) == [20, 30]
        assert await coalescer.ask(4) == 40

    asyncio.run(main())


def test_a_wrong_number_of_answers_is_an_error():
    async def main():
        async def call(_items):
            return []

        with pytest.raises(RuntimeError, match="0 answers"):
            await Coalescer(call).ask(1)

    asyncio.run(main())
