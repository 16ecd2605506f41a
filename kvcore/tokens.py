"""Token ids as they travel everywhere here: flat uint32 arrays, never lists of ints."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvcore.errors import InvalidInputError

Tokens = NDArray[np.uint32]


def as_tokens(ids: Sequence[int]) -> Tokens:
    """Pack token ids that a client sent.

    Raises:
        InvalidInputError: An id is not a whole number in [0, 2**32).
    """
    if not isinstance(ids, list | tuple) or not all(type(i) is int for i in ids):
        raise InvalidInputError("token ids must be a list of whole numbers")
    if ids and not 0 <= min(ids) <= max(ids) < 1 << 32:
        raise InvalidInputError("token ids must be in [0, 2**32)")
    return np.array(ids, dtype=np.uint32)
