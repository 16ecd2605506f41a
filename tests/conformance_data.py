"""Recorded behaviour of transformers, tokenizers and vLLM: samples here, full sets beside.

The samples in ``tests/data`` run everywhere; full sets are too large for the repository.
"""

import gzip
import json
from functools import cache
from typing import Any

from tests.shared import DATA, shared


@cache
def chat_samples() -> dict[str, Any]:
    """Return templates, ``apply_chat_template`` cases and what vLLM 0.33 made of requests."""
    return json.loads(gzip.decompress((DATA / "chat_templates.json.gz").read_bytes()))


@cache
def selection_samples() -> dict[str, Any]:
    """Return model folders, and which template transformers takes for what request."""
    return json.loads(gzip.decompress((DATA / "template_selection.json.gz").read_bytes()))


def full_set(name: str) -> list[dict[str, Any]]:
    """Return a full set's rows, or skip the test."""
    path = shared(f"templates/{name}")
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    return json.loads(text) if text.startswith("[") else [json.loads(x) for x in text.splitlines()]


def full_template(file: str) -> str:
    """Return a template of the full set, newlines as they are."""
    return shared(f"templates/templates/{file}").read_bytes().decode()
