"""Scores: how many leading blocks of a prompt each pod holds, and what they are worth by tier."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvcore.hashing import BlockKeys
from kvcore.holders import Scope
from kvcore.index import BlockIndex


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
    members = index.members
    leading: dict[tuple[str, int], dict[Scope, int]] = {}
    scope_numbers, blocks = index.match(keys).tolist()
    for number, n_blocks in zip(scope_numbers, blocks, strict=True):
        scope = members.scope_at[number]
        if pods is None or scope[0] in pods:
            leading.setdefault(scope[:2], {})[scope] = n_blocks
    for pod, rank, _ in index.windows:  # a window needs no first block
        if (pod, rank) in members.ranks and (pods is None or pod in pods):
            leading.setdefault((pod, rank), {})
    scores = []
    for (pod, rank), hits in leading.items():
        scopes = members.ranks[pod, rank]
        tiers = members.of_scope(scopes[0])
        if len(scopes) == len(tiers) == 1 and not index.windows.get(scopes[0]):
            tier, n = members.names[tiers[0]].tier, hits.get(scopes[0], 0)
            found = n, n * tier_weights.get(tier, lowest), {tier: n}
        else:
            found = _score_mixed(index, keys, scopes, hits, tier_weights)
        if found[0]:
            scores.append(PodScore(pod, rank, *found))
    return sorted(scores, key=lambda s: (-s.score, s.pod, s.rank))


def _score_mixed(
    index: BlockIndex,
    keys: BlockKeys,
    scopes: list[Scope],
    hits: Mapping[Scope, int],
    tier_weights: Mapping[str, float],
) -> tuple[int, float, dict[str, int]]:
    """Score a rank with more than one tier or group: blocks, score, blocks by tier."""
    full = [scope for scope in scopes if index.windows.get(scope) is None]
    limit = min((hits.get(scope, 0) for scope in full), default=keys.size)
    if not limit:
        return 0, 0.0, {}
    tiers = {scope: index.members.of_scope(scope) for scope in scopes}
    rows = iter(index.presence(keys[:limit], [i for ids in tiers.values() for i in ids]))
    held = {scope: np.array([next(rows) for _ in ids]) for scope, ids in tiers.items()}
    anywhere = {s: np.asarray(held[s].any(axis=0)) for s in scopes}
    end = hit_end(anywhere, {s: index.windows.get(s) for s in scopes}, limit)
    # The first group with full attention has every block of the hit; it says what they are worth.
    main, lowest = (full or scopes)[0], min(tier_weights.values(), default=1.0)
    names = [index.members.names[i].tier for i in tiers[main]]
    weights = np.array([[tier_weights.get(tier, lowest)] for tier in names])
    seen = held[main][:, :end]
    worth = np.where(seen, weights, -np.inf).max(axis=0, initial=-np.inf)
    worth[np.isinf(worth)] = lowest  # left behind by a window
    counts = seen.sum(axis=1).tolist()
    return end, float(worth.sum()), {t: n for t, n in zip(names, counts, strict=True) if n}


def hit_end(
    held: Mapping[Scope, NDArray[np.bool_]], windows: Mapping[Scope, int | None], n_keys: int
) -> int:
    """Return the longest hit that every group of a rank can serve.

    held [n_keys] per group. A full-attention group must hold all blocks before the end, a sliding
    one the last ``window`` of them.
    """
    end, settled = n_keys, False
    while not settled:
        settled = True
        for scope, blocks in held.items():
            window = windows[scope]
            start = 0 if window is None else max(0, end - window)
            missing = np.flatnonzero(~blocks[start:end])
            if missing.size:  # to before the hole: the first of full attention, a window's last
                end = start + int(missing[0 if window is None else -1])
                settled = False
    return end
