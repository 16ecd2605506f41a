"""KV-cache events as engines publish them: bytes in, typed records out.

The reader is tolerant: arrays and maps, missing trailing fields and unknown further ones,
hashes as unsigned or signed 64-bit integers or as bytes of any length. It is also bounded:
whatever the bytes are, the answer is a batch, a batch with skipped events, or an
``EventDecodeError``. Nothing is ever unpickled.
"""

import math
from array import array
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import msgpack
import numpy as np
from numpy.typing import NDArray

from kvcore.errors import EventDecodeError
from kvcore.kernels import msgpack as kernel
from kvcore.tokens import Tokens

Hashes = NDArray[np.uint64] | list[bytes]

_STORED_FIELDS = ["block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id"]
_STORED_FIELDS += ["medium", "lora_name", "extra_keys", "group_idx", "kv_cache_spec_kind"]
_STORED_FIELDS += ["kv_cache_spec_sliding_window", "locality", "ownership", "session_id"]
_REMOVED_FIELDS = ["block_hashes", "medium", "group_idx", "locality", "ownership"]
_BATCH_FIELDS = ["ts", "events", "data_parallel_rank"]
_READ_BEFORE = frozenset(["type", *_STORED_FIELDS[:4]])  # by the kernel
_HASH_MASK = (1 << 64) - 1
_MAX_CACHED_BYTES = 512  # of an event's lesser fields
_MAX_VALUES = 1 << 22  # of a message
_MAX_KEPT_BYTES = 1 << 20  # a decoder's arrays are for messages up to this size


class BlockStored(NamedTuple):
    """Blocks entered a pod's cache, in prompt order.

    ``token_ids`` is empty where an offloading connector names blocks by hash alone. There may
    be fewer hashes than whole blocks of tokens: a sliding-window group keeps only the last ones.
    """

    block_hashes: Hashes
    parent_block_hash: int | bytes | None
    token_ids: Tokens
    block_size: int  # tokens; 0 where the connector does not say
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: Sequence[Sequence[str] | None] | None = (
        None  # per block: adapter, multimodal hashes, salt
    )
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None  # tokens
    locality: str | None = None
    ownership: str | None = None
    session_id: str | None = None
    cache_salt: str | None = None  # SGLang says it here, vLLM as the last extra key of block 0
    is_bigram: bool = False  # EAGLE: the engine keys (token, next token); only the first is kept


class BlockRemoved(NamedTuple):
    """One copy of each named block left a pod's cache."""

    block_hashes: Hashes
    medium: str | None = None
    group_idx: int | None = None
    locality: str | None = None
    ownership: str | None = None


class AllBlocksCleared(NamedTuple):
    """A rank dropped its whole cache."""


Event = BlockStored | BlockRemoved | AllBlocksCleared


class SkippedEvent(NamedTuple):
    """An event that was not understood; the rest of its batch stands."""

    kind: str
    reason: str
    is_known: bool  # a known kind with bad fields: something about the cache is lost


class EventBatch(NamedTuple):
    """What one engine step published."""

    ts: float  # seconds since the epoch, engine clock
    events: list[Event]
    rank: int | None  # data-parallel
    skipped: list[SkippedEvent]


