"""Event batches straight from msgpack bytes to arrays, and a check of msgpack's structure.

``scan_batch`` knows the one shape that engines send all the time and gives up on anything else;
``kvcore.events`` then reads the bytes with the msgpack library, which is also this kernel's twin.
"""

import numpy as np
from numba import njit, types

BYTES = types.Array(types.uint8, 1, "C", readonly=True)
PAYLOAD = types.Bytes(types.uint8, 1, "C", readonly=True)  # read in place, no array made
_I, _U = types.int64, types.uint64
_PAIR = types.UniTuple(_I, 2)

# Columns of the table that scan_batch fills, one row per event.
KIND, N_HASHES, HAS_PARENT, PARENT, N_TOKENS, BLOCK_SIZE, REST, REST_END, N_REST, IS_MAP = range(10)
N_COLUMNS = 10
TIME, RANK = 0, 1  # in the table's first row
STORED, REMOVED, CLEARED = range(3)

_OTHER = -1  # valid or not: not the shape that this kernel reads


# By the first byte of an integer that fits 32 bits: its size, how far to shift the four bytes
# behind it to the right, and the value where the byte itself is the value.
_WIDTH, _SHIFT = np.zeros(256, dtype=np.int64), np.full(256, 32, dtype=np.uint64)
_FIXED = np.where(np.arange(256) <= 0x7F, np.arange(256), 0).astype(np.uint64)
_WIDTH[:0x80] = 1
_WIDTH[[0xCC, 0xCD, 0xCE]], _SHIFT[[0xCC, 0xCD, 0xCE]] = (2, 3, 5), (24, 16, 0)


def _text(word: str) -> np.ndarray:
    return np.frombuffer(word.encode(), dtype=np.uint8)


_TYPE, _HASHES, _PARENT = _text("type"), _text("block_hashes"), _text("parent_block_hash")
_TOKENS, _SIZE = _text("token_ids"), _text("block_size")
_STORED, _REMOVED = _text("BlockStored"), _text("BlockRemoved")
_CLEARED = _text("AllBlocksCleared")


@njit(_U(BYTES, _I, _I), nogil=True, inline="always")
def _big_endian(data, pos, n):
    if n == 4:
        return (
            (_U(data[pos]) << _U(24))
            | (_U(data[pos + 1]) << _U(16))
            | (_U(data[pos + 2]) << _U(8))
            | _U(data[pos + 3])
        )
    value = _U(0)
    for i in range(n):
        value = (value << _U(8)) | _U(data[pos + i])
    return value


@njit(_I(BYTES, _I, _I), nogil=True)
def span(data, pos, most):  # noqa: PLR0912  # one branch per msgpack type
    """Return where the value that starts at ``pos`` of ``data`` [n] uint8 ends; -1: nowhere.

    So it is if it is made of more than ``most`` values. Counts of elements are backed by bytes,
    so a reader that allocates by them stays within the size of the message. O(n), whatever the
    nesting.
    """
    size, pending = data.size, 1
    while pending > 0:
        pending -= 1
        most -= 1
        if pos < 0 or pos >= size or most < 0:
            return _OTHER
        kind = _I(data[pos])
        pos += 1
        skip, more, width = 0, 0, 0  # bytes; values; bytes of a count, which is read below
        if kind <= 0x7F or kind >= 0xE0:
            pass
        elif kind <= 0x8F:
            more = 2 * (kind & 15)
        elif kind <= 0x9F:
            more = kind & 15
        elif kind <= 0xBF:
            skip = kind & 31
        elif kind == 0xC1:
            return _OTHER
        elif kind >= 0xC4 and kind <= 0xC9:  # bin and ext
            width = 1 << ((kind - 0xC4) % 3)
        elif kind >= 0xCA and kind <= 0xCB:
            skip = 4 << (kind - 0xCA)
        elif kind >= 0xCC and kind <= 0xD3:
            skip = 1 << ((kind - 0xCC) & 3)
        elif kind >= 0xD4 and kind <= 0xD8:
            skip = 1 + (1 << (kind - 0xD4))
        elif kind >= 0xD9 and kind <= 0xDB:
            width = 1 << (kind - 0xD9)
        elif kind >= 0xDC:  # array and map
            width = 2 << ((kind - 0xDC) & 1)
        if width > 0:
            if pos + width > size:
                return _OTHER
            count = _I(_big_endian(data, pos, width))
            pos += width
            if kind >= 0xDC:
                more = count if kind <= 0xDD else 2 * count
            else:
                skip = count + (1 if kind >= 0xC7 and kind <= 0xC9 else 0)
        pos += skip
        pending += more
        if pos > size or pending > size - pos:
            return _OTHER
    return pos


