# ruff: noqa: PLR0917  # kernels take no keywords
"""XXH3-64 over 32-bit words, and the chain of block keys made of it.

Source: the xxHash specification (XXH3, 64 bits, seeded), whose test twin is the ``xxhash``
package. Tokens are 32-bit words, so only lengths that are a multiple of four bytes occur.

Every operand is uint64 on purpose: numba types ``uint64 ^ int`` as int64, whose ``>>`` drags the
sign in.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.errors import TypingError

from kvcore.kernels.memory import entry, inner, instruction, pointer32, pointer64

_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8a8"
    "fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb17"
    "0ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
# The 64-bit word at every byte offset: the middle and long paths read the secret unaligned.
_S = np.array([int.from_bytes(_SECRET[o : o + 8], "little") for o in range(185)], dtype=np.uint64)

TOKENS = types.Array(types.uint32, 1, "C", readonly=True)  # read-only arrays come from Ray
KEYS = types.Array(types.uint64, 1, "C", readonly=True)
OUT = types.uint64[::1]
WORDS = types.CPointer(types.uint32)
_U, _I, _B, _KEYS = types.uint64, types.int64, types.boolean, types.CPointer(types.uint64)

_P32_1, _P32_2, _P32_3 = np.uint64(0x9E3779B1), np.uint64(0x85EBCA77), np.uint64(0xC2B2AE3D)
_P64_1, _P64_2 = np.uint64(0x9E3779B185EBCA87), np.uint64(0xC2B2AE3D27D4EB4F)
_P64_3, _P64_4 = np.uint64(0x165667B19E3779F9), np.uint64(0x85EBCA77C2B2AE63)
_P64_5 = np.uint64(0x27D4EB2F165667C5)
_MX1, _MX2 = np.uint64(0x165667919E3779F9), np.uint64(0x9FB21C651E98DF25)
_16, _24, _28, _32, _35 = (np.uint64(n) for n in (16, 24, 28, 32, 35))
_37, _47, _49, _64 = (np.uint64(n) for n in (37, 47, 49, 64))
_4 = np.uint64(4)
_LOW = np.uint64(0xFFFFFFFF)


@instruction
def _fold(_context, a, b):
    """Low half xor high half of the 128-bit product: one multiplication on x86 and Arm."""
    if a != types.uint64 or b != types.uint64:
        raise TypingError("both factors must be uint64")

    def build(_ctx, builder, _sig, args):
        wide = ir.IntType(128)
        product = builder.mul(builder.zext(args[0], wide), builder.zext(args[1], wide))
        high = builder.lshr(product, ir.Constant(wide, 64))
        return builder.trunc(builder.xor(product, high), ir.IntType(64))

    return types.uint64(types.uint64, types.uint64), build


@instruction
def _byteswap(_context, a):
    if a != types.uint64:
        raise TypingError("the operand must be uint64")

    def build(_ctx, builder, _sig, args):
        return builder.bswap(args[0])

    return types.uint64(types.uint64), build


@inner(_U(_U))
def _avalanche(h):
    h = (h ^ (h >> _37)) * _MX1
    return h ^ (h >> _32)


@inner(_U(WORDS, _I))
def _read(words, i):
    return np.uint64(words[i]) | (np.uint64(words[i + 1]) << _32)


@inner(_U(WORDS, _I, _I, _U))
def _mix16(words, i, secret, seed):
    return _fold(
        _read(words, i) ^ (_S[secret] + seed), _read(words, i + 2) ^ (_S[secret + 8] - seed)
    )


@inner(_U(_I, _U))
def _seeded(word, seed):
    """Return word ``word`` of the secret that the long path derives from the seed."""
    return _S[8 * word] - seed if word & 1 else _S[8 * word] + seed


@inner(_U(_I, _U))
def _seeded_at(offset, seed):
    shift = np.uint64(8 * (offset & 7))
    word = offset >> 3
    return (_seeded(word, seed) >> shift) | (_seeded(word + 1, seed) << (_64 - shift))


@inner(_U(WORDS, _I, _I, _U))
def _hash_long(words, start, n, seed):
    """More than 240 bytes: eight lanes over stripes of 64 bytes, mixed after every KiB."""
    acc = np.array((_P32_3, _P64_1, _P64_2, _P64_3, _P64_4, _P32_2, _P64_5, _P32_1))
    stripes = (n - 1) >> 4
    for stripe in range(stripes):
        for lane in range(8):
            data = _read(words, start + 16 * stripe + 2 * lane)
            key = data ^ _seeded((stripe & 15) + lane, seed)
            acc[lane ^ 1] += data
            acc[lane] += (key & _LOW) * (key >> _32)
        if stripe & 15 == 15:
            for lane in range(8):
                h = acc[lane]
                acc[lane] = (h ^ (h >> _47) ^ _seeded(16 + lane, seed)) * _P32_1
    for lane in range(8):
        data = _read(words, start + n - 16 + 2 * lane)
        key = data ^ _seeded_at(121 + 8 * lane, seed)
        acc[lane ^ 1] += data
        acc[lane] += (key & _LOW) * (key >> _32)
    h = np.uint64(4 * n) * _P64_1
    for pair in range(4):
        low = acc[2 * pair] ^ _seeded_at(11 + 16 * pair, seed)
        h += _fold(low, acc[2 * pair + 1] ^ _seeded_at(19 + 16 * pair, seed))
    return _avalanche(h)


@inner(_U(WORDS, _I, _I, _U))
def _hash_mid(words, start, n, seed):
    """17 to 240 bytes."""
    h = np.uint64(4 * n) * _P64_1
    end = start + n
    if n <= 32:
        if n > 8:
            if n > 16:
                if n > 24:
                    h += _mix16(words, start + 12, 96, seed) + _mix16(words, end - 16, 112, seed)
                h += _mix16(words, start + 8, 64, seed) + _mix16(words, end - 12, 80, seed)
            h += _mix16(words, start + 4, 32, seed) + _mix16(words, end - 8, 48, seed)
        h += _mix16(words, start, 0, seed) + _mix16(words, end - 4, 16, seed)
        return _avalanche(h)
    for i in range(8):
        h += _mix16(words, start + 4 * i, 16 * i, seed)
    h = _avalanche(h)
    for i in range(8, n // 4):
        h += _mix16(words, start + 4 * i, 16 * (i - 8) + 3, seed)
    return _avalanche(h + _mix16(words, end - 4, 119, seed))


@inner(_U(_U, _U, _U, _U))
def _hash_9_to_16(first, last, n_bytes, seed):
    low = first ^ ((_S[24] ^ _S[32]) + seed)
    high = last ^ ((_S[40] ^ _S[48]) - seed)
    return _avalanche(n_bytes + _byteswap(low) + high + _fold(low, high))


@inner(_U(_U, _U, _U))
def pair_hash(first, second, seed):
    """Return XXH3-64 of ``first ‖ second`` as little-endian 64-bit words."""
    return _hash_9_to_16(first, second, _16, seed)


@inner(_U(WORDS, _I, _I, _U))
def words_hash(words, start, n, seed):
    """Return XXH3-64 of the ``4 * n`` bytes from word ``start`` on; ``n`` is at least 1. O(n)."""
    if n > 60:
        return _hash_long(words, start, n, seed)
    if n > 4:
        return _hash_mid(words, start, n, seed)
    if n > 2:
        first = _read(words, start)
        return _hash_9_to_16(first, _read(words, start + n - 2), np.uint64(4 * n), seed)
    seed ^= _byteswap(seed & _LOW)
    h = np.uint64(words[start + n - 1]) + (np.uint64(words[start]) << _32)
    h ^= (_S[8] ^ _S[16]) - seed
    h ^= ((h << _49) | (h >> (_64 - _49))) ^ ((h << _24) | (h >> (_64 - _24)))
    h *= _MX2
    h ^= (h >> _35) + np.uint64(4 * n)
    h *= _MX2
    return h ^ (h >> _28)


@inner(types.void(WORDS, _I, _KEYS, _I, _B, _U, _U, _KEYS, _I))
def chain(words, block_size, extras, n_extras, has_parent, parent, seed, keys, n):
    """Fill ``keys[:n]`` with chained keys; without a parent the first local hash stands.

    extras [2 * n_extras]: the number of a block, the digest of its extra keys.
    """
    for block in range(n):
        keys[block] = words_hash(words, block * block_size, block_size, seed)
    for i in range(0, 2 * n_extras, 2):
        block = np.int64(extras[i])
        keys[block] = pair_hash(keys[block], extras[i + 1], seed)
    key = parent
    for block in range(n):
        key = pair_hash(key, keys[block], seed) if has_parent or block else keys[block]
        keys[block] = key


@entry(types.void(TOKENS, _I, KEYS, _B, _U, _U, OUT))
def chain_blocks(tokens, block_size, extras, has_parent, parent, seed, keys):
    """Be `chain` for Python; tokens [>= keys.size * block_size]."""
    words, pairs = pointer32(tokens.ctypes.data), pointer64(extras.ctypes.data)
    out, n = pointer64(keys.ctypes.data), keys.size
    chain(words, block_size, pairs, extras.size // 2, has_parent, parent, seed, out, n)


@entry(types.void(TOKENS, _I, _U, OUT))
def digests(words, size, seed, out):
    """Fill ``out[i]`` with the hash of the i-th group of ``size`` words."""
    for i in range(out.size):
        out[i] = words_hash(pointer32(words.ctypes.data), i * size, size, seed)
