"""Recorded data that is too large for the repository: where it is, and the skip where it is not."""

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("KVATLAS_SHARED", Path(__file__).parents[2] / "shared"))
DATA = Path(__file__).parent / "data"


def shared(name: str) -> Path:
    """Return a file of the shared data, or skip the test."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"no {name}: set KVATLAS_SHARED to the folder that has it")
    return path
