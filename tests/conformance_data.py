"""Recorded behaviour of transformers, tokenizers and vLLM: samples here, full sets beside.

The samples in ``tests/data`` run everywhere. Full sets are read from the folder that
``KVATLAS_SHARED`` names (``../shared`` by default); tests skip where it is not there.
"""

import gzip
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest

_DATA = Path(__file__).parent / "data"
_SHARED = Path(os.environ.get("KVATLAS_SHARED", Path(__file__).parents[2] / "shared"))


@cache
def chat_samples() -> dict[str, Any]:
    """Return templates, ``apply_chat_template`` cases and what vLLM 0.33 made of requests."""
    return json.loads(gzip.decompress((_DATA / "chat_templates.json.gz").read_bytes()))


@cache
def selection_samples() -> dict[str, Any]:
    """Return model folders, and which template transformers takes for what request."""
    return json.loads(gzip.decompress((_DATA / "template_selection.json.gz").read_bytes()))


def full_set(name: str) -> list[dict[str, Any]]:
    """Return a full set's rows, or skip the test."""
    path = _SHARED / "templates" / name
    if not path.exists():
        pytest.skip(f"no {path.name}: set KVATLAS_SHARED to a folder that has templates/{name}")
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    return json.loads(text) if text.startswith("[") else [json.loads(x) for x in text.splitlines()]


def full_template(file: str) -> str:
    """Return a template of the full set, newlines as they are."""
    return (_SHARED / "templates" / "templates" / file).read_bytes().decode()
