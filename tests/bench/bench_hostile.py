"""Latency of normal chats beside hostile requests, in one process and one run.

    python -m tests.bench.bench_hostile

A stream of 200 chats a second is rendered and tokenized, alone and beside requests that
try to burn time or memory, one after the other without a pause. Milliseconds.
"""

import asyncio
import time

from deployments.models import ModelStore
from deployments.renderer import Renderer
from deployments.settings import ModelsSettings, RendererSettings
from deployments.tokenizer import Tokenizer
from kvcore.errors import InvalidInputError

_USER = {"role": "user", "content": "What is the weather like in Oslo today? " * 60}
_CHAT = {"messages": [{"role": "system", "content": "Be brief."}, _USER]}


def _with_template(template: str) -> dict:
    return {"messages": [_USER], "chat_template": template}


HOSTILE = {
    "nothing": None,
    "9 ** 9999999": _with_template("{{ 9 ** 9999999 }}"),
    "'a' * 2e8": _with_template("{{ 'a' * 200000000 }}"),
    "tojson(indent=1e8)": _with_template("{{ messages|tojson(indent=100000000) }}"),
    "nested ranges": _with_template(
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    ),
    "escape": _with_template("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    "10 MB content": {"messages": [{"role": "user", "content": "x" * 10_000_000}]},
    "100,000 messages": {"messages": [_USER] * 100_000},
    "2,048 messages": {"messages": [{"role": "user", "content": "hi"}] * 2048},
    "nothing again": None,
}


async def main(seconds: float = 4.0) -> None:
    """Print a table."""
    models = ModelsSettings(use_hub=False, cache_dir="/nonexistent")
    store = ModelStore(models)
    renderer = Renderer(models, RendererSettings(trust_request_chat_template=True), store=store)
    tokenizer = Tokenizer(models, store=store)
    await renderer.warm()
    print(f"{'beside':24}{'p50':>8}{'p99':>8}{'worst':>8}   hostile requests answered")
    for name, request in HOSTILE.items():
        done = asyncio.Event()
        attack = asyncio.create_task(_attack(renderer, request, done))
        times = sorted(await _stream(renderer, tokenizer, seconds))
        done.set()
        n, answer = await attack
        p50, p99 = (times[int(len(times) * q)] * 1e3 for q in (0.5, 0.99))
        print(f"{name:24}{p50:8.2f}{p99:8.2f}{times[-1] * 1e3:8.2f}   {n:4} {answer[:60]}")
    renderer.close()


async def _stream(renderer, tokenizer, seconds):
    async def serve(due):
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        rendered = await renderer.render(_CHAT)
        await tokenizer.encode(rendered.model, rendered.text, add_special_tokens=False)
        return time.perf_counter() - due

    start = time.perf_counter() + 0.1
    return await asyncio.gather(*(serve(start + at / 200) for at in range(int(seconds * 200))))


async def _attack(renderer, request, done):
    n, answer = 0, ""
    while request is not None and not done.is_set():
        try:
            answer = f"rendered {len((await renderer.render(request)).text)} characters"
        except InvalidInputError as error:
            answer = f"{type(error).__name__}: {error}"
        n += 1
        await asyncio.sleep(0)
    return n, answer


if __name__ == "__main__":
    asyncio.run(main())
