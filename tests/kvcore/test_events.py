"""The codec faces bytes that real engines sent, and bytes that nobody should send."""

import base64
import contextlib
import json
import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcore.errors import EventDecodeError
from kvcore.events import (
    AllBlocksCleared,
    BatchDecoder,
    BlockRemoved,
    BlockStored,
    EventBatch,
    decode_batch,
    decode_batch_by_library,
)
from tests.engine import pack
from tests.shared import DATA, shared

SAMPLES = [json.loads(line) for line in (DATA / "wire_samples.jsonl").read_text().splitlines()]
STORED = "block_hashes parent_block_hash token_ids block_size lora_id medium lora_name".split()  # noqa: SIM905  # reads as the wire does
STORED += ["extra_keys", "group_idx", "kv_cache_spec_kind", "kv_cache_spec_sliding_window"]
STORED += ["locality", "ownership", "session_id"]


def plain(event):
    """Return an event as comparable data."""
    fields = event._asdict()
    for name in ("block_hashes", "token_ids"):
        if name in fields:
            fields[name] = [type(fields[name]).__name__, list(fields[name])]
    return type(event).__name__, fields


def plain_batch(batch):
    return batch.ts, batch.rank, [plain(e) for e in batch.events], batch.skipped


def expected(raw):
    """Return what an event of a sample says, by its own decoding."""
    if isinstance(raw, list):
        names = STORED if raw[0] == "BlockStored" else ["block_hashes", "medium", "group_idx"]
        raw = {"type": raw[0], **dict(zip(names, raw[1:], strict=False))}
    return raw


def as_hash(value):
    return base64.b64decode(value) if isinstance(value, str) else value % 2**64


@pytest.mark.parametrize(
    "sample", SAMPLES, ids=lambda s: f"{s['engine']}-{s['version']}-{s['case']}"
)
def test_every_recorded_shape_of_31_releases_decodes_to_what_was_sent(sample):
    """Fleets run several engine releases at once; each field must arrive, whatever the release."""
    batch = decode_batch(bytes.fromhex(sample["payload_hex"]))
    assert batch.skipped == []
    assert (batch.ts, batch.rank) == (1.5, sample["dp_rank"])
    for event, raw in zip(batch.events, sample["decoded"][1], strict=True):
        said = expected(raw)
        assert type(event).__name__ == said["type"]
        if isinstance(event, AllBlocksCleared):
            continue
        assert [as_hash(h) for h in said["block_hashes"]] == list(event.block_hashes)
        assert event.medium == said.get("medium")
        assert event.group_idx == said.get("group_idx")
        if isinstance(event, BlockStored):
            tokens = said["token_ids"]
            assert event.is_bigram == isinstance(tokens[0], list)
            assert event.token_ids.tolist() == [t[0] if event.is_bigram else t for t in tokens]
            assert event.token_ids.dtype == np.uint32
            parent = said["parent_block_hash"]
            assert event.parent_block_hash == (None if parent is None else as_hash(parent))
            for name in ("block_size", "lora_id", "lora_name", "extra_keys", "session_id"):
                assert getattr(event, name) == said.get(name)
            assert event.kv_cache_spec_kind == said.get("kv_cache_spec_kind")


@pytest.mark.parametrize(
    "sample", SAMPLES, ids=lambda s: f"{s['engine']}-{s['version']}-{s['case']}"
)
def test_kernel_agrees_with_the_library_on_every_recorded_shape(sample):
    """The compiled reader is only allowed to be faster."""
    payload = bytes.fromhex(sample["payload_hex"])
    assert plain_batch(decode_batch(payload)) == plain_batch(decode_batch_by_library(payload))


@pytest.mark.parametrize("name", ["event_decode.json", "event_decode_map_router.json"])
def test_peers_cases_decode_or_are_told_apart(name):
    """What a peer refuses is decoded, skipped and counted, or one typed error; never a crash."""
    accepts_more = {"tokens_nil_not_array", "batch_without_dp_rank"}  # sent by engines
    accepts_more |= {"hma", "extra_trailing_fields", "removed_extra_trailing"}  # by newer ones
    for case in json.loads(shared(f"vectors/{name}").read_text())["cases"]:
        payload = bytes.fromhex(case["payload_hex"])
        try:
            batch = decode_batch(payload)
            is_refused = bool(batch.skipped)
        except EventDecodeError:
            is_refused, batch = True, None
        assert is_refused == ("error" in case and case.get("name") not in accepts_more), case
        if batch is None or "events" not in case:
            continue
        for event, said in zip(batch.events, case["events"], strict=True):
            assert type(event).__name__ == said["type"]
            if not isinstance(event, AllBlocksCleared):
                assert (event.medium or "") == said["device_tier"]
                if not isinstance(event.block_hashes, list):  # the peer cuts bytes to 64 bits
                    assert [str(h) for h in event.block_hashes] == said["block_hashes"]


