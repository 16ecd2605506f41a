"""Compiled loops over bytes on the wire."""

from numba import njit, types, uint64

_BYTES = types.Array(types.uint8, 1, "C", readonly=True)
_BASIS, _PRIME = uint64(0xCBF29CE484222325), uint64(0x100000001B3)


@njit(uint64(_BYTES), nogil=True)
def fnv1a_64(data):
    """Return FNV-1a 64 of ``data`` [n] uint8. O(n)."""
    state = _BASIS
    for byte in data:
        state = (state ^ uint64(byte)) * _PRIME
    return state
