"""The simulated engines in one process, without Ray."""

import asyncio

import aiohttp

from deployments.fleet import Fleet
from deployments.settings import Settings
from tests.ports import free_ports


def test_engines_render_by_the_settings_that_predict_them():
    """Else each request with a template of its own were scored here and refused there."""
    fleet = {"n_pods": 1, "prefill_us_per_token": 0, "decode_ms_per_token": 0}
    first = free_ports(3)
    ports = {"http": first, "event": first + 1, "replay": first + 2}
    settings = Settings.model_validate({
        "models": {"use_hub": False},
        "renderer": {"trust_request_chat_template": True},
        "fleet": {**fleet, **{f"first_{name}_port": port for name, port in ports.items()}},
    })  # fmt: skip
    chat = {"messages": [{"role": "user", "content": "hi"}], "chat_template": "x", "max_tokens": 1}

    async def main():
        engines = Fleet(settings)
        try:
            await engines.ready()
            url = f"http://127.0.0.1:{ports['http']}/v1/chat/completions"
            async with aiohttp.ClientSession() as client, client.post(url, json=chat) as answer:
                return answer.status
        finally:
            await engines.close()

    assert asyncio.run(main()) == 200