def test_a_real_event_of_a_published_test_set_decodes():
    """One event captured by others, from another model and block size."""
    for said in json.loads(shared("vectors/vllm_real_events.json").read_text())["events"].values():
        hashes = [int(h) for h in said["block_hashes"]]
        raw = ["BlockStored", hashes, None, said["token_ids"], 16, None, "GPU", said["lora_name"]]
        (event,) = decode_batch(pack([1.0, [raw], None])).events
        assert isinstance(event, BlockStored)
        assert event.block_hashes.tolist() == hashes  # type: ignore[union-attr]  # ints, not bytes
        assert event.lora_name == said["lora_name"]


def test_events_nested_as_binary_are_read():
    """One connector sends two fields, wraps its events, and packs small hashes in a byte."""
    for text in json.loads((DATA / "fs_connector_payloads.json").read_text()):
        batch = decode_batch(bytes.fromhex(text))
        (event,) = batch.events
        assert isinstance(event, BlockStored)
        assert (event.medium, event.token_ids.size, batch.rank) == ("SHARED_STORAGE", 0, None)
        assert event.block_hashes.tolist() == [1, 2]  # type: ignore[union-attr]  # ints, not bytes


def test_a_batch_may_be_a_map():
    """One revision of vLLM sent that."""
    body = {"ts": 2.5, "events": [["AllBlocksCleared"]], "data_parallel_rank": 3}
    batch = decode_batch(pack(body))
    assert (batch.ts, batch.rank, batch.events) == (2.5, 3, [AllBlocksCleared()])


def test_an_unknown_event_costs_nothing_but_itself():
    """A newer engine must not blind us to the events we know."""
    batch = decode_batch(pack([1.0, [["BlockRemoved", [1]], ["BlockMoved", 7]], None]))
    assert [type(e) for e in batch.events] == [BlockRemoved]
    assert [(s.kind, s.is_known) for s in batch.skipped] == [("BlockMoved", False)]


def test_a_known_event_with_bad_fields_is_told_from_an_unknown_one():
    """The first leaves a hole in what we know, the second does not."""
    batch = decode_batch(pack([1.0, [["BlockStored", [1], None, [-1], 1]], None]))
    assert [(s.kind, s.is_known) for s in batch.skipped] == [("BlockStored", True)]


def test_long_hashes_keep_every_byte():
    """Cut to 64 bits, one block's removal would take another one away."""
    hashes = [bytes([i]) * 32 for i in (1, 2)]
    (event,) = decode_batch(pack([1.0, [["BlockRemoved", hashes]], None])).events
    assert isinstance(event, BlockRemoved)
    assert event.block_hashes == hashes


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xff\xff",
        b"\xc1",
        b"\xdd\xff\xff\xff\xff",  # an array of 4 Gi values, none of them there
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x93\xcb" + bytes(8) + b"\xdd\xff\xff\xff\xff",
        b"\x93\xcb" + bytes(8) + b"\x91\x95\xabBlockStored\xdd\xff\xff\xff\xff",
        b"\x91" * 100_000,
        b"\x93\xcb" + bytes(8) + b"\x91" * 100_000 + b"\xc0",
        b"\xdd\x00\x10\x00\x00" * 200_000,  # each promises a mebi of values: 8 TB, believed
        # 5 MB, all there, of empty arrays that take 64 times as much.
        b"\x92\xcb" + bytes(8) + b"\xdd" + (5 << 20).to_bytes(4, "big") + b"\x90" * (5 << 20),
        pickle.dumps(["BlockStored"]),
        pack(7),
        pack([]),
        pack(["now", [], None]),
        pack([float("nan"), [], None]),
        pack([1.0, 7, None]),
        pack([1.0, [], -1]),
        pack([1.0, [], "rank"]),
        pack([1.0, [], None]) + b"\x00",
        b"\x93\xcb" + bytes(8) + b"\x91\xa3\xed\xa0\x80\xc0",
    ],
    ids=lambda p: f"{bytes(p[:8]).hex()}-{len(p)}",
)
def test_junk_is_one_typed_error(payload):
    """The event socket is open to the network: bad bytes cost a counter, nothing else."""
    with pytest.raises(EventDecodeError):
        decode_batch(payload)


@pytest.mark.parametrize(
    "event",
    [
        "text",
        7,
        [],
        [1, 2],
        {},
        {"type": 5},
        {"block_hashes": [1]},
        ["BlockStored", [1], None, [1]],
        ["BlockStored", ["text"], None, [1], 1],
        ["BlockStored", [b""], None, [1], 1],
        ["BlockStored", [1, b"x"], None, [1], 1],
        ["BlockStored", [b"x", 1], None, [1], 1],
        ["BlockStored", [True], None, [1], 1],
        ["BlockStored", [1], None, [1.5], 1],
        ["BlockStored", [1], None, [1 << 40], 1],
        ["BlockStored", [1], None, [[1, 2], [3]], 1],
        ["BlockStored", [1], None, ["1"], 1],
        ["BlockStored", [1], None, [1], -1],
        ["BlockStored", [1], None, [1], 1, None, 7],
        ["BlockStored", [1], None, [1], 1, None, "GPU", None, ["salt"]],
        ["BlockStored", [1], None, [1], 1, None, "GPU", None, None, -1],
        ["BlockStored", [1], None, [1], 1, None, "GPU", None, None, 0, 7],
        ["BlockStored", [1], None, [1], 1, None, "GPU", None, None, 0, "full", "wide"],
        ["BlockRemoved"],
        ["BlockRemoved", [1], "GPU", -1],
        b"\xc1",
    ],
    ids=repr,
)
def test_a_bad_event_is_skipped_and_its_neighbours_stay(event):
    """One bad event must not cost the batch, in either reader."""
    payload = pack([1.0, [["AllBlocksCleared"], event, ["BlockRemoved", [5]]], None])
    batch = decode_batch(payload)
    assert [type(e) for e in batch.events] == [AllBlocksCleared, BlockRemoved]
    assert len(batch.skipped) == 1
    assert plain_batch(batch) == plain_batch(decode_batch_by_library(payload))


