"""From decoded events to the index: one feed per data-parallel rank of a pod.

What the events mean is decided here: tiers and cache groups become holders, adapters and salts
choose the chain's namespace, other extra keys go into the blocks they belong to, and whatever
cannot be indexed exactly leaves a doubt that the pod's state shows until its cache is cleared.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np

from kvcore.errors import InvalidInputError
from kvcore.events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    Event,
    EventBatch,
    Hashes,
)
from kvcore.index import BlockIndex
from kvcore.tokens import Tokens

ModelRoot = Callable[[str, str | None, str | None], int]  # (model, adapter, salt) -> namespace

MAX_HOLDERS = 64  # of one rank
MAX_WORD = 256  # characters of a tier's name, and of an adapter and a salt that are remembered
DEFAULT_TIER = "gpu"  # engines before the medium field had no other

_FULL_KINDS = frozenset({"full_attention", "mla_attention", "sink_full_attention"})


@dataclass
class FeedCounters:
    """What became of a rank's events and blocks."""

    stored_events: int = 0
    removed_events: int = 0
    clears: int = 0
    blocks_stored: int = 0
    blocks_removed: int = 0
    unknown_events: int = 0  # kinds we do not know: skipped
    bad_events: int = 0  # kinds we know, with fields that make no sense
    refused_events: int = 0  # of another block size, or whose parts do not fit
    unknown_removals: int = 0  # blocks the holder did not have
    unresolved_blocks: int = 0  # named by hash alone, and never seen before
    refused_batches: int = 0  # of another rank
    failed_batches: int = 0  # by a bug of ours
    replaced_blocks: int = 0  # engine hashes that named another block before


