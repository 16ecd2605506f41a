"""A real vLLM server on this machine, followed through its real sockets.

Not in the default run: ``pytest -m engine tests/test_engine.py``, with ``KVATLAS_VLLM`` naming the
folder where ``vllm/setup.sh`` of the shared data installed the server.
"""

import asyncio
import os
import random
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import aiohttp
import numpy as np
import pytest
import zmq

from deployments.settings import EventsSettings, PodEndpoint
from deployments.subscriber import Subscriber
from kvcore.hashing import hash_blocks, namespace_root
from kvcore.index import BlockIndex
from kvcore.scorer import score
from kvcore.stream_state import PodState
from tests.shared import shared

BLOCK_SIZE, VOCABULARY, POD = 32, 2048, "pod-a"
START_S = 400.0


class Server(NamedTuple):
    """A running pod."""

    url: str
    events: str
    replay: str


def root(model: str, adapter: str | None, salt: str | None) -> int:
    return namespace_root("tiny", block_size=BLOCK_SIZE, lora=adapter, salt=salt)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def server() -> Iterator[Server]:
    folder = os.environ.get("KVATLAS_VLLM")
    if not folder or not (Path(folder) / "venv/bin/vllm").exists():
        pytest.skip("no vLLM: set KVATLAS_VLLM to the folder where vllm/setup.sh installed it")
    http, replay = free_port(), free_port()
    start = shared("vllm/start.sh")
    log = Path(folder) / "engine.log"
    with log.open("wb") as out:
        process = subprocess.Popen(  # noqa: S603  # our own script
            ["bash", start, folder, POD, str(http), str(replay)],  # noqa: S607  # any bash will do
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    yield Server(
        f"http://127.0.0.1:{http}", f"ipc://{folder}/{POD}.events", f"tcp://127.0.0.1:{replay}"
    )
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    (Path(folder) / f"{POD}.events").unlink(missing_ok=True)


@asynccontextmanager
async def up(server: Server) -> AsyncIterator[aiohttp.ClientSession]:
    """Wait until the server answers."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60)) as client:
        deadline = asyncio.get_running_loop().time() + START_S
        while True:
            try:
                async with client.get(f"{server.url}/health") as answer:
                    if answer.status == 200:
                        break
            except aiohttp.ClientError:
                assert asyncio.get_running_loop().time() < deadline, "the server never came up"
            await asyncio.sleep(1.0)
        yield client


async def published(server: Server, context: zmq.Context) -> int | None:
    """Ask the engine itself for the number of its last batch."""
    asker = context.socket(zmq.DEALER)
    try:
        asker.connect(server.replay)
        asker.send_multipart([b"", bytes(8)])
        last = None
        while True:
            if not asker.poll(0):
                await asyncio.sleep(0.005)
                continue
            *_, number, _ = asker.recv_multipart()
            if number == b"\xff" * 8:
                return last
            last = int.from_bytes(number, "big")
    finally:
        asker.close(0)


async def catch_up(subscriber: Subscriber, server: Server, context: zmq.Context) -> None:
    """Wait until all that the engine has to say is said and applied; it may say it late."""
    before: object = "nothing"
    while True:
        last = await published(server, context)
        (status,) = subscriber.statuses()
        if last == before == status.last_seq and status.state is PodState.EXACT:
            return
        before = last
        await asyncio.sleep(0.15)  # longer than the publisher's thread waits for an event


def predict(index: BlockIndex, prompt: list[int]) -> int:
    keys = hash_blocks(
        np.array(prompt[:-1], dtype=np.uint32), block_size=BLOCK_SIZE, root=root("", None, None)
    )
    found = score(index, keys, tier_weights={"gpu": 1.0})
    return BLOCK_SIZE * max((s.blocks for s in found), default=0)


@pytest.mark.engine
def test_predictions_equal_a_real_engines_cached_tokens(server):
    """60 requests of growing conversations, over a cache too small for them: equal each time."""
    chance = random.Random(5)

    def words(n: int) -> list[int]:
        return [chance.randrange(10, VOCABULARY) for _ in range(n)]

    async def main() -> list[tuple[int, int]]:
        index = BlockIndex()
        pod = PodEndpoint(name=POD, events=server.events, replay=server.replay)
        settings = EventsSettings(block_size=BLOCK_SIZE, pods=(pod,), probe_interval_s=0.2)
        subscriber = Subscriber(settings, index, model_root=root)
        found = []
        systems = [words(150), words(200)]
        turns = [[*systems[n % 2], *words(30)] for n in range(6)]
        context = zmq.Context()
        async with up(server) as client:
            await subscriber.start()
            for request in range(60):
                if request == 30:  # as if the engine's events had begun before we came
                    await subscriber.close()
                    index = BlockIndex()
                    subscriber = Subscriber(settings, index, model_root=root)
                    await subscriber.start()
                number = chance.randrange(len(turns))
                prompt = turns[number]
                await catch_up(subscriber, server, context)
                predicted = predict(index, prompt)
                body = {
                    "model": "tiny-llama",
                    "prompt": prompt,
                    "max_tokens": chance.choice([1, 8, 40]),
                    "return_token_ids": True,
                }
                async with client.post(f"{server.url}/v1/completions", json=body) as response:
                    answer = await response.json()
                details = answer["usage"]["prompt_tokens_details"]
                found.append((predicted, (details or {}).get("cached_tokens") or 0))
                turns[number] = [*prompt, *answer["choices"][0]["token_ids"], *words(20)]
                if len(turns[number]) > 900:
                    turns[number] = [*systems[number % 2], *words(30)]
            await subscriber.close()
        context.destroy(linger=0)
        return found

    found = asyncio.run(main())
    assert len(found) == 60
    assert [predicted for predicted, _ in found] == [cached for _, cached in found]
    assert sum(cached for _, cached in found) > 0
