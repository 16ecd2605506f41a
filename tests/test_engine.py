"""A real vLLM server on this machine, followed through its real sockets.

Not in the default run: ``pytest -m engine tests/test_engine.py``, with ``KVATLAS_VLLM`` naming the
folder where ``vllm/setup.sh`` of the shared data installed the server.
"""

import asyncio
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

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
from tests.deployments.test_faults import until
from tests.ports import free_ports
from tests.shared import shared

BLOCK_SIZE, VOCABULARY, POD = 32, 2048, "pod-a"
START_S = 400.0


class Server:
    """A pod that can be killed and started again."""

    def __init__(self, folder: Path, scratch: Path) -> None:
        self._http = free_ports(2)
        self._replay = self._http + 1
        self._folder, self._scratch = folder, scratch
        self.url, self.replay = (
            f"{scheme}://127.0.0.1:{port}"
            for scheme, port in (("http", self._http), ("tcp", self._replay))
        )
        self.events = f"ipc://{folder}/{POD}.events"
        self.start()

    def start(self) -> None:
        """Start it; `ready` waits for it."""
        with (self._folder / "engine.log").open("ab") as out:
            ports = str(self._http), str(self._replay)
            self._process = subprocess.Popen(  # our own script
                ["bash", shared("vllm/start.sh"), self._folder, POD, *ports],  # noqa: S607  # any bash will do
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "TMPDIR": str(self._scratch)},  # it leaves files behind
            )

    def end(self, how: signal.Signals) -> None:
        """End all of its processes, and remove the shared memory that killed ones leave."""
        shared_memory = self._shared_memory()
        os.killpg(self._process.pid, how)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for file in shared_memory:
            file.unlink(missing_ok=True)

    def _shared_memory(self) -> set[Path]:
        found = set()
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it ended meanwhile
                if os.getpgid(int(process.name)) == self._process.pid:
                    maps = (process / "maps").read_text().split()
                    found |= {Path(word) for word in maps if word.startswith("/dev/shm/")}  # noqa: S108  # a prefix
        return found


def root(model: str, adapter: str | None, salt: str | None) -> int:
    return namespace_root("tiny", block_size=BLOCK_SIZE, lora=adapter, salt=salt)


@pytest.fixture
def server(tmp_path) -> Iterator[Server]:
    folder = os.environ.get("KVATLAS_VLLM")
    if not folder or not (Path(folder) / "venv/bin/vllm").exists():
        pytest.skip("no vLLM: set KVATLAS_VLLM to the folder where vllm/setup.sh installed it")
    server = Server(Path(folder), tmp_path)
    yield server
    server.end(signal.SIGTERM)
    (Path(folder) / f"{POD}.events").unlink(missing_ok=True)


async def ready(server: Server, client: aiohttp.ClientSession) -> None:
    """Wait until the server answers."""
    deadline = asyncio.get_running_loop().time() + START_S
    while True:
        try:
            async with client.get(f"{server.url}/health") as answer:
                if answer.status == 200:
                    return
        except aiohttp.ClientError:
            assert asyncio.get_running_loop().time() < deadline, "the server never came up"
        await asyncio.sleep(1.0)


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


class Talk:
    """Growing conversations with one pod, each prompt predicted before it is sent."""

    def __init__(self, server: Server, client: aiohttp.ClientSession, context: zmq.Context) -> None:
        self._server, self._client, self._context = server, client, context
        self._chance = random.Random(5)
        self._systems = [self._words(150), self._words(200)]
        self._turns = [[*self._systems[n % 2], *self._words(30)] for n in range(6)]
        self.found: list[tuple[int, int]] = []  # predicted, reported

    async def follow(self) -> Subscriber:
        """Begin to follow the pod, with an empty index."""
        self._index = BlockIndex()
        pod = PodEndpoint(name=POD, events=self._server.events, replay=self._server.replay)
        settings = EventsSettings(
            block_size=BLOCK_SIZE, pods=(pod,), probe_interval_s=0.2, rebuild_interval_s=1.0
        )
        self._subscriber = Subscriber(settings, self._index, model_root=root)
        await self._subscriber.start()
        return self._subscriber

    async def go_on(self, n: int) -> None:
        """Send ``n`` requests, one after the other."""
        for _ in range(n):
            number = self._chance.randrange(len(self._turns))
            prompt = self._turns[number]
            await catch_up(self._subscriber, self._server, self._context)
            predicted = predict(self._index, prompt)
            body = {
                "model": "tiny-llama",
                "prompt": prompt,
                "max_tokens": self._chance.choice([1, 8, 40]),
                "return_token_ids": True,
            }
            url = f"{self._server.url}/v1/completions"
            async with self._client.post(url, json=body) as response:
                answer = await response.json()
            details = answer["usage"]["prompt_tokens_details"]
            self.found.append((predicted, (details or {}).get("cached_tokens") or 0))
            turn = [*prompt, *answer["choices"][0]["token_ids"], *self._words(20)]
            is_full = len(turn) > 900
            self._turns[number] = (
                [*self._systems[number % 2], *self._words(30)] if is_full else turn
            )

    def _words(self, n: int) -> list[int]:
        return [self._chance.randrange(10, VOCABULARY) for _ in range(n)]


@pytest.mark.engine
def test_predictions_equal_a_real_engines_cached_tokens(server):
    """60 requests of growing conversations, over a cache too small for them: equal each time.

    Then the pod is killed, which must show at once, and 20 more requests to its empty successor.
    """

    async def main() -> list[tuple[int, int]]:
        context = zmq.Context()
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60)) as client:
            await ready(server, client)
            talk = Talk(server, client, context)
            subscriber = await talk.follow()
            await talk.go_on(30)
            await subscriber.close()  # as if the engine's events had begun before we came
            subscriber = await talk.follow()
            await talk.go_on(30)
            server.end(signal.SIGKILL)
            await until(lambda: subscriber.statuses()[0].state is PodState.PARTIAL, 1.0)
            server.start()
            await ready(server, client)
            await until(lambda: subscriber.statuses()[0].state is PodState.EXACT)
            assert subscriber.statuses()[0].blocks == 0
            await talk.go_on(20)
            await subscriber.close()
        context.destroy(linger=0)
        return talk.found

    found = asyncio.run(main())
    assert len(found) == 80
    assert [predicted for predicted, _ in found] == [cached for _, cached in found]
    assert sum(cached for _, cached in found[:60]) > 0
    assert sum(cached for _, cached in found[60:]) > 0