@njit(_I(BYTES, _I, BYTES), nogil=True)
def _match(data, pos, word):
    """Return where the string ``word`` that starts at ``pos`` ends, or _OTHER."""
    if (
        pos < 0
        or pos >= data.size
        or data[pos] != 0xA0 | word.size
        or pos + 1 + word.size > data.size
    ):
        return _OTHER
    for i in range(word.size):
        if data[pos + 1 + i] != word[i]:
            return _OTHER
    return pos + 1 + word.size


@njit(_PAIR(BYTES, _I), nogil=True)
def _array(data, pos):
    """Return (length, position behind the header) of an array; position _OTHER: it is none."""
    kind = _I(data[pos]) if pos >= 0 and pos < data.size else 0
    if kind & 0xF0 == 0x90:
        return kind & 15, pos + 1
    if kind == 0xDC and pos + 3 <= data.size:
        return _I(_big_endian(data, pos + 1, 2)), pos + 3
    if kind == 0xDD and pos + 5 <= data.size:
        return _I(_big_endian(data, pos + 1, 4)), pos + 5
    return 0, _OTHER


@njit(types.Tuple((_U, _I, types.boolean))(BYTES, _I), nogil=True, inline="always")
def _integer(data, pos):
    """Return (bits, position behind, is negative) of an integer; position _OTHER: it is none."""
    if pos < 0 or pos >= data.size:
        return _U(0), _OTHER, False
    kind = _I(data[pos])
    if kind <= 0x7F:
        return _U(kind), pos + 1, False
    if kind >= 0xE0:
        return _U(kind - 256), pos + 1, True
    if kind < 0xCC or kind > 0xD3:
        return _U(0), _OTHER, False
    width = 1 << ((kind - 0xCC) & 3)
    if pos + 1 + width > data.size:
        return _U(0), _OTHER, False
    bits = _big_endian(data, pos + 1, width)
    is_negative = kind >= 0xD0 and (bits >> _U(8 * width - 1)) == _U(1)
    if is_negative and width < 8:
        bits |= ~_U(0) << _U(8 * width)
    return bits, pos + 1 + width, is_negative


@njit(_PAIR(BYTES, _I), nogil=True)
def _natural(data, pos):
    """Return (value, position behind) of an integer in [0, 2**32)."""
    bits, pos, is_negative = _integer(data, pos)
    if is_negative or bits >> _U(32) != _U(0):
        return 0, _OTHER
    return _I(bits), pos


@njit(_I(BYTES, _I, types.boolean, BYTES), nogil=True)
def _field(data, pos, is_map, key):
    """Return where a field's value begins: behind its key in a map, right here in an array."""
    return _match(data, pos, key) if is_map and pos >= 0 else pos


@njit(_PAIR(BYTES, _I, _U[::1], _I), nogil=True)
def _read_hashes(data, pos, hashes, start):
    """Fill ``hashes[start:]`` from an array of integers; return (count, position behind)."""
    count, pos = _array(data, pos)
    if pos < 0 or start + count > hashes.size:
        return 0, _OTHER
    for i in range(start, start + count):
        bits, pos, _ = _integer(data, pos)
        if pos < 0:
            return 0, _OTHER
        hashes[i] = bits
    return count, pos


