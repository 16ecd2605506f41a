"""Block keys: the rolling XXH3-64 of Mooncake's KV-events RFC (#1403, #1527), as Dynamo uses it.

    local[i] = XXH3(tokens of block i as little-endian uint32, seed)
    key[0]   = local[0], or XXH3(root ‖ local[0], seed) in a namespace
    key[i]   = XXH3(key[i - 1] ‖ local[i], seed)

A namespace (model, LoRA adapter, cache salt, block size) has one 64-bit root that is mixed in
before the first block, so equal prefixes share keys inside it and never across. Extra keys of a
multimodal block go into its local hash: ``XXH3(local ‖ XXH3(length ‖ bytes ‖ padding))``.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from kvcore.errors import ArrayError, InvalidInputError
from kvcore.kernels import xxh3

Tokens = NDArray[np.uint32]
BlockKeys = NDArray[np.uint64]

DEFAULT_SEED = 1337
MAX_BLOCK_SIZE = 4096
_UINT32, _UINT64 = np.dtype(np.uint32), np.dtype(np.uint64)
_ARRAY, _DENSE = np.ndarray, (4,)
NO_EXTRAS: NDArray[np.uint64] = np.empty(0, dtype=np.uint64)


def namespace_root(
    model: str, *, block_size: int, lora: str | None = None, salt: str | None = None
) -> int:
    """Return the 64-bit root that keeps a model, adapter, salt and block size apart.

    Raises:
        InvalidInputError: ``block_size`` is outside 1..4096.
    """
    check_block_size(block_size)
    # Each field carries its length, and absent is not empty: no two namespaces share an encoding.
    fields = [b"kvatlas namespace 1", model.encode("utf-8", "surrogatepass")]
    encoded = bytearray(block_size.to_bytes(4, "little"))
    for field in (*fields, *(None if f is None else f.encode() for f in (lora, salt))):
        encoded += (0 if field is None else len(field) + 1).to_bytes(4, "little")
        encoded += field or b""
    return hash_bytes(bytes(encoded), seed=DEFAULT_SEED)


def hash_bytes(data: bytes, *, seed: int) -> int:
    """Return XXH3-64 of the length of ``data`` and ``data``, padded to whole 32-bit words."""
    padded = len(data).to_bytes(4, "little") + data + bytes(-len(data) % 4)
    words, out = np.frombuffer(padded, dtype=np.uint32), np.empty(1, dtype=np.uint64)
    xxh3.digests(words, words.size, np.uint64(seed), out)
    return int(out[0])


def hash_blocks(
    tokens: Tokens,
    *,
    block_size: int,
    root: int | None = None,
    extras: Mapping[int, bytes] | None = None,
    seed: int = DEFAULT_SEED,
) -> BlockKeys:
    """Hash a prompt into one chained key per full block.

    Prompts that share their first ``k * block_size`` tokens, the root and the extras of those
    blocks share their first ``k`` keys. A trailing partial block has none: engines cache full
    blocks.

    Args:
        tokens: Prompt [n_tokens] uint32, C-contiguous; read-only is fine.
        block_size: Tokens per block, 1..4096; must equal the engine's.
        root: From `namespace_root`, or the key of the block before; None is the RFC's plain chain.
        extras: Block number -> bytes that this block's content adds to its tokens.
        seed: In [0, 2**64).

    Returns:
        Keys [n_tokens // block_size] uint64, first block first.

    Raises:
        InvalidInputError: A value is out of its range.
        ArrayError: ``tokens`` is not a 1-D uint32 array, which is a bug in the caller.
    """
    n_blocks = count_blocks(tokens, block_size, 0, whole=False)
    check_word(seed, "seed")
    start = np.uint64(check_word(root or 0, "root"))
    keys = np.empty(n_blocks, dtype=np.uint64)
    mixed_in = encode_extras(extras, keys.size, seed)
    xxh3.chain_blocks(tokens, block_size, mixed_in, root is not None, start, np.uint64(seed), keys)
    return keys


def encode_extras(
    extras: Mapping[int, bytes] | None, n_blocks: int, seed: int
) -> NDArray[np.uint64]:
    """Return [2 * k] uint64: the number of each block with extra keys, and their digest.

    Extras of the trailing partial block are left out: it has no key.

    Raises:
        InvalidInputError: A block number is negative.
    """
    if not extras:
        return NO_EXTRAS
    if min(extras) < 0:
        raise InvalidInputError(f"extra keys for block {min(extras)}")
    pairs = [(b, hash_bytes(extra, seed=seed)) for b, extra in extras.items() if b < n_blocks]
    return np.array(pairs, dtype=np.uint64).reshape(-1)


def check_block_size(block_size: int) -> None:
    """Raise InvalidInputError unless ``block_size`` is 1..4096 tokens."""
    if not 1 <= block_size <= MAX_BLOCK_SIZE:
        raise InvalidInputError(f"block_size must be 1 to {MAX_BLOCK_SIZE}, got {block_size}")


def check_tokens(tokens: Tokens) -> None:
    """Raise ArrayError unless ``tokens`` is a 1-D C-contiguous uint32 array."""
    if not isinstance(tokens, np.ndarray) or tokens.dtype != np.uint32 or tokens.ndim != 1:
        raise ArrayError("tokens must be a 1-D uint32 array")
    if not tokens.flags.c_contiguous or not tokens.flags.aligned:
        raise ArrayError("tokens must be C-contiguous and aligned")


def check_keys(keys: BlockKeys) -> None:
    """Raise ArrayError unless ``keys`` is a 1-D C-contiguous uint64 array."""
    is_array = type(keys) is np.ndarray and keys.dtype is _UINT64
    if is_array and keys.strides == (8,) and keys.flags.aligned:
        return
    if not isinstance(keys, np.ndarray) or keys.dtype != np.uint64 or keys.ndim != 1:
        raise ArrayError("block keys must be a 1-D uint64 array")
    if not keys.flags.c_contiguous or not keys.flags.aligned:
        raise ArrayError("block keys must be C-contiguous and aligned")


def check_word(word: int, what: str) -> int:
    """Return ``word``; raise InvalidInputError unless it is in [0, 2**64)."""
    if not 0 <= word < 1 << 64:
        raise InvalidInputError(f"{what} must be in [0, 2**64), got {word}")
    return word


def count_blocks(tokens: Tokens, block_size: int, n_hashes: int, *, whole: bool = True) -> int:
    """Return how many blocks the tokens are, as many as the hashes at least.

    Raises:
        InvalidInputError: They are fewer, or, if ``whole``, there is a rest.
    """
    # One look at what is nearly always right: the checks that explain take 1 µs, of every event.
    if not 1 <= block_size <= MAX_BLOCK_SIZE:
        check_block_size(block_size)
    if type(tokens) is not _ARRAY or tokens.dtype is not _UINT32 or tokens.strides != _DENSE:
        check_tokens(tokens)
    if not tokens.flags.aligned:
        check_tokens(tokens)
    n_blocks = tokens.size // block_size
    if (whole and n_blocks * block_size != tokens.size) or n_hashes > n_blocks:
        raise InvalidInputError(
            f"{n_hashes} hashes of blocks of {block_size} tokens do not fit {tokens.size} tokens"
        )
    return n_blocks
