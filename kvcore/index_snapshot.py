r"""An index in a file: a line that names the format, a JSON head, the used part of each array.

    "kvatlas index 1\n" ‖ crc32 of the rest u32 ‖ size of the head u32 ‖ head ‖ arrays

The head lists the arrays in order, with dtype and size, and has everything that is not an array.
"""

from __future__ import annotations

import json
import os
import zlib
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvcore.errors import SnapshotError
from kvcore.holders import Holder
from kvcore.kernels import memory as m
from kvcore.waiting import WaitingRun

if TYPE_CHECKING:
    from kvcore.index import BlockIndex

_MAGIC = b"kvatlas index 1\n"
_HEAD_AT = len(_MAGIC) + 8


class Snapshot:
    """A copy of an index at one moment, and a JSON-serialisable note that belongs to it."""

    def __init__(self, index: BlockIndex, note: Any = None) -> None:
        """Copy the index; it may be read meanwhile, from other threads too, but not changed."""
        self._arrays = {-1: index.memory.header, **_used(index)}
        self._arrays = {word: array.copy() for word, array in self._arrays.items()}
        self._state = {"note": note, **_state(index)}

    def write(self, path: str | PathLike) -> None:
        """Write a file that takes the place of an older one when it is whole.

        Raises:
            OSError: It cannot be written; the older one stays.
        """
        listed = [[word, a.dtype.str, a.size] for word, a in self._arrays.items()]
        head = json.dumps({"arrays": listed, **self._state}).encode()
        parts = [len(head).to_bytes(4, "little") + head]
        parts += [memoryview(array).cast("B") for array in self._arrays.values() if array.size]
        checksum = 0
        for part in parts:
            checksum = zlib.crc32(part, checksum)
        path = Path(path)
        beside = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            with beside.open("wb") as file:
                file.writelines([_MAGIC, checksum.to_bytes(4, "little"), *parts])
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
        for left in path.parent.glob(f"{path.name}.*.part"):  # by a process that was killed
            left.unlink(missing_ok=True)


def read(
    kind: type[BlockIndex], path: str | PathLike, *, capacity_bytes: int, max_waiting_blocks: int
) -> tuple[BlockIndex, Any]:
    """Read an index and its note back; `BlockIndex.restore` says what it raises."""
    try:
        data = Path(path).read_bytes()
    except OSError as exc:
        raise SnapshotError(f"cannot read the snapshot: {exc}") from exc
    if not data.startswith(_MAGIC):
        named = data[: len(_MAGIC)]
        raise SnapshotError(f"not a snapshot of this version: it begins with {named!r}")
    checksum = int.from_bytes(data[len(_MAGIC) : len(_MAGIC) + 4], "little")
    if len(data) < _HEAD_AT or zlib.crc32(data[len(_MAGIC) + 4 :]) != checksum:
        raise SnapshotError("the snapshot is damaged: its checksum is wrong")
    limits = {"capacity_bytes": capacity_bytes, "max_waiting_blocks": max_waiting_blocks}
    try:
        return _rebuild(kind, data, limits)
    except (ValueError, LookupError, TypeError) as exc:
        raise SnapshotError("the snapshot is not one that an index wrote") from exc


def _rebuild(kind: type[BlockIndex], data: bytes, limits: dict[str, int]) -> tuple[BlockIndex, Any]:
    size = int.from_bytes(data[_HEAD_AT - 4 : _HEAD_AT], "little")
    head, at = json.loads(data[_HEAD_AT : _HEAD_AT + size]), _HEAD_AT + size
    arrays: dict[int, NDArray] = {}
    for word, dtype, count in head["arrays"]:
        arrays[word] = np.frombuffer(data, dtype, count, at)
        at += arrays[word].nbytes
    index = kind(**limits, seed=head["seed"])
    _restore_arrays(index, arrays)
    _restore_state(index, head)
    return index, head["note"]


def _used(index: BlockIndex) -> dict[int, NDArray]:
    memory = index.memory
    high = {t: int(memory.header[t + m.HIGH]) for t in m.TABLES}
    used = dict(memory.arrays)
    for table in m.TABLES:
        used[table + m.ROWS] = memory.rows(table).reshape(-1)
    used[m.AGES] = used[m.AGES][: high[m.BLOCKS]]
    used[m.MEMBERS] = used[m.MEMBERS].reshape(-1)
    if m.WIDE in used:
        used[m.WIDE] = used[m.WIDE][: high[m.NAMES] * m.WIDE_WORDS]
    return used


