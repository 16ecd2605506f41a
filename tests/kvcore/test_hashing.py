"""Keys are the RFC's, for every block size, and no namespace shares one with another."""

import hypothesis.strategies as st
import numpy as np
import pytest
import xxhash
from hypothesis import given

from kvcore.errors import InvalidInputError
from kvcore.hashing import hash_blocks, namespace_root
from tests import naive

SEEDS = (0, 1, 1337, 1 << 32, (1 << 63) + 12345, (1 << 64) - 1)
seeds = st.one_of(st.just(1337), st.integers(0, (1 << 64) - 1))
WORDS = np.random.default_rng(3).integers(0, 1 << 32, size=2 * 4096, dtype=np.uint32)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_block_of_every_size_hashes_as_xxh3(seed):
    """The RFC's local hash; every length takes one of six paths of XXH3."""
    sizes = [*range(1, 300), *range(300, 4096, 61), 511, 512, 1024, 4095, 4096]
    for size in sizes:
        expected = xxhash.xxh3_64_intdigest(WORDS[:size].tobytes(), seed)
        assert hash_blocks(WORDS[:size], block_size=size, seed=seed).tolist() == [expected], size


@given(
    st.lists(st.integers(0, (1 << 32) - 1), max_size=90),
    st.integers(1, 40),
    st.none() | st.integers(0, (1 << 64) - 1),
    st.dictionaries(st.integers(0, 8), st.binary(max_size=70), max_size=3),
    seeds,
)
def test_kernel_agrees_with_its_naive_twin(tokens, block_size, root, extras, seed):
    """The compiled loop computes exactly what the definition says."""
    array = np.array(tokens, dtype=np.uint32)
    keys = hash_blocks(array, block_size=block_size, root=root, extras=extras, seed=seed)
    assert keys.tolist() == naive.hash_blocks(tokens, block_size, root, extras, seed)


def test_a_chain_can_be_hashed_piece_by_piece():
    """A key is all the state there is: events carry a run, and the key of the block before."""
    whole = hash_blocks(WORDS[:96], block_size=16, root=5)
    head = hash_blocks(WORDS[:32], block_size=16, root=5)
    tail = hash_blocks(WORDS[32:96], block_size=16, root=int(head[-1]))
    assert whole.tolist() == [*head.tolist(), *tail.tolist()]


def test_namespaces_are_apart():
    """Model, adapter, salt and block size each change the root, and absent is not empty."""
    roots = [
        namespace_root(model, block_size=size, lora=lora, salt=salt)
        for model in ("m", "n", "mA")
        for size in (16, 17)
        for lora in (None, "", "A", "AB")
        for salt in (None, "", "B", "AB")
    ]
    assert len(set(roots)) == len(roots)


def test_the_root_of_a_namespace_is_fixed():
    """Roots are in snapshots: another value would make every restored block unknown."""
    assert namespace_root("m", block_size=16) == ROOT_OF_M


ROOT_OF_M = 10259298793629375941


def test_tokens_are_read_where_they_lie():
    """Ray hands out read-only arrays."""
    tokens = WORDS[:64].copy()
    tokens.flags.writeable = False
    assert hash_blocks(tokens, block_size=16).size == 4


@pytest.mark.parametrize(
    "tokens",
    [WORDS[:64].astype(np.int64), WORDS[:64].reshape(2, 32), WORDS[:64:2], WORDS[:64].tolist()],
    ids=["int64", "2-D", "strided", "list"],
)
def test_other_arrays_are_refused(tokens):
    """A silent conversion would cost more than the hash; it is both a TypeError and ours."""
    with pytest.raises(InvalidInputError) as error:
        hash_blocks(tokens, block_size=16)
    assert isinstance(error.value, TypeError)


@pytest.mark.parametrize(
    "bad",
    [
        {"block_size": 0},
        {"block_size": 4097},
        {"block_size": 16, "root": -1},
        {"block_size": 16, "root": 1 << 64},
        {"block_size": 16, "seed": -1},
        {"block_size": 16, "extras": {-1: b""}},
    ],
)
def test_values_out_of_range_are_refused(bad):
    """Nothing wraps around in silence."""
    with pytest.raises(InvalidInputError):
        hash_blocks(WORDS[:64], **bad)


def test_less_than_a_block_has_no_key():
    """Engines cache whole blocks; the caller says why there is no score."""
    assert hash_blocks(WORDS[:15], block_size=16).size == 0
    assert hash_blocks(WORDS[:0], block_size=16).size == 0