words = st.integers(0, 2**64 - 1) | st.integers(-(2**63), -1)
ids = st.one_of(st.integers(0, 300), st.integers(0, 2**32 - 1), st.integers(-3, 2**34))
names = st.none() | st.text(max_size=4)
stored_fields = st.fixed_dictionaries(
    {
        "type": st.just("BlockStored"),
        "block_hashes": st.lists(words, max_size=20),
        "parent_block_hash": st.none() | words,
        "token_ids": st.lists(ids, max_size=70),
        "block_size": st.integers(0, 300),
    },
    optional={
        "lora_id": st.none() | st.integers(-1, 3),
        "medium": names,
        "extra_keys": st.none() | st.lists(st.none() | st.lists(names, max_size=2), max_size=3),
        "group_idx": st.none() | st.integers(0, 2**20),
        "cache_salt": names,
    },
)
removed_fields = st.fixed_dictionaries(
    {"type": st.just("BlockRemoved"), "block_hashes": st.lists(words, max_size=20)},
    optional={"medium": names},
)
events = stored_fields | removed_fields | st.just({"type": "AllBlocksCleared"})


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(events, st.booleans()), max_size=4), st.none() | st.integers(0, 2**33))
def test_kernel_agrees_with_the_library_on_any_batch(made, rank):
    """Both readers give the same records, and the same skips, for arrays and for maps."""
    raw = [list(event.values()) if is_array else event for event, is_array in made]
    payload = pack([1.25, raw, rank])
    assert plain_batch(decode_batch(payload)) == plain_batch(decode_batch_by_library(payload))


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(SAMPLES), st.data())
def test_damaged_bytes_never_do_more_than_fail(sample, data):
    """Cut short, flipped or extended: an event batch or the typed error, the same from both."""
    payload = bytearray(bytes.fromhex(sample["payload_hex"]))
    for _ in range(data.draw(st.integers(1, 3))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(payload[: data.draw(st.integers(0, len(payload)))])
    for damaged in (bytes(payload), cut):
        results = []
        for read in (decode_batch, decode_batch_by_library):
            try:
                results.append(repr(plain_batch(read(damaged))))
            except EventDecodeError:
                results.append("error")
        assert results[0] == results[1]


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_batch_or_the_typed_error(payload):
    """No third outcome."""
    with contextlib.suppress(EventDecodeError):
        assert isinstance(decode_batch(payload), EventBatch)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(events, max_size=4), min_size=2, max_size=6))
def test_what_a_decoder_returned_survives_its_next_messages(batches):
    """Its arrays are used again while batches are held: none may look into them."""
    decoder = BatchDecoder(n_bytes=64)
    payloads = [pack([1.25, raw, None]) for raw in batches]
    kept = [decoder.decode(payload) for payload in payloads]
    for batch, payload in zip(kept, payloads, strict=True):
        assert plain_batch(batch) == plain_batch(decode_batch_by_library(payload))


def test_a_decoder_reads_a_message_beyond_what_it_keeps():
    """A 2 MB batch is read like any other."""
    raw = {"type": "BlockStored", "block_hashes": [1], "parent_block_hash": None}
    payload = pack([1.0, [raw | {"token_ids": [70_000] * 400_000, "block_size": 400_000}], None])
    (event,) = BatchDecoder().decode(payload).events
    assert isinstance(event, BlockStored)
    assert event.token_ids.tolist() == [70_000] * 400_000


@pytest.mark.parametrize("key", ["type", "block_hashes", "parent_block_hash", "token_ids"])
def test_a_field_that_comes_twice_is_read_alike(key):
    """Among the fields that the compiled reader passes on may be one that it has read."""
    raw = {"type": "BlockStored", "block_hashes": [1], "parent_block_hash": 2, "token_ids": [3]}
    payload = pack([1.0, [raw | {"block_size": 1, "again": None}], None])
    payload = payload.replace(pack("again"), pack(key))
    assert plain_batch(decode_batch(payload)) == plain_batch(decode_batch_by_library(payload))


def test_a_text_among_the_token_ids_costs_its_own_size():
    """As one array, 100,000 texts as long as the longest would take 8 GB."""
    payload = pack([1.0, [["BlockStored", [1], None, [1] * 100_000 + ["x" * 20_000], 4]], None])
    tracemalloc.start()
    assert len(decode_batch(payload).skipped) == 1
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