@njit(_PAIR(BYTES, _I, types.uint32[::1], _I), nogil=True)
def _read_tokens(data, pos, tokens, start):
    """Fill ``tokens[start:]`` from an array of integers; return (count, position behind)."""
    count, pos = _array(data, pos)
    if pos < 0 or start + count > tokens.size:
        return 0, _OTHER
    for i in range(start, start + count):
        first = data[pos] if pos + 5 <= data.size else types.uint8(0xC1)
        width = _WIDTH[first]
        if width > 0:
            # Ids come in random widths: reading all alike spares a mispredicted branch.
            word = _big_endian(data, pos + 1, 4) >> _SHIFT[first]
            tokens[i] = word | _FIXED[first]
            pos += width
        else:
            value, pos = _natural(data, pos)
            if pos < 0:
                return 0, _OTHER
            tokens[i] = value
    return count, pos


@njit(_PAIR(BYTES, _I), nogil=True)
def _kind(data, pos):
    """Return (kind, position behind its name)."""
    end = _match(data, pos, _STORED)
    if end >= 0:
        return STORED, end
    end = _match(data, pos, _REMOVED)
    if end >= 0:
        return REMOVED, end
    return CLEARED, _match(data, pos, _CLEARED)


@njit(_I(BYTES, _I, _U[::1], _I, types.uint32[::1], _I, _I[::1]), nogil=True)
def _read_event(data, pos, hashes, hash_at, tokens, token_at, row):  # noqa: PLR0917  # kernels take no keywords
    """Fill ``row`` and the arrays from one event; return the position behind it."""
    header = _I(data[pos]) if pos < data.size else 0
    n_fields, is_map = header & 15, header & 0xF0 == 0x80
    if not is_map and header & 0xF0 != 0x90:
        return _OTHER
    row[:] = 0
    row[IS_MAP] = is_map
    row[KIND], pos = _kind(data, _field(data, pos + 1, is_map, _TYPE))
    n_known = 1
    if row[KIND] != CLEARED:
        n_known = 2
        row[N_HASHES], pos = _read_hashes(data, _field(data, pos, is_map, _HASHES), hashes, hash_at)
    if row[KIND] == STORED:
        n_known = 5
        pos = _field(data, pos, is_map, _PARENT)
        if pos >= 0 and pos < data.size and data[pos] == 0xC0:
            pos += 1
        else:
            bits, pos, _ = _integer(data, pos)
            row[HAS_PARENT], row[PARENT] = 1, _I(bits)
        row[N_TOKENS], pos = _read_tokens(
            data, _field(data, pos, is_map, _TOKENS), tokens, token_at
        )
        row[BLOCK_SIZE], pos = _natural(data, _field(data, pos, is_map, _SIZE))
    row[REST], row[N_REST] = pos, n_fields - n_known
    if row[N_REST] < 0:
        return _OTHER
    for _ in range(row[N_REST] * (2 if is_map else 1)):
        pos = span(data, pos, data.size)
    row[REST_END] = pos
    return pos


@njit(_I(PAYLOAD, _U[::1], types.uint32[::1], _I[:, ::1]), nogil=True)
def scan_batch(payload, hashes, tokens, table):
    """Read a batch of the usual shape; return its number of events, or -1 for another shape.

    Filled are the table [max_events + 1, N_COLUMNS] int64, whose first row has the bits of the
    float64 TIME and the RANK + 1 (0: none), and hashes uint64 and tokens uint32, one event behind
    the other; what does not fit is another shape. REST..REST_END are the bytes of the N_REST
    fields behind the known ones. O(n).
    """
    data = np.frombuffer(payload, dtype=np.uint8)
    if data.size < 12 or (data[0] != 0x92 and data[0] != 0x93) or data[1] != 0xCB:
        return _OTHER
    table[0, TIME], table[0, RANK] = _I(_big_endian(data, 2, 8)), 0
    n_events, pos = _array(data, 10)
    if pos < 0 or n_events >= table.shape[0]:
        return _OTHER
    n_hashes = n_tokens = 0
    for event in range(1, n_events + 1):
        row = table[event]
        pos = _read_event(data, pos, hashes, n_hashes, tokens, n_tokens, row)
        if pos < 0:
            return _OTHER
        n_hashes += row[N_HASHES]
        n_tokens += row[N_TOKENS]
    if data[0] == 0x93:
        if pos < data.size and data[pos] == 0xC0:
            pos += 1
        else:
            rank, pos = _natural(data, pos)
            table[0, RANK] = rank + 1
    return n_events if pos == data.size else _OTHER
