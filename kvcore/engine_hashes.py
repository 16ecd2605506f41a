"""Engine hashes as arrays: what an engine calls its blocks, in full, never cut."""

import operator
from collections.abc import Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from kvcore.errors import ArrayError, InvalidInputError
from kvcore.kernels import xxh3

EngineHash = int | bytes
EngineHashes = Sequence[int] | Sequence[bytes] | NDArray[np.uint64] | NDArray[np.int64]

MAX_BYTES = 32
NO_WIDE: NDArray[np.uint64] = np.empty(0, dtype=np.uint64)
_MASK = (1 << 64) - 1
_UINT64 = np.dtype(np.uint64)


def encode(hashes: EngineHashes) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return names [n] uint64, and [5 * n] words of full value and length if they are bytes.

    A signed int is viewed as two's complement. A name of bytes is a digest that finds the row;
    what is compared is the full value.

    Raises:
        InvalidInputError: Not 1-D, not ints of 64 bits or bytes of at most 32, or both mixed.
    """
    if isinstance(hashes, np.ndarray):
        if hashes.dtype is _UINT64 and hashes.strides == (8,) and hashes.flags.aligned:
            return cast("NDArray[np.uint64]", hashes), NO_WIDE
        if hashes.ndim != 1 or hashes.dtype not in (np.uint64, np.int64):
            raise ArrayError("engine hashes must be a 1-D array of 64-bit ints")
        return np.require(hashes, requirements=["C", "A"]).view(np.uint64), NO_WIDE
    if len(hashes) and isinstance(hashes[0], bytes):
        return _encode_bytes(hashes)
    try:
        as_given = np.array(hashes)
        if as_given.ndim == 1 and as_given.dtype in (np.uint64, np.int64):
            return as_given.view(np.uint64), NO_WIDE
        # Of either sign beyond 63 bits, numpy makes floats or objects.
        return np.array([_as_unsigned(h) for h in hashes], dtype=np.uint64), NO_WIDE
    except (TypeError, ValueError, OverflowError) as exc:
        raise InvalidInputError("an engine hash is a 64-bit int, or at most 32 bytes") from exc


def encode_one(name: EngineHash) -> tuple[int, NDArray[np.uint64]]:
    """Return one name's word, and its five words if it is bytes."""
    if type(name) is int and 0 <= name <= _MASK:
        return name, NO_WIDE
    names, wide = encode((name,))  # type: ignore[arg-type]  # one int, or one bytes
    return int(names[0]), wide


def _as_unsigned(name: EngineHash) -> int:
    word = operator.index(name)  # type: ignore[arg-type]  # bytes raise, as floats and strings do
    if not -(1 << 63) <= word <= _MASK:
        raise ValueError(name)
    return word & _MASK


def _encode_bytes(hashes: Sequence[EngineHash]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    given = cast("Sequence[bytes]", hashes)
    if set(map(type, hashes)) != {bytes} or max(map(len, given)) > MAX_BYTES:
        raise InvalidInputError("engine hashes must all be ints, or all at most 32 bytes")
    n = len(given)
    wide = np.empty((n, MAX_BYTES // 8 + 1), dtype=np.uint64)
    wide[:, :-1] = np.array(given, f"S{MAX_BYTES}").view(np.uint64).reshape(n, -1)
    wide[:, -1] = [*map(len, given)]
    names = np.empty(n, dtype=np.uint64)
    xxh3.digests(wide.view(np.uint32).ravel(), (MAX_BYTES + 8) // 4, np.uint64(0), names)
    return names, wide.ravel()


def decode(names: NDArray[np.uint64], wide: NDArray[np.uint64]) -> list[EngineHash]:
    """Return the ints or bytes again."""
    if not wide.size:
        return names.tolist()
    data, size = wide.tobytes(), MAX_BYTES + 8
    return [
        data[i : i + int.from_bytes(data[i + MAX_BYTES : i + size], "little")]
        for i in range(0, len(data), size)
    ]
