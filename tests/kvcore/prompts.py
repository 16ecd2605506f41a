"""Small prompts, and the two calls that most tests of the index make."""

import numpy as np

from kvcore.hashing import hash_blocks
from kvcore.scorer import score

SIZE = 4  # tokens per block
WEIGHTS = {"gpu": 1.0, "cpu": 0.8}


def prompt(n_blocks, seed=0):
    return np.random.default_rng(seed).integers(0, 1 << 17, n_blocks * SIZE, dtype=np.uint32)


def store(index, holder, names, tokens, parent=None, **kwargs):
    return index.store(holder, names, parent, tokens, block_size=SIZE, **kwargs)


def hits(index, tokens, **kwargs):
    """Leading blocks per pod."""
    keys = hash_blocks(tokens, block_size=SIZE, **kwargs)
    return {s.pod: s.blocks for s in score(index, keys, tier_weights=WEIGHTS)}
