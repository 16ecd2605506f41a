"""A paged KV cache with the rules of vLLM's block pool, for the simulated engines.

What it keeps to, because the index is judged against it:

- Only full blocks are cached, and the last token of a prompt is always computed, so a
  hit covers at most ``(n_tokens - 1) // block_size`` blocks.
- Freed blocks stay cached until their memory is needed: least recently used first, and
  within one sequence the tail first.
- Two physical blocks may hold the same content (two copies of one engine hash); each is
  announced when it fills and again when it is evicted.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from hashlib import sha256
from typing import NamedTuple

import numpy as np

from kvcore.errors import InvalidInputError
from kvcore.tokens import Tokens


class StoredRun(NamedTuple):
    """Blocks that became reusable together, in prompt order."""

    hashes: list[int]
    parent: int | None
    tokens: list[int]
    extra_keys: list[list[str] | None]  # one entry per block; the salt rides on block 0


class RemovedBlock(NamedTuple):
    """One physical copy of a block whose memory was taken for something else."""

    hash: int


CacheEvent = StoredRun | RemovedBlock


@dataclass(slots=True)
class _Block:
    """One page of KV memory."""

    number: int
    users: int = 0
    hash: int | None = None  # set once full and reusable


@dataclass
class Sequence:
    """One running request: its computed tokens and the blocks that hold them."""

    tokens: list[int]
    salt: str | None
    n_cached_tokens: int  # the hit that the engine reports
    reserved_blocks: int = 0  # promised for tokens still to come
    blocks: list[_Block] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)  # one per full block, in order


class PagedCache:
    """The KV memory of one engine: allocate, extend, free; events say what changed.

    Not thread-safe; the engine's event loop owns it. Events accumulate in order until
    ``take_events`` hands them over, as one engine step publishes one batch.
    """

    def __init__(self, *, capacity_blocks: int, block_size: int) -> None:
        self.block_size, self.capacity_blocks = block_size, capacity_blocks
        self._free = OrderedDict((n, _Block(n)) for n in range(capacity_blocks))  # oldest first
        self._cached: dict[int, dict[int, _Block]] = {}  # engine hash -> copies by number
        self._reserved_blocks = 0
        self._events: list[CacheEvent] = []

    def fits(self, n_tokens: int) -> bool:
        """Tell whether a sequence that may grow to ``n_tokens`` can start now."""
        return self._blocks_for(n_tokens) <= len(self._free) - self._reserved_blocks

    def could_ever_fit(self, n_tokens: int) -> bool:
        """Tell whether an empty cache would hold ``n_tokens``."""
        return self._blocks_for(n_tokens) <= self.capacity_blocks

    def start(self, prompt: Tokens, *, n_new_tokens: int = 0, salt: str | None = None) -> Sequence:
        """Place a prompt: reuse its cached prefix, compute the rest, promise room to grow.

        Raises:
            InvalidInputError: The prompt is empty, or prompt and new tokens do not fit now.
        """
        tokens = prompt.tolist()
        if not tokens:
            raise InvalidInputError("an engine cannot run an empty prompt")
        if not self.fits(len(tokens) + n_new_tokens):
            raise InvalidInputError(
                f"{len(tokens):,} prompt and {n_new_tokens:,} new tokens do not fit the KV memory"
            )
        hashes = self._chain(tokens, salt)
        hits: list[_Block] = []
        for block_hash in hashes[: (len(tokens) - 1) // self.block_size]:
            copies = self._cached.get(block_hash)
            if not copies:
                break
            hits.append(next(iter(copies.values())))
        for block in hits:
            self._use(block)
        sequence = Sequence(tokens, salt, len(hits) * self.block_size)
        n_prompt_blocks = self._blocks_for(len(tokens))
        sequence.blocks = [*hits, *(self._take_free() for _ in range(n_prompt_blocks - len(hits)))]
        sequence.hashes = hashes[: len(hits)]
        sequence.reserved_blocks = self._blocks_for(len(tokens) + n_new_tokens) - n_prompt_blocks
        self._reserved_blocks += sequence.reserved_blocks
        self._publish_full(sequence, hashes)
        return sequence

    def extend(self, sequence: Sequence, token: int) -> None:
        """Append one computed token, as a decode step does.

        Raises:
            InvalidInputError: More tokens than ``start`` was told of.
        """
        if len(sequence.tokens) == len(sequence.blocks) * self.block_size:
            if not sequence.reserved_blocks:
                raise InvalidInputError("the sequence grew beyond its promised tokens")
            sequence.reserved_blocks -= 1
            self._reserved_blocks -= 1
            sequence.blocks.append(self._take_free())
        sequence.tokens.append(token)
        n_full = len(sequence.tokens) // self.block_size
        if n_full > len(sequence.hashes):
            self._publish_full(sequence, [*sequence.hashes, self._next_hash(sequence, n_full)])

    def finish(self, sequence: Sequence) -> None:
        """Give the blocks back, tail first; full ones stay cached until evicted."""
        self._reserved_blocks -= sequence.reserved_blocks
        sequence.reserved_blocks = 0
        for block in reversed(sequence.blocks):
            block.users -= 1
            if not block.users:
                self._free[block.number] = block
        sequence.blocks = []

    def clear(self) -> bool:
        """Forget every cached block; refused, as in vLLM, while a sequence runs."""
        if len(self._free) != self.capacity_blocks:
            return False
        for block in self._free.values():
            block.hash = None
        self._cached.clear()
        return True

    def take_events(self) -> list[CacheEvent]:
        """Hand over what changed since the last call, in order."""
        events, self._events = self._events, []
        return events

    def copies(self) -> dict[int, int]:
        """Return the truth: copies held per engine hash."""
        return {block_hash: len(blocks) for block_hash, blocks in self._cached.items()}

    def _blocks_for(self, n_tokens: int) -> int:
        return -(-n_tokens // self.block_size)

    def _use(self, block: _Block) -> None:
        if not block.users:
            del self._free[block.number]
        block.users += 1

    def _take_free(self) -> _Block:
        _, block = self._free.popitem(last=False)
        block.users = 1
        if block.hash is not None:
            copies = self._cached[block.hash]
            del copies[block.number]
            if not copies:
                del self._cached[block.hash]
            self._events.append(RemovedBlock(block.hash))
            block.hash = None
        return block

    def _publish_full(self, sequence: Sequence, hashes: list[int]) -> None:
        """Make every newly full block reusable and announce them as one run."""
        first, size = len(sequence.hashes), self.block_size
        fresh = hashes[first:]
        if not fresh:
            return
        for block, block_hash in zip(sequence.blocks[first:], fresh, strict=False):
            block.hash = block_hash
            self._cached.setdefault(block_hash, {})[block.number] = block
        salted = [[sequence.salt]] if sequence.salt and not first else [None]
        self._events.append(
            StoredRun(
                hashes=fresh,
                parent=hashes[first - 1] if first else None,
                tokens=sequence.tokens[first * size : len(hashes) * size],
                extra_keys=[*salted, *[None] * (len(fresh) - 1)],
            )
        )
        sequence.hashes = hashes

    def _chain(self, tokens: list[int], salt: str | None) -> list[int]:
        size, hashes = self.block_size, []
        previous: int | None = None
        for end in range(size, len(tokens) + 1, size):
            previous = _engine_hash(previous, tokens[end - size : end], salt)
            hashes.append(previous)
        return hashes

    def _next_hash(self, sequence: Sequence, n_full: int) -> int:
        parent = sequence.hashes[-1] if sequence.hashes else None
        start = (n_full - 1) * self.block_size
        return _engine_hash(parent, sequence.tokens[start : start + self.block_size], sequence.salt)


def _engine_hash(parent: int | None, tokens: list[int], salt: str | None) -> int:
    """Hash as an engine might; deliberately unlike kvcore.hashing, which must not matter."""
    head = (salt or "").encode() if parent is None else parent.to_bytes(8, "big")
    digest = sha256(b"%d:" % len(head) + head + np.asarray(tokens, dtype=np.uint32).tobytes())
    return int.from_bytes(digest.digest()[-8:], "big")
