"""A made-up engine cache: random but consistent events, and the truth about them."""

import random
from typing import Any

import numpy as np

from kvcore.events import decode_batch_by_library
from kvcore.feed import Feed
from kvcore.hashing import hash_blocks, namespace_root
from kvcore.index import BlockIndex
from tests.engine import pack

BLOCK_SIZE = 4


def root(model: str, adapter: str | None, salt: str | None) -> int:
    """Return the namespace that the tests' subscribers use."""
    return namespace_root(model, block_size=BLOCK_SIZE, lora=adapter, salt=salt)


class MadeCache:
    """Store runs of blocks behind blocks that are held, evict copies, sometimes clear.

    ``batches`` are the payloads since the last restart, by number.
    """

    def __init__(self, seed: int, rank: int | None = None, *, clears: float = 0.02) -> None:
        self._random = random.Random(seed)
        self._clears = clears  # the chance that an event is a clear
        self._rank = rank
        self._known: dict[int, tuple[int | None, list[int]]] = {}  # hash -> parent, tokens
        self._prompts: dict[int, list[int]] = {}
        self._held: dict[int, int] = {}
        self._ts = 1000.0 + seed
        self.batches: list[bytes] = []

    def step(self) -> tuple[int, bytes]:
        """Make one batch; return its number and payload."""
        events = [self._event() for _ in range(self._random.randint(1, 3))]
        self._ts += self._random.random() + 0.001
        payload = pack([self._ts, events, self._rank])
        self.batches.append(payload)
        return len(self.batches) - 1, payload

    def restart(self) -> None:
        """Start again at number 0 with a cold cache."""
        self._held.clear()
        self.batches.clear()
        self._ts += 10.0

    def _event(self) -> Any:
        choice = self._random.random()
        held = [h for h, copies in self._held.items() if copies]
        if choice < self._clears:
            self._held.clear()
            return ["AllBlocksCleared"]
        if choice < 0.4 and held:
            name = self._random.choice(held)
            self._held[name] -= 1
            return ["BlockRemoved", [name], "GPU"]
        again = [h for h, (up, _) in self._known.items() if up is None or self._held.get(up)]
        if choice < 0.5 and again:
            name = self._random.choice(again)
            self._held[name] = self._held.get(name, 0) + 1
            return self._stored([name])
        return self._stored(self._new_run(self._random.choice([None, *held])))

    def _new_run(self, parent: int | None) -> list[int]:
        run = []
        for _ in range(self._random.randint(1, 4)):
            name = self._random.getrandbits(64)
            tokens = [self._random.randrange(1000) for _ in range(BLOCK_SIZE)]
            self._known[name] = (parent, tokens)
            self._prompts[name] = [*self._prompts.get(parent or -1, []), *tokens]
            self._held[name] = 1
            run.append(name)
            parent = name
        return run

    def _stored(self, run: list[int]) -> dict[str, Any]:
        tokens = [token for name in run for token in self._known[name][1]]
        return {
            "type": "BlockStored",
            "block_hashes": run,
            "parent_block_hash": self._known[run[0]][0],
            "token_ids": tokens,
            "block_size": BLOCK_SIZE,
            "medium": "GPU",
        }

    def prompts(self) -> list[list[int]]:
        """Return every prompt whose blocks were ever stored."""
        return list(self._prompts.values())


def depths(index: BlockIndex, pod: str, prompts: list[list[int]], rank: int = 0) -> list[int]:
    """Return how many blocks of each prompt the pod holds, wherever they are in it."""
    holder = index.holder(pod, rank, "gpu", 0)
    keys = [
        hash_blocks(np.array(p, np.uint32), block_size=BLOCK_SIZE, root=root("m", None, None))
        for p in prompts
    ]
    return [int(index.presence(k, [holder])[0].sum()) for k in keys]


def truth(cache: MadeCache, prompts: list[list[int]], rank: int = 0) -> list[int]:
    """Return what `depths` is of an index that saw every batch of the cache once, in order."""
    index = BlockIndex()
    feed = Feed(index, "truth", rank, model="m", block_size=BLOCK_SIZE, model_root=root)
    for payload in cache.batches:
        feed.apply(decode_batch_by_library(payload))
    return depths(index, "truth", prompts, rank)
