"""The ingress as a plain class: no Ray, no engines, one event loop, real HTTP."""

import asyncio
import contextlib

import aiohttp
import uvicorn
from aiohttp import web

from deployments.indexer import Indexer
from deployments.ingress import Ingress
from deployments.settings import Settings

_CHAT = {"messages": [{"role": "user", "content": "Who will answer, with no engine at all?"}]}


@contextlib.asynccontextmanager
async def _serving(args, *, kind=Indexer):
    """Serve one ingress and its indexer on a free port; yields a client session."""
    settings = Settings.model_validate({"block_size": 4, "models": {"use_hub": False}, **args})
    indexer = kind(settings)
    ingress = Ingress(settings, indexer)
    config = uvicorn.Config(
        ingress.app(), host="127.0.0.1", port=0, log_level="error", ws="none", lifespan="off"
    )
    server = uvicorn.Server(config)
    listener = config.bind_socket()
    listener.listen()
    running = asyncio.create_task(server.serve(sockets=[listener]))
    port = listener.getsockname()[1]
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as client:
            await indexer._starting  # the kernels are compiled meanwhile
            yield client
    finally:
        server.should_exit = True
        await running
        await ingress.close()
        await indexer.close()


async def _post(client, path, body):
    async with client.post(path, json=body) as answer:
        return answer, await answer.json()


def test_without_an_engine_it_answers_by_itself():
    """As the original does: what rendering and the index found, and that nothing was generated."""

    async def main():
        async with _serving({}) as client:
            answer, body = await _post(client, "/v1/chat/completions", _CHAT)
            assert answer.status == 200
            text = body["choices"][0]["message"]["content"]
            assert text.startswith("Based on the rendered template and KV-cache analysis")
            _, ids = await _post(client, "/tokenize", _CHAT)
            assert body["usage"]["prompt_tokens"] == ids["count"] > 0
            assert f"{ids['count']} tokens" in text
            async with client.post(
                "/v1/chat/completions", json={**_CHAT, "stream": True}
            ) as stream:
                events = (await stream.text()).split("\n\n")
            assert events[-2] == "data: [DONE]"
            assert "Based on the rendered template" in events[0]

    asyncio.run(main())


def test_tokenize_takes_and_gives_what_vllms_does():
    """Its clients know count, tokens and token_strs, and may send an empty prompt or a chat."""

    async def main():
        async with _serving({}) as client:
            asked = {"prompt": "Hello wörld", "return_token_strs": True}
            _, said = await _post(client, "/tokenize", asked)
            assert said["token_strs"] == ["Hello", "Ġw", "Ã¶", "r", "ld"]
            assert said["count"] == len(said["tokens"]) == 5
            chat = {**_CHAT, "return_token_strs": True, "add_generation_prompt": False}
            _, said = await _post(client, "/tokenize", chat)
            assert said["token_strs"][0] == "<|im_start|>"
            _, said = await _post(client, "/tokenize", {"prompt": ""})
            assert (said["count"], said["tokens"], said["token_strs"]) == (0, [], None)
            for body in ({"prompt": [1]}, {"prompt": "a", "n": 1}, {"prompt": "a", "model": 5}):
                answer, _ = await _post(client, "/tokenize", body)
                assert answer.status == 400

    asyncio.run(main())


def test_a_completion_whose_prompt_the_engine_changes_is_refused_by_name():
    """A score for the prompt as it was sent would be wrong without a sign."""

    async def main():
        async with _serving({}) as client:
            for field, value in (
                ("suffix", "b"), ("truncate_prompt_tokens", 5), ("prompt_embeds", "AAAA"),
            ):  # fmt: skip
                body = {"prompt": "a", field: value}
                answer, said = await _post(client, "/v1/completions", body)
                assert (answer.status, said["error"]["param"]) == (400, field)

    asyncio.run(main())


def test_an_index_that_does_not_answer_in_time_is_said_and_not_waited_for():
    """Nobody hangs on a stuck indexer: without an engine to route to, it is a 503."""

    class Stuck(Indexer):
        async def score(self, queries):
            await asyncio.Event().wait()
            return await super().score(queries)

    async def main():
        async with _serving({"index": {"answer_timeout_s": 0.05}}, kind=Stuck) as client:
            for path, body in (
                ("/v1/chat/completions", _CHAT),
                ("/score_completions", {"prompt": "who knows"}),
            ):
                answer, said = await _post(client, path, body)
                assert answer.status == 503
                assert said["error"]["message"] == "the index did not answer in 0.05 s"

    asyncio.run(main())


def test_a_pod_that_is_down_is_passed_over_and_said():
    """Only a refused connection moves on to the next pod; the answer names the pod that failed."""

    async def answer_once(_request):
        return web.json_response({"choices": [], "usage": {"prompt_tokens": 1}})

    async def main():
        engine = web.Application()
        engine.add_routes([web.post("/v1/completions", answer_once)])
        runner = web.AppRunner(engine)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        pods = [
            {"name": "a-down", "url": "http://127.0.0.1:1", "events": "tcp://127.0.0.1:1"},
            {"name": "b-up", "url": f"http://127.0.0.1:{port}", "events": "tcp://127.0.0.1:1"},
        ]
        try:
            async with _serving({"events": {"pods": pods}}) as client:
                first, _ = await _post(client, "/v1/completions", {"prompt": "hello"})
                assert (first.status, first.headers["x-kvatlas-pod"]) == (200, "b-up")
                assert first.headers["x-kvatlas-failed-over-from"].startswith("a-down")
                second, _ = await _post(client, "/v1/completions", {"prompt": "hello"})
                assert "x-kvatlas-failed-over-from" not in second.headers
                await runner.cleanup()
                third, body = await _post(client, "/v1/completions", {"prompt": "hello"})
                assert third.status == 502
                assert "a-down" in body["error"]["message"]
                assert "b-up" in body["error"]["message"]
        finally:
            await runner.cleanup()

    asyncio.run(main())
