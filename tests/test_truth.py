"""Predictions against what vLLM reported, on recordings of real engines."""

import asyncio
import gzip

import pytest

from tests.shared import DATA, shared
from tests.truth import check

# The one request after a lazy clear: AllBlocksCleared comes with the engine's next step, so an
# idle, reset pod still looks warm.
LAZY = ["after_reset"]
# A request that asks for a full report announces blocks again that are cached already. Nothing on
# the wire tells that from a second copy, so one eviction later the pod looks warmer than it is.
ANNOUNCED_AGAIN = ["full_check"]


@pytest.mark.parametrize(
    ("name", "total", "missed"),
    [
        ("lora", 21, LAZY),
        ("cbor_seed", 25, LAZY),
        ("dp2", 35, LAZY),
        ("default128", 45, LAZY),
        ("dups", 177, ANNOUNCED_AGAIN),
    ],
)
def test_predictions_equal_what_the_engine_reported(name, total, missed):
    """The product's claim: the tokens that a pod will not compute, exactly."""
    verdict = asyncio.run(check(shared(f"captures/{name}.jsonl").read_text()))
    assert verdict.total == total
    assert [miss.phase for miss in verdict.misses] == missed


def test_a_hybrid_model_with_long_hashes_is_predicted_exactly():
    """Five sliding-window groups beside one of full attention, recorded from vLLM 0.32.

    Its cache is too small, so the groups keep different blocks and name some of them only.
    """
    recording = gzip.decompress((DATA / "hybrid_recording.jsonl.gz").read_bytes()).decode()
    verdict = asyncio.run(check(recording))
    assert (verdict.total, verdict.misses) == (70, [])