class BatchDecoder:
    """Decode messages one after another, in arrays that are kept between them."""

    def __init__(self, n_bytes: int = 8192) -> None:
        self._reserve(n_bytes)

    def _reserve(self, n_bytes: int) -> None:
        """Have arrays for messages of so many bytes: no hash or token is read from less."""
        self._reserved_bytes = n_bytes
        self._hashes = np.empty(n_bytes // 8 + 8, dtype=np.uint64)
        self._tokens = np.empty(n_bytes, dtype=np.uint32)
        n_rows = min(n_bytes // 16 + 2, 4096)
        self._table = np.empty((n_rows, kernel.N_COLUMNS), dtype=np.int64)
        self._time = self._table.view(np.float64)[0, : kernel.TIME + 1]

    def decode(self, payload: bytes) -> EventBatch:
        """Decode one message's payload.

        Raises:
            EventDecodeError: The bytes are no msgpack, or no event batch.
        """
        if len(payload) > self._reserved_bytes:
            if len(payload) > _MAX_KEPT_BYTES:
                return BatchDecoder(len(payload)).decode(payload)
            self._reserve(2 * len(payload))
        hashes, tokens, table = self._hashes, self._tokens, self._table
        n_events = kernel.scan_batch(payload, hashes, tokens, table)
        if n_events < 0 or not math.isfinite(ts := self._time.item(kernel.TIME)):
            return decode_batch_by_library(payload)
        events: list[Event] = []
        hash_at = token_at = 0
        for row in table[1 : n_events + 1].tolist():
            kind, n_hashes, has_parent, parent, n_tokens, size, rest, end, n_rest, is_map = row
            names = hashes[hash_at : hash_at + n_hashes].copy()
            hash_at += n_hashes
            try:
                fields = _rest(kind, is_map, n_rest, payload[rest:end])
            except (ValueError, TypeError, LookupError, OverflowError):
                return decode_batch_by_library(payload)  # which tells what is wrong with it
            if kind == kernel.STORED:
                ids = tokens[token_at : token_at + n_tokens].copy()
                token_at += n_tokens
                above = parent & _HASH_MASK if has_parent else None
                events.append(BlockStored(names, above, ids, size, *fields))
            elif kind == kernel.REMOVED:
                events.append(BlockRemoved(names, *fields))
            else:
                events.append(AllBlocksCleared())
        rank = table.item(0, kernel.RANK)
        return EventBatch(ts, events, rank - 1 if rank else None, [])


def decode_batch(payload: bytes) -> EventBatch:
    """Decode one message as `BatchDecoder` does, which is faster for many."""
    return BatchDecoder(len(payload)).decode(payload)


@lru_cache(maxsize=4096)
def _rest_of_short(kind: int, is_map: int, n_fields: int, data: bytes) -> tuple[Any, ...]:
    """Read the fields behind the ones the kernel reads; a few kinds of them come all the time."""
    header = bytes([(0x80 if is_map else 0x90) | n_fields])
    names = _REMOVED_FIELDS[1:] if kind == kernel.REMOVED else _STORED_FIELDS[4:]
    fields = _name_fields(_unpack(header + data), names)
    if not _READ_BEFORE.isdisjoint(fields):
        raise ValueError("a field comes twice")  # and the library takes the last one
    if kind == kernel.STORED:
        return _stored_rest(fields)
    return _removed_rest(fields) if kind == kernel.REMOVED else ()


def _rest(kind: int, is_map: int, n_fields: int, data: bytes) -> tuple[Any, ...]:
    read = _rest_of_short if len(data) <= _MAX_CACHED_BYTES else _rest_of_short.__wrapped__
    return read(kind, is_map, n_fields, data)


def decode_batch_by_library(payload: bytes) -> EventBatch:
    """Decode like `decode_batch`, without the kernel; every shape, at a tenth of the speed.

    Raises:
        EventDecodeError: The bytes are no msgpack, or no event batch.
    """
    try:
        fields = _name_fields(_unpack(payload), _BATCH_FIELDS)
        ts = _time(fields["ts"])
        raw_events = fields["events"]
        if isinstance(raw_events, bytes):  # one connector wraps what it nests
            raw_events = _unpack(raw_events)
        raw_events = _list(raw_events)
        rank = fields.get("data_parallel_rank", fields.get("attn_dp_rank"))
        rank = None if rank is None else _natural(rank)
    except (ValueError, TypeError, LookupError, OverflowError) as exc:
        raise EventDecodeError(f"bad event batch of {len(payload)} bytes: {exc}") from exc
    events: list[Event] = []
    skipped: list[SkippedEvent] = []
    for raw in raw_events:
        event = _decode_event(raw)
        if isinstance(event, SkippedEvent):
            skipped.append(event)
        else:
            events.append(event)
    return EventBatch(ts, events, rank, skipped)


def _unpack(data: bytes) -> Any:
    # Headers promise counts, and the library allocates by them: nested promises add up to far
    # more than the message. Where each is kept, as checked here, they cannot.
    # And an empty array takes a byte there, and 64 here: no batch of an engine has so many.
    if kernel.span(np.frombuffer(data, dtype=np.uint8), 0, _MAX_VALUES) != len(data):
        raise ValueError(f"not one msgpack value, or one of more than {_MAX_VALUES}")
    try:
        return msgpack.unpackb(data, raw=False, strict_map_key=False)
    except (msgpack.UnpackException, RecursionError) as exc:
        raise ValueError(str(exc) or type(exc).__name__) from exc


def _decode_event(raw: Any) -> Event | SkippedEvent:
    kind = "?"
    try:
        if isinstance(raw, bytes):
            raw = _unpack(raw)
        kind, fields = _kind_and_fields(raw)
        if kind == "BlockStored":
            return _stored(fields)
        if kind == "BlockRemoved":
            return BlockRemoved(_hashes(fields["block_hashes"]), *_removed_rest(fields))
        if kind == "AllBlocksCleared":
            return AllBlocksCleared()
    except (ValueError, TypeError, LookupError, OverflowError) as exc:
        return SkippedEvent(kind[:64], f"{type(exc).__name__}: {exc}"[:200], is_known=True)
    return SkippedEvent(kind[:64], "unknown kind of event", is_known=False)


def _kind_and_fields(raw: Any) -> tuple[str, Mapping[str, Any]]:
    if isinstance(raw, dict):
        kind = raw["type"]
    elif isinstance(raw, list):
        kind = raw[0]
    else:
        raise TypeError("an event is neither an array nor a map")
    kind = _text(kind) or ""
    if isinstance(raw, dict):
        return kind, raw
    names = _REMOVED_FIELDS if kind == "BlockRemoved" else _STORED_FIELDS
    return kind, _name_fields(raw[1:], names)


def _name_fields(fields: Any, names: Sequence[str]) -> Mapping[str, Any]:
    if isinstance(fields, dict):
        return fields
    if not isinstance(fields, list):
        raise TypeError("neither an array nor a map")
    return dict(zip(names, fields, strict=False))  # newer engines send more, older ones less


def _stored(fields: Mapping[str, Any]) -> BlockStored:
    parent = fields.get("parent_block_hash")
    tokens, is_bigram = _tokens(fields["token_ids"])
    return BlockStored(
        _hashes(fields["block_hashes"]),
        None if parent is None else _hash(parent),
        tokens,
        _natural(fields["block_size"]),
        *_stored_rest(fields),
        is_bigram=is_bigram,
    )


def _stored_rest(fields: Mapping[str, Any]) -> tuple[Any, ...]:
    return (
        _optional_natural(fields.get("lora_id")),
        _text(fields.get("medium")),
        _text(fields.get("lora_name")),
        _extra_keys(fields.get("extra_keys")),
        _optional_natural(fields.get("group_idx")),
        _text(fields.get("kv_cache_spec_kind")),
        _optional_natural(fields.get("kv_cache_spec_sliding_window")),
        _text(fields.get("locality")),
        _text(fields.get("ownership")),
        _text(fields.get("session_id")),
        _text(fields.get("cache_salt")),
    )


def _removed_rest(fields: Mapping[str, Any]) -> tuple[Any, ...]:
    return (
        _text(fields.get("medium")),
        _optional_natural(fields.get("group_idx")),
        _text(fields.get("locality")),
        _text(fields.get("ownership")),
    )


def _hash(value: Any) -> int | bytes:
    if isinstance(value, bytes) and value:
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return value & _HASH_MASK  # signed hashes are read as two's complement
    raise TypeError(f"a block hash is {type(value).__name__}")


def _hashes(values: Any) -> Hashes:
    values = _list(values)
    if values and isinstance(values[0], bytes):
        if set(map(type, values)) != {bytes} or not all(values):
            raise TypeError("block_hashes mix kinds, or one is empty")
        return values
    return np.array([_int_hash(value) for value in values], dtype=np.uint64)


def _int_hash(value: Any) -> int:
    hashed = _hash(value)
    if isinstance(hashed, bytes):
        raise TypeError("block_hashes mix kinds")
    return hashed


def _tokens(values: Any) -> tuple[Tokens, bool]:
    if values is None:  # SGLang's offload events
        values = []
    if not _list(values):
        return np.empty(0, dtype=np.uint32), False
    is_bigram = isinstance(values[0], list)
    if is_bigram:
        values = [first for first, _ in values]
    # Takes integers alone; of one string among them, numpy would make all as long as that.
    tokens = np.array(array("Q", values))
    if tokens.max() >= 1 << 32:
        raise ValueError("a token id is out of range")
    return tokens.astype(np.uint32), is_bigram


def _extra_keys(values: Any) -> list[list[str] | None] | None:
    if values is None:
        return None
    found = [None if keys is None else _block_keys(keys) for keys in _list(values)]
    return found if any(found) else None


def _block_keys(keys: Any) -> list[str] | None:
    found: list[str] = []
    for key in _list(keys):
        value = key[0] if isinstance(key, list) and key else key  # older: [hash, offset]
        if isinstance(value, bytes):
            value = value.hex()
        if isinstance(value, str):
            found.append(value)
    return found or None


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise TypeError(f"expected a string, got {type(value).__name__}")


def _list(value: Any) -> list[Any]:
    if isinstance(value, list):
        return value
    raise TypeError(f"expected an array, got {type(value).__name__}")


def _time(value: Any) -> float:
    if isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    raise TypeError("the time is not a finite number")


def _natural(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"expected a non-negative integer, got {value!r:.40}")
    return value


def _optional_natural(value: Any) -> int | None:
    return None if value is None else _natural(value)
