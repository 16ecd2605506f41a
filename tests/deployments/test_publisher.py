"""Our own events, read with plain pyzmq and msgpack as anybody's subscriber would."""

import asyncio

import msgpack
import pytest
import zmq

from deployments.publisher import Publisher
from deployments.settings import CurveSettings, PublisherSettings

END = b"\xff" * 8


class Sockets:
    """Sockets that are closed when the test is over."""

    def __init__(self):
        self._context, self._made = zmq.Context(), []

    def socket(self, kind):
        self._made.append(self._context.socket(kind))
        return self._made[-1]

    def close(self):
        for socket in self._made:
            socket.close(linger=0)
        self._context.destroy(linger=0)


def fnv1a(data: bytes) -> int:
    """Compute FNV-1a 64 by its definition."""
    state = 0xCBF29CE484222325
    for byte in data:
        state = (state ^ byte) * 0x100000001B3 % 2**64
    return state


@pytest.fixture
def context():
    made = Sockets()
    yield made
    made.close()


def settings(tmp_path, **fields) -> PublisherSettings:
    return PublisherSettings.model_validate(
        {"endpoint": f"ipc://{tmp_path}/pub", "replay_endpoint": f"ipc://{tmp_path}/replay"}
        | fields
    )


def scores(publisher, n=1, prompt="hello") -> None:
    for _ in range(n):
        publisher.publish_scores(
            model="org/model",
            prompt=prompt,
            pod_scores={"pod-a": 2.5},
            n_tokens=33,
            block_size=16,
            request_id="r1",
        )


def chat(publisher) -> None:
    publisher.publish_chat(
        id="chatcmpl-1",
        model="org/model",
        messages=[{"role": "user", "content": "hi"}],
        rendered_template="<hi>",
        kv_scores={"pod-a": 2.5},
        template_vars={"enable_thinking": False},
        processing_time_ms=1.5,
        n_tokens=33,
        block_size=16,
        request_id="r2",
    )


async def receive(socket, n):
    """Receive n messages without blocking the loop."""
    messages = []
    deadline = asyncio.get_running_loop().time() + 10
    while len(messages) < n:
        assert asyncio.get_running_loop().time() < deadline, f"{len(messages)} of {n}"
        try:
            messages.append(socket.recv_multipart(zmq.NOBLOCK))
        except zmq.Again:
            await asyncio.sleep(0.002)
    return messages


async def subscribed(context, endpoint, publisher, topic=b"kv."):
    """Return a SUB socket that certainly receives; what it took to find out is read away."""
    socket = context.socket(zmq.SUB)
    socket.connect(endpoint)
    socket.subscribe(topic)
    while not socket.poll(0):
        scores(publisher)
        await asyncio.sleep(0.005)
    while socket.poll(20):
        socket.recv_multipart()
    return socket


def ask(context, endpoint, start):
    socket = context.socket(zmq.DEALER)
    socket.connect(endpoint)
    socket.send_multipart([b"", start.to_bytes(8, "big")])
    return socket


def test_a_plain_subscriber_reads_scores_and_chats(context, tmp_path):
    """Topics, numbers and fields are those of the protocol; one numbering over both topics."""

    async def main() -> None:
        made = settings(tmp_path)
        publisher = Publisher(made, clock=lambda: 12.5)
        await publisher.start()
        socket = await subscribed(context, made.endpoint, publisher)
        n_before = publisher.counters.published
        scores(publisher, prompt="héllo")
        chat(publisher)
        first, second = await receive(socket, 2)
        assert [m[0] for m in (first, second)] == [b"kv.org_model", b"kv.chat.org_model"]
        numbers = [int.from_bytes(m[1], "big") for m in (first, second)]
        assert numbers == [n_before + 1, n_before + 2]
        assert msgpack.unpackb(first[2]) == {
            "prompt": "héllo",
            "model": "org/model",
            "timestamp": 12.5,
            "prompt_hash": fnv1a("héllo".encode()),
            "pod_scores": {"pod-a": 2.5},
            "n_tokens": 33,
            "block_size": 16,
            "request_id": "r1",
        }
        assert msgpack.unpackb(second[2]) == {
            "id": "chatcmpl-1",
            "model": "org/model",
            "messages": [{"role": "user", "content": "hi"}],
            "rendered_template": "<hi>",
            "kv_scores": {"pod-a": 2.5},
            "template_vars": {"enable_thinking": False},
            "timestamp": 12.5,
            "processing_time_ms": 1.5,
            "n_tokens": 33,
            "block_size": 16,
            "request_id": "r2",
        }
        await publisher.close()

    asyncio.run(main())


def test_the_first_number_is_one(context, tmp_path):
    """A subscriber that has seen nothing starts from 0 and misses nothing."""

    async def main() -> None:
        made = settings(tmp_path)
        publisher = Publisher(made)
        await publisher.start()
        scores(publisher, 3)
        reply = await receive(ask(context, made.replay_endpoint, 0), 4)
        assert [int.from_bytes(m[2], "big") for m in reply[:3]] == [1, 2, 3]
        assert reply[3] == [b"", b"", END, b""]
        await publisher.close()

    asyncio.run(main())