class Feed:
    """Apply the batches of one (pod, rank) to the index."""

    def __init__(
        self,
        index: BlockIndex,
        pod: str,
        rank: int,
        *,
        model: str,
        block_size: int,
        model_root: ModelRoot,
    ) -> None:
        self._index, self.pod, self.rank, self.model = index, pod, rank, model
        self._block_size, self._model_root = block_size, model_root
        self.counters = FeedCounters()
        self.doubt: str | None = None  # the first reason why the blocks are not exact
        self._holders: dict[tuple[str | None, int | None], int] = {}
        # What is known of groups outlives this process, in the index's snapshot.
        windows = {g: n for (p, r, g), n in index.windows.items() if (p, r) == (pod, rank)}
        self._windowed = {g for g, n in windows.items() if n}  # of which the last blocks count
        self._full = {g for g, n in windows.items() if not n}
        self._attention: dict[int, tuple[str | None, int | None]] = {}
        self._roots: dict[tuple[str | None, str | None], int] = {}

    def apply(self, batch: EventBatch) -> None:
        """Apply a batch's events in order; what it cannot use is counted, and never raises."""
        for event in self._in_order(batch.events):
            try:
                if isinstance(event, BlockStored):
                    self._store(event)
                elif isinstance(event, BlockRemoved):
                    self._remove(event)
                else:
                    self.counters.clears += 1
                    self.clear()
            except InvalidInputError as exc:
                self._refuse(str(exc))
        for skipped in batch.skipped:
            if skipped.is_known:
                self.counters.bad_events += 1
                self._refuse(f"a {skipped.kind} event has bad fields ({skipped.reason})", count=0)
            else:
                self.counters.unknown_events += 1

    def _in_order(self, events: list[Event]) -> list[Event]:
        """Put full attention first where it matters: sliding groups name blocks by its hashes."""
        if len(events) < 2:
            return events
        for event in events:
            if isinstance(event, BlockStored) and (
                event.kv_cache_spec_sliding_window or event.kv_cache_spec_kind == "mamba"
            ):
                self._windowed.add(event.group_idx or 0)
        if not self._windowed:
            return events
        epoch, keys = 0, []
        for event in events:
            if isinstance(event, AllBlocksCleared):
                epoch += 1
                keys.append((2 * epoch, 0))
            else:
                keys.append((2 * epoch + 1, int((event.group_idx or 0) in self._windowed)))
        return [events[i] for i in sorted(range(len(events)), key=keys.__getitem__)]

    def clear(self) -> int:
        """Drop the rank's blocks, and with them every doubt; return how many there were."""
        self.doubt = None
        return self._index.clear_pod(self.pod, self.rank)

    def reset(self) -> int:
        """Forget the rank's tiers and groups as well: its engine may come back with others."""
        self.doubt = None
        for known in (self._holders, self._windowed, self._full, self._attention):
            known.clear()
        return self._index.drop_pod(self.pod, self.rank)

    def _store(self, event: BlockStored) -> None:
        self.counters.stored_events += 1
        holder = self._holder(event.medium, event.group_idx)
        if event.token_ids.size == 0:
            unresolved = self._index.store_known(holder, event.block_hashes)
            self.counters.blocks_stored += len(event.block_hashes) - unresolved
            if unresolved:
                self.counters.unresolved_blocks += unresolved
                self._doubt("blocks were announced by hashes never seen before")
            return
        if event.block_size != self._block_size:
            self._refuse(
                f"its blocks have {event.block_size} tokens, the index has {self._block_size}"
            )
            return
        self._note_attention(event)
        if event.is_bigram:
            self._doubt("EAGLE token pairs: a block also depends on the token after it")
        root, extras = self._namespace(event)
        if (event.group_idx or 0) in self._windowed and self._store_windowed(
            holder, event, root, extras
        ):
            return
        self._store_run(
            holder, event.block_hashes, event.parent_block_hash, event.token_ids, root, extras
        )

    def _store_run(  # noqa: PLR0917  # a run of blocks is these six
        self,
        holder: int,
        hashes: Hashes,
        parent: int | bytes | None,
        tokens: Tokens,
        root: int | None,
        extras: dict[int, bytes] | None,
    ) -> None:
        result = self._index.store(
            holder, hashes, parent, tokens, block_size=self._block_size, root=root, extras=extras
        )
        self.counters.blocks_stored += len(hashes)
        self.counters.replaced_blocks += result.replaced

    def _store_windowed(
        self, holder: int, event: BlockStored, root: int | None, extras: dict[int, bytes] | None
    ) -> bool:
        """Store blocks of a sliding-window group, whose holes the full group fills.

        Such a group has no blocks outside its windows, nor mamba where no state was kept: neither
        its parent nor all of its tokens' blocks need be there. Engine hashes are the same in all
        groups, so the full group, which has them all, tells which blocks are meant. False: it does
        not know the parent.
        """
        full = self._holder(event.medium, min(self._full, default=0))
        if len(event.block_hashes) * self._block_size == event.token_ids.size:
            parent = event.parent_block_hash
            if parent is not None:
                root = self._index.key_of(holder, parent) or self._index.key_of(full, parent)
                if root is None:
                    return False
            self._store_run(holder, event.block_hashes, None, event.token_ids, root, extras)
            return True
        names = event.block_hashes
        known = [self._index.key_of(full, n if isinstance(n, bytes) else int(n)) for n in names]
        keys = [key for key in known if key is not None]
        if len(keys) < len(known):
            raise InvalidInputError("a sliding group names a block that the full one does not")
        self._index.store_keys(holder, names, np.array(keys, dtype=np.uint64))
        self.counters.blocks_stored += len(names)
        return True

    def _remove(self, event: BlockRemoved) -> None:
        self.counters.removed_events += 1
        holder = self._holder(event.medium, event.group_idx)
        unknown = self._index.remove(holder, event.block_hashes)
        self.counters.blocks_removed += len(event.block_hashes) - unknown
        self.counters.unknown_removals += unknown

    def _holder(self, medium: str | None, group: int | None) -> int:
        holder = self._holders.get((medium, group))
        if holder is None:
            if len(self._holders) >= MAX_HOLDERS:  # a pod must not use up all that there are
                raise InvalidInputError(f"a rank has at most {MAX_HOLDERS} tiers and groups")
            if len(medium or "") > MAX_WORD:
                raise InvalidInputError(f"the name of a tier has {len(medium or '')} characters")
            tier = (medium or DEFAULT_TIER).lower()
            holder = self._index.holder(self.pod, self.rank, tier, group or 0)
            self._holders[medium, group] = holder
        return holder

    def _note_attention(self, event: BlockStored) -> None:
        group = event.group_idx or 0
        said = (event.kv_cache_spec_kind, event.kv_cache_spec_sliding_window)
        if self._attention.get(group) == said or said == (None, None):
            return
        kind, window = said
        if kind is not None and len(kind) > MAX_WORD:
            raise InvalidInputError(f"the kind of a cache group has {len(kind)} characters")
        self._attention[group] = said
        if window:
            blocks = max(1, -(-(window - 1) // self._block_size))
        elif kind == "mamba":
            blocks = 1  # a state is reusable exactly where it was kept
        else:
            blocks = None
            if kind is not None and kind not in _FULL_KINDS:
                self._doubt(f"cache group {group} is of kind {kind}, taken as full attention")
        known, other = (self._windowed, self._full) if blocks else (self._full, self._windowed)
        known.add(group)
        other.discard(group)
        self._index.set_window(self.pod, self.rank, group, blocks)

    def _namespace(self, event: BlockStored) -> tuple[int | None, dict[int, bytes] | None]:
        """Return the root of a chain that starts here, and the extra bytes of its blocks."""
        adapter = event.lora_name
        if adapter is None and event.lora_id is not None:
            adapter = str(event.lora_id)  # engines before lora_name
        keys: list[list[str]] = []
        if event.extra_keys and any(event.extra_keys):
            keys = [list(block or ()) for block in event.extra_keys]
            for block in keys:
                if block and block[0] == adapter:  # which comes first; a salt may be called so too
                    del block[0]
        if event.parent_block_hash is not None:
            return None, _extras(keys)
        salt = event.cache_salt
        if keys and keys[0] and salt in (None, keys[0][-1]):
            salt = _take_salt(keys)
        root = self._roots.get((adapter, salt))
        if root is None:
            root = self._model_root(self.model, adapter, salt)
            if len(adapter or "") + len(salt or "") <= MAX_WORD:
                if len(self._roots) >= 4096:  # salts come and go
                    self._roots.clear()
                self._roots[adapter, salt] = root
        return root, _extras(keys)

    def _doubt(self, reason: str) -> None:
        if self.doubt is None:
            self.doubt = reason

    def _refuse(self, reason: str, count: int = 1) -> None:
        self.counters.refused_events += count
        self._doubt(f"an event was refused: {reason}")


def block_extra(keys: Sequence[str]) -> bytes:
    """Return the bytes that multimodal keys add to a block; requests must use the same.

    They are kept while a block waits for its parent: many, or long ones, are digested.
    """
    joined = "\x1f".join(keys).encode()
    return joined if len(joined) <= MAX_WORD else sha256(joined).digest()


def _extras(keys: list[list[str]]) -> dict[int, bytes] | None:
    return {i: block_extra(block) for i, block in enumerate(keys) if block} if keys else None


def _take_salt(keys: list[list[str]]) -> str | None:
    """Take the salt off block 0's keys, where it comes last.

    An image's hash looks the same; one that also covers the next block is no salt. A hash that
    ends inside block 0 is taken for a salt: such a block is then never matched, rather than wrong.
    """
    if len(keys) > 1 and keys[0][-1] in keys[1]:
        return None
    return keys[0].pop()
