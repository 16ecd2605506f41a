"""Cutting a text so that its pieces tokenize on their own to the same ids, and a cache of pieces.

``tokenizers`` first matches added tokens on the raw text and then treats what lies
between them piece by piece. So a text may be cut *before* an added token that is always
matched where it stands, whatever surrounds it. A chat that grows by a turn is then
mostly pieces that were seen before. Cutting after a token is not exact: ``rstrip``
reaches into what follows, and Metaspace looks at what comes first.
"""

from __future__ import annotations

import re
import string
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import groupby
from os.path import commonprefix

import numpy as np
from tokenizers import AddedToken

from kvcore.tokens import Tokens

# Surely neither white space nor part of a word, whoever asks.
_PUNCTUATION = frozenset(string.punctuation) - {"_"}
# What an entry takes besides its text and ids: dict slot, str and array headers.
_ENTRY_BYTES = 320
_LONGEST_TOKEN = 512  # real ones end at 50 characters or so
# Characters that are searched at a stretch: 2 ms under the GIL at the worst.
_WINDOW = 65_536


def cut_tokens(added: Collection[AddedToken], *, normalizes: bool) -> list[str]:
    """Return the added tokens before which every text may be cut.

    Args:
        added: The tokenizer's whole added vocabulary.
        normalizes: Whether its normalizer can change a text.
    """
    tokens = [token for token in added if token.content]
    if any(len(token.content) > _LONGEST_TOKEN for token in tokens):
        return []  # every part of every token is looked at
    # Tokens that are not normalized are matched first, so the others cannot be in their way.
    first = [token for token in tokens if not token.normalized]
    unsafe = _unsafe(first, first) | (
        {token.content for token in tokens if token.normalized}
        if normalizes
        else _unsafe(tokens, tokens) | _covered_later(tokens, first)
    )
    return [token.content for token in tokens if token.content not in unsafe]


def _unsafe(tokens: Collection[AddedToken], others: Collection[AddedToken]) -> set[str]:
    """Tokens that may not be matched where they stand, or only together with what precedes."""
    # A neighbour that strips white space or asks for a word's end looks at the first character.
    unsafe = {token.content for token in tokens if token.content[0] not in _PUNCTUATION}
    by_prefix: dict[str, set[str]] = defaultdict(set)
    for token in tokens:
        for end in range(1, len(token.content) + 1):
            by_prefix[token.content[:end]].add(token.content)
    contents = {token.content for token in tokens}
    for other in others:
        text = other.content
        if other.lstrip or other.single_word:
            # A match that begins here would reach to the left, or not happen.
            unsafe.update(text[:end] for end in range(1, len(text) + 1))
        for at in range(1, len(text)):
            # A match further left would cover the first character of what begins here.
            unsafe.update(by_prefix.get(text[at:], ()))
            unsafe.update(text[at:end] for end in range(at + 1, len(text) + 1))
    return unsafe & contents


def _covered_later(tokens: Collection[AddedToken], first: Collection[AddedToken]) -> set[str]:
    """Normalized tokens that a token of the first pass may tear apart."""
    heads = {token.content[:end] for token in first for end in range(1, len(token.content) + 1)}
    whole = {token.content for token in first}
    return {
        token.content
        for token in tokens
        if token.normalized
        and any(
            token.content[at:] in heads
            or any(token.content[at:end] in whole for end in range(at + 1, len(token.content) + 1))
            for at in range(len(token.content))
        )
    }


def _pattern(tokens: Sequence[str]) -> str:
    """A regex of sorted tokens, the longest first, that reads a prefix in common once.

    Plain alternatives are tried one by one: a thousand of them at a megabyte of ``<``
    took 8 s, during which ``re`` holds the GIL.
    """
    branches = []
    for _, group in groupby(filter(None, tokens), lambda token: token[0]):
        same = list(group)
        prefix = commonprefix(same)  # noqa: RUF071 - of texts, not of paths
        rest = [token[len(prefix) :] for token in same]
        branches.append(re.escape(prefix) + (_pattern(rest) if len(rest) > 1 else ""))
    return f"(?:{'|'.join(branches)}){'' if all(tokens) else '?'}"


class SegmentCache:
    """Ids of pieces of text, within a byte budget.

    Two generations: what is used lives in the young one, which ages as a whole when it
    holds half of the budget. Threads may race here; at worst they encode a piece twice.
    """

    def __init__(self, cuts: Sequence[str], capacity_bytes: int) -> None:
        try:
            self._cut = re.compile(_pattern(sorted(set(cuts)))) if cuts else None
        except RecursionError:  # hundreds of tokens, each the beginning of the next
            self._cut = None
        self._longest = max(map(len, cuts), default=0)
        self._half_bytes = capacity_bytes // 2
        self._young: dict[str, Tokens] = {}
        self._old: dict[str, Tokens] = {}
        self._young_bytes = self._old_bytes = 0

    @property
    def size_bytes(self) -> int:
        """What the cache holds now."""
        return self._young_bytes + self._old_bytes

    def encode(self, text: str, encode_all: Callable[[list[str]], list[Tokens]]) -> Tokens:
        """Return the ids of ``text``; pieces that are not known go to ``encode_all`` at once."""
        pieces = self._split(text)
        if self._half_bytes <= 0 or len(pieces) == 1:
            # A text without cuts is rarely seen again as a whole, and it can be huge.
            return encode_all([text])[0]
        known = {piece: self._look_up(piece) for piece in pieces}
        missing = [piece for piece, ids in known.items() if ids is None]
        if missing:
            for piece, ids in zip(missing, encode_all(missing), strict=True):
                known[piece] = ids
                self._keep(piece, ids)
        return np.concatenate([known[piece] for piece in pieces])  # type: ignore[arg-type] - none is None now

    def _split(self, text: str) -> list[str]:
        at = [*self._find_cuts(text)]
        if not at or at[0] != 0:
            at.insert(0, 0)
        return [text[start:end] for start, end in zip(at, [*at[1:], len(text)], strict=True)]

    def _find_cuts(self, text: str) -> Iterator[int]:
        if self._cut is None:
            return
        done = 0
        for start in range(0, len(text), _WINDOW):
            stop = start + _WINDOW
            for match in self._cut.finditer(text, max(start, done), stop + self._longest):
                if match.start() >= stop:
                    break
                done = match.end()
                yield match.start()

    def _look_up(self, piece: str) -> Tokens | None:
        ids = self._young.get(piece)
        if ids is None:
            ids = self._old.get(piece)
            if ids is not None:
                self._keep(piece, ids)
        return ids

    def _keep(self, piece: str, ids: Tokens) -> None:
        size_bytes = 4 * len(piece) + ids.nbytes + _ENTRY_BYTES
        if size_bytes > self._half_bytes:
            return
        if self._young_bytes + size_bytes > self._half_bytes:
            self._old, self._old_bytes = self._young, self._young_bytes
            self._young, self._young_bytes = {}, 0
        self._young[piece] = ids
        self._young_bytes += size_bytes