@pytest.mark.parametrize("start", [1, 4_000, 8_000, 8_001, 2**64 - 1])
def test_a_replay_is_complete_whatever_the_queues_hold(context, tmp_path, start):
    """An engine's replay loses what its queue cannot hold; ours waits for the asker."""

    async def main() -> None:
        made = settings(tmp_path, send_hwm=50)
        publisher = Publisher(made)
        await publisher.start()
        scores(publisher, 8_000)
        n_expected = max(0, 8_001 - start)
        reply = await receive(ask(context, made.replay_endpoint, start), n_expected + 1)
        numbers = [int.from_bytes(m[2], "big") for m in reply[:-1]]
        assert numbers == list(range(start, 8_001))[: n_expected + 1]
        assert all(m[1] == b"kv.org_model" and len(m) == 4 for m in reply[:-1])
        assert reply[-1] == [b"", b"", END, b""]
        await publisher.close()

    asyncio.run(main())


def test_two_askers_are_served_side_by_side(context, tmp_path):
    """One that does not read must not hold up another."""

    async def main() -> None:
        made = settings(tmp_path, send_hwm=10)
        publisher = Publisher(made)
        await publisher.start()
        scores(publisher, 3_000, prompt="x" * 10_000)
        stuck = context.socket(zmq.DEALER)
        stuck.set(zmq.RCVHWM, 1)
        stuck.connect(made.replay_endpoint)
        stuck.send_multipart([b"", bytes(8)])
        assert len(await receive(ask(context, made.replay_endpoint, 2_001), 1_001)) == 1_001
        await publisher.close()

    asyncio.run(main())


def test_junk_on_the_replay_socket_is_counted(context, tmp_path):
    """Bad questions get no answer, and the next good one does."""

    async def main() -> None:
        made = settings(tmp_path)
        publisher = Publisher(made)
        await publisher.start()
        scores(publisher)
        socket = context.socket(zmq.DEALER)
        socket.connect(made.replay_endpoint)
        for junk in ([b"x"], [b"", b"short"], [b"", bytes(8), b"more"]):
            socket.send_multipart(junk)
        socket.send_multipart([b"", bytes(8)])
        assert len(await receive(socket, 2)) == 2
        assert publisher.counters.replays_refused == 3
        await publisher.close()

    asyncio.run(main())


def test_the_buffer_is_bounded_by_count_and_by_bytes(tmp_path):
    """Long prompts must not fill the memory."""

    async def main() -> None:
        publisher = Publisher(settings(tmp_path, buffer_batches=100, buffer_bytes=50_000))
        await publisher.start()
        scores(publisher, 500)
        assert len(publisher._buffer) == 100
        scores(publisher, 500, prompt="x" * 10_000)
        assert len(publisher._buffer) <= 5
        assert publisher._buffer_bytes == sum(len(p) for _, _, p in publisher._buffer) <= 50_000
        await publisher.close()

    asyncio.run(main())


def test_a_slow_subscriber_costs_only_itself(context, tmp_path):
    """What it misses is counted; one that reads gets everything; publishing never blocks."""

    async def main() -> None:
        made = settings(tmp_path, send_hwm=100)
        publisher = Publisher(made)
        await publisher.start()
        slow = context.socket(zmq.SUB)
        slow.set(zmq.RCVHWM, 1)
        slow.connect(made.endpoint)
        slow.subscribe(b"")
        while not slow.poll(0):
            scores(publisher)
            await asyncio.sleep(0.005)
        socket = await subscribed(context, made.endpoint, publisher)
        n_before, got = publisher.counters.published, []
        for _ in range(200):
            scores(publisher, 20, prompt="x" * 1000)
            got += await receive(socket, 20)
        assert publisher.counters.dropped > 0
        numbers = [int.from_bytes(m[1], "big") for m in got]
        assert numbers == list(range(n_before + 1, n_before + 4001))
        await publisher.close()

    asyncio.run(main())


def test_lone_surrogates_are_published(tmp_path):
    """A client's bad text must not raise in the score path."""

    async def main() -> None:
        publisher = Publisher(settings(tmp_path))
        await publisher.start()
        scores(publisher, prompt="\ud800")
        assert msgpack.unpackb(publisher._buffer[0][2])["prompt"] == "?"
        await publisher.close()

    asyncio.run(main())


def test_without_an_endpoint_nothing_is_published():
    """Publishing is off until it is asked for."""

    async def main() -> None:
        publisher = Publisher(PublisherSettings())
        await publisher.start()
        scores(publisher)
        chat(publisher)
        assert (publisher.is_on, publisher.counters.published) == (False, 0)
        await publisher.close()

    asyncio.run(main())


@pytest.mark.parametrize("is_known", [True, False])
def test_encrypted_scores_reach_known_clients_only(context, tmp_path, monkeypatch, is_known):
    """Published prompts are the users' own words."""
    server_public, server_secret = zmq.curve_keypair()
    public, secret = zmq.curve_keypair()
    monkeypatch.setenv("TEST_SECRET", server_secret.decode())
    other, _ = zmq.curve_keypair()
    curve = CurveSettings(
        public_key=server_public.decode(),
        secret_key_env="TEST_SECRET",  # noqa: S106  # the name of a variable
        allowed_keys=((public if is_known else other).decode(),),
    )

    async def main() -> None:
        made = settings(tmp_path, curve=curve, endpoint="tcp://127.0.0.1:*", replay_endpoint=None)
        publisher = Publisher(made)
        await publisher.start()
        socket = context.socket(zmq.SUB)
        socket.set(zmq.CURVE_PUBLICKEY, public)
        socket.set(zmq.CURVE_SECRETKEY, secret)
        socket.set(zmq.CURVE_SERVERKEY, server_public)
        socket.connect(publisher.bound_endpoint)
        socket.subscribe(b"")
        for _ in range(100):
            scores(publisher)
            await asyncio.sleep(0.005)
        assert bool(socket.poll(0)) == is_known
        await publisher.close()

    asyncio.run(main())