def _restore_arrays(index: BlockIndex, arrays: dict[int, NDArray]) -> None:
    """Copy arrays into those reserved for the budget; others are kept as they are."""
    memory, header = index.memory, arrays.pop(-1)
    needed = max(int(header[t + m.HIGH]) for t in (m.BLOCKS, m.NAMES, m.COUNTS))
    memory.reserve_rows(max(memory.limit_rows, needed))
    limits = {t: int(memory.header[t + m.LIMIT]) for t in m.TABLES}
    epoch_length = int(memory.header[m.EPOCH_LENGTH])
    kept = [w for w in range(m.HEADER_SIZE) if w not in m.ADDRESSES]
    memory.header[kept] = header[kept]
    memory.header[m.EPOCH_LENGTH] = epoch_length
    for table in (m.BLOCKS, m.NAMES, m.COUNTS):
        memory.header[table + m.LIMIT] = limits[table]
    if m.WIDE in arrays:
        memory.use_wide_names()
    for word, array in arrays.items():
        reserved = memory.arrays.get(word)
        if word == m.MEMBERS:
            memory.keep(word, array.reshape(-1, m.MEMBER_WORDS).copy())
        elif word == m.SETS + m.ROWS:
            rows = np.zeros(int(header[m.SETS + m.LIMIT] * header[m.SETS + m.STRIDE]), np.uint64)
            rows[: array.size] = array
            memory.keep(word, rows)
        elif reserved is not None and word in _RESERVED:
            reserved[: array.size] = array
        else:
            memory.keep(word, array.copy())


_RESERVED = (m.BLOCKS + m.ROWS, m.NAMES + m.ROWS, m.COUNTS + m.ROWS, m.AGES, m.WIDE)


def _state(index: BlockIndex) -> dict[str, Any]:
    members = index.members
    return {
        "seed": index.seed,
        "holders": [[i, members.bits[i], *name] for i, name in members.names.items()],
        "scopes": [[*scope, bit] for scope, bit in members.scopes.items()],
        "n_bits": members.n_bits,
        "free_ids": members.free_ids,
        "free_bits": members.free_bits,
        "dead_bits": members.dead_bits,
        "next_dead_bits": members.next_dead_bits,
        "windows": [[*scope, blocks] for scope, blocks in index.windows.items()],
        "dropped": [*index.waiting.dropped.items()],
        "waiting": [
            {
                "holder": run.holder,
                "scope": run.scope,
                "names": [*map(_plain, run.names)],
                "parent": _plain(run.parent),
                "tokens": run.tokens.tolist(),
                "block_size": run.block_size,
                "extras": [[block, extra.hex()] for block, extra in run.extras.items()],
            }
            for run in index.waiting.runs.values()
        ],
    }


def _restore_state(index: BlockIndex, head: dict[str, Any]) -> None:
    members = index.members
    for number, bit, *name in head["holders"]:
        members.adopt(number, Holder(*name), bit)
    members.scopes = {(pod, rank, group): bit for pod, rank, group, bit in head["scopes"]}
    members.scope_at = {bit: scope for scope, bit in members.scopes.items()}
    for name in ("n_bits", "free_ids", "free_bits", "dead_bits", "next_dead_bits"):
        setattr(members, name, head[name])
    index.windows = {(pod, rank, group): n for pod, rank, group, n in head["windows"]}
    for run in head["waiting"]:
        pod, rank, group = run["scope"]
        index.waiting.add(
            WaitingRun(
                run["holder"],
                (pod, rank, group),
                [*map(_fancy, run["names"])],
                _fancy(run["parent"]),
                np.array(run["tokens"], dtype=np.uint32),
                run["block_size"],
                {block: bytes.fromhex(extra) for block, extra in run["extras"]},
            )
        )
    index.waiting.dropped.update(head["dropped"])


def _plain(name: Any) -> Any:
    return [name.hex()] if isinstance(name, bytes) else name


def _fancy(name: Any) -> Any:
    return bytes.fromhex(name[0]) if isinstance(name, list) else name
