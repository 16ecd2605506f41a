"""Scores: how many leading blocks of a prompt each pod holds, and what they are worth by tier."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvcore.hashing import BlockKeys
from kvcore.index import BlockIndex, Holder


class PodScore(NamedTuple):
    """One data-parallel rank of one pod, against one prompt."""

    pod: str
    rank: int
    blocks: int  # leading blocks that can be reused: held in any tier, windows respected
    score: float  # those blocks, each weighted by the best tier that holds it
    by_tier: dict[str, int]  # of those blocks, how many each tier holds


def score(
    index: BlockIndex,
    keys: BlockKeys,
    *,
    tier_weights: Mapping[str, float],
    pods: Collection[str] | None = None,
) -> list[PodScore]:
    """Score a prompt against every pod, best first; a pod without a leading block is absent.

    Args:
        index: The index.
        keys: Block keys [n_blocks] uint64 of the prompt, from `hash_blocks`.
        tier_weights: Worth of a block by tier; an unlisted tier weighs as the least listed one.
        pods: Score these alone.
    """
    lowest = min(tier_weights.values(), default=1.0)
    ranks: dict[tuple[str, int], list[tuple[int, Holder]]] = {}
    for number, holder in index.holders().items():
        if pods is None or holder.pod in pods:
            ranks.setdefault((holder.pod, holder.rank), []).append((number, holder))
    scores = []
    for (pod, rank), holders in ranks.items():
        seen = index.presence(keys, [number for number, _ in holders])
        groups = sorted({h.group for _, h in holders})
        union = {g: seen[[h.group == g for _, h in holders]].any(axis=0) for g in groups}
        windows = {g: index.window((pod, rank, g)) for g in groups}
        end = hit_end(union, windows, keys.size)
        if not end:
            continue
        main = min((g for g in groups if windows[g] is None), default=groups[0])
        worth = np.full(end, -np.inf)
        by_tier: dict[str, int] = {}
        for (_, h), row in zip(holders, seen[:, :end], strict=True):
            if h.group == main:
                weight = tier_weights.get(h.tier, lowest)
                worth = np.where(row, np.maximum(worth, weight), worth)
                if row.any():
                    by_tier[h.tier] = int(row.sum())
        worth[np.isinf(worth)] = lowest  # left behind by a sliding window, needed by nobody
        scores.append(PodScore(pod, rank, end, float(worth.sum()), by_tier))
    return sorted(scores, key=lambda s: (-s.score, s.pod, s.rank))


def hit_end(
    union: Mapping[int, NDArray[np.bool_]], windows: Mapping[int, int | None], n_keys: int
) -> int:
    """Return the longest hit that every group of a rank can serve.

    A full-attention group must hold all blocks before the end, a sliding one the last
    ``window`` of them.
    """
    end, settled = n_keys, False
    while not settled:
        settled = True
        for group, held in union.items():
            window = windows[group]
            start = 0 if window is None else max(0, end - window)
            missing = np.flatnonzero(~held[start:end])
            if (
                missing.size
            ):  # shorten to before the hole: the first for full, the last for a window
                end = start + int(missing[0 if window is None else -1])
                settled = False
    return end
