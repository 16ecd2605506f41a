"""The whole graph on one screen: which deployment calls which.

    HTTP ─▶ Ingress ──(renderer, tokenizer: inline or deployments)──▶ Indexer ◀─ZMQ─ engines
               └──HTTP──▶ the pod with the best score                    └─ZMQ─▶ subscribers
"""

import os
from typing import Any

from ray import serve
from ray.serve import Application

from deployments.fleet import Fleet
from deployments.indexer import Indexer
from deployments.ingress import Ingress
from deployments.renderer import Renderer
from deployments.settings import Settings, with_environment
from deployments.tokenizer import Tokenizer

# Serve's defaults are one CPU and five requests a replica: too much and too few here.
_SMALL: dict[str, Any] = {"ray_actor_options": {"num_cpus": 0.1}, "max_ongoing_requests": 1000}


def build(settings: Settings) -> Application:
    """Wire the graph; replica counts live in the YAML, by deployment name."""
    settings = with_environment(settings, os.environ)

    def place(cls: type, name: str, *arguments: Any) -> Application:
        return serve.deployment(cls, name=name, **_SMALL).bind(*arguments)

    indexer = place(Indexer, "Indexer", settings)
    renderer = tokenizer = fleet = None
    if settings.renderer.placement == "deployment":
        renderer = place(Renderer, "Renderer", settings.model_store, settings.renderer)
    if settings.tokenizer.placement == "deployment":
        tokenizer = place(Tokenizer, "Tokenizer", settings.model_store, settings.tokenizer)
    if settings.fleet is not None:
        fleet = place(Fleet, "Fleet", settings)
    ingress = serve.ingress()(Ingress)
    return place(ingress, "Ingress", settings, indexer, renderer, tokenizer, fleet)
