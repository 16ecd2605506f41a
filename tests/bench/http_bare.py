"""The yardstick: the same work in one process, ``python -m tests.bench.http_bare CONFIG PORT``.

uvicorn and FastAPI around the very classes that the deployments are made of, with no Ray, no
proxy and no hop. It follows the same fleet, publishes and answers as the service does.
"""

import sys
import uuid
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import uvicorn
import yaml
from fastapi import FastAPI
from starlette.responses import Response

from deployments.fleet import Fleet
from deployments.index_service import IndexService
from deployments.json_http import JsonResponse
from deployments.schemas import ScoreQuery, ScoreRequest
from deployments.settings import Settings
from deployments.tokenizer import Tokenizer


def make_app(settings: Settings) -> FastAPI:
    """Return the app; only text prompts, as only those are measured."""
    tokenizer = Tokenizer(settings.model_store, settings.tokenizer)
    service = IndexService(settings)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        fleet = Fleet(settings)
        await fleet.ready()
        await tokenizer.warm()
        await service.start()
        yield
        await service.close()
        await fleet.close()

    app = FastAPI(lifespan=lifespan)

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        return {"status": "ready"}

    @app.post("/score_completions")
    async def score_completions(body: ScoreRequest) -> Response:
        assert isinstance(body.prompt, str)
        model, request_id = body.model or settings.model, uuid.uuid4().hex
        encoded = await tokenizer.encode(
            model, body.prompt, add_special_tokens=body.add_special_tokens
        )
        tokens = encoded.tokens.tobytes()
        query = ScoreQuery(tokens=tokens, model=model, request_id=request_id, prompt=body.prompt)
        answer = service.answer(query)
        return JsonResponse(
            {
                "pod_scores": answer.pod_scores(),
                "model": model,
                "prompt": body.prompt,
                "mode": answer.mode,
                "reason": answer.reason,
                "block_size": answer.block_size,
                "n_tokens": answer.n_tokens,
                "n_blocks": answer.n_blocks,
                "cached_tokens": answer.cached_tokens,
                "ranks": [score._asdict() for score in answer.scores],
                "request_id": request_id,
            }
        )

    return app


if __name__ == "__main__":
    # Its async __del__ is Serve's hook; here lifespan has closed it already.
    warnings.filterwarnings("ignore", "coroutine 'Fleet.__del__'")
    config = yaml.safe_load(Path(sys.argv[1]).read_text())
    app = make_app(Settings.model_validate(config["applications"][0]["args"]))
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), access_log=False, log_level="warning")
