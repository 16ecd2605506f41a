"""Text to token ids, exactly as ``tokenizers`` does it with the model's tokenizer.json.

Two backends give the same ids. ``fastokens`` is the faster one and is taken where it
loads the file and agrees with ``tokenizers`` on a check at load; else ``tokenizers``
works through the call that releases the GIL, behind a cache of segments that is exact
(see `kvcore.segments`). Nothing here is approximate.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from itertools import groupby, product

import numpy as np
import tokenizers

from kvcore.errors import InvalidInputError, ModelDamagedError
from kvcore.segments import SegmentCache, cut_tokens
from kvcore.tokens import Tokens

try:
    import fastokens
except ImportError:  # no wheel for this platform: tokenizers does it all
    fastokens = None


class PromptTokenizer:
    """A model's tokenizer; threads may share it, and encoding releases the GIL."""

    def __init__(self, text: str, *, cache_bytes: int = 64 << 20, fast: bool = True) -> None:
        """Load the text of a tokenizer.json.

        Args:
            text: The file's text.
            cache_bytes: Budget of the segment cache; 0 turns it off.
            fast: Whether fastokens may be taken.

        Raises:
            ModelDamagedError: ``tokenizers`` cannot load it, or fails with it on any text.
        """
        self._text, self._cache_bytes = text, cache_bytes
        self._reference: _Reference | None = _Reference(text, cache_bytes)
        self._fast: _Fast | None = None
        self.fallback_reason: str | None = "fastokens is switched off"
        if fast:
            self._fast, self.fallback_reason = _load_fast(text, cache_bytes, self._reference)
        if self._fast is None:
            self._reference.slice_answers()
        else:
            self._reference = None  # half of the memory; its text brings it back if need be

    @classmethod
    def from_json(cls, text: str) -> PromptTokenizer:
        """Load the text of a tokenizer.json; see the class for the errors."""
        return cls(text)

    @property
    def backend(self) -> str:
        """The backend in use, ``fastokens`` or ``tokenizers``."""
        return "tokenizers" if self._fast is None else "fastokens"

    @property
    def size_bytes(self) -> int:
        """About how much memory the tokenizer takes, its cache full."""
        # Resident memory after loading seven real files: 8-28 and 7-16 times the file.
        return (10 if self._fast is None else 20) * len(self._text) + self._cache_bytes

    def encode(self, text: str, *, add_special_tokens: bool) -> Tokens:
        """Return the ids of ``text`` [n_tokens] uint32, perhaps read-only.

        Args:
            text: Any length.
            add_special_tokens: Whether to add what the file's post-processor adds,
                such as BOS: False for a rendered chat, True for a raw prompt.

        Raises:
            InvalidInputError: ``text`` holds a lone surrogate; the message says where.
            ModelDamagedError: The file makes ``tokenizers`` fail on this text.
        """
        _refuse_surrogates(text)
        if self._fast is not None:
            try:
                return self._fast.encode(text, add_special_tokens)
            except BaseException as error:  # a limit of its regex engine; the other has none
                if not _is_failure(error):
                    raise
        if self._reference is None:
            self._reference = _Reference(self._text, self._cache_bytes)
            self._reference.slice_answers()
        return self._reference.encode(text, add_special_tokens)

    def strings(self, tokens: Tokens) -> list[str]:
        """Return what each id is called in the vocabulary, such as ``Ġthe``."""
        backend = self._fast or self._reference
        assert backend is not None  # noqa: S101 - one of the two is always there
        return [backend.tokenizer.id_to_token(token) or "" for token in tokens.tolist()]


def _is_failure(error: BaseException) -> bool:
    # A panic in Rust arrives as a BaseException whose class cannot be imported.
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _refuse_surrogates(text: str) -> None:
    """Raise where ``text`` is not Unicode: half of a surrogate pair, which JSON can escape."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(
            f"prompt is not valid Unicode: character {error.start} is the lone surrogate "
            f"U+{ord(text[error.start]):04X}"
        ) from None


class _Fast:
    def __init__(self, text: str, cache_bytes: int) -> None:
        if fastokens is None:
            raise ModuleNotFoundError("it is not installed")
        self.tokenizer = fastokens.Tokenizer.from_json_str(text)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.enable_segment_cache(cache_bytes)

    def encode(self, text: str, add_special_tokens: bool) -> Tokens:
        ids, _ = self.tokenizer.encode_batch_flat([text], add_special_tokens)
        return np.frombuffer(ids, dtype=np.uint32)


class _Reference:
    def __init__(self, text: str, cache_bytes: int) -> None:
        try:
            self.tokenizer = tokenizers.Tokenizer.from_str(text)
        except BaseException as error:  # a bare Exception, or a panic
            if not _is_failure(error):
                raise
            raise ModelDamagedError(f"tokenizer.json cannot be loaded: {error}") from error
        self.tokenizer.no_truncation()  # some files ship one, or padding, switched on
        self.tokenizer.no_padding()
        self.added = list(self.tokenizer.get_added_tokens_decoder().values())
        _refuse_empty(self.tokenizer, self.added)
        self._cache = SegmentCache(self._find_cuts(), cache_bytes)
        self._around = self._find_around()

    def encode(self, text: str, add_special_tokens: bool) -> Tokens:
        if not add_special_tokens:
            return self._cache.encode(text, self._encode_all)
        if self._around is None:
            return self._encode_all([text], add_special_tokens=True)[0]
        before, after = self._around
        return np.concatenate((before, self._cache.encode(text, self._encode_all), after))

    def slice_answers(self) -> None:
        """Let ids come in slices that are cut before the GIL is taken again.

        Cut afterwards, those of a megabyte keep it for 7 ms.
        """
        text = "The quick brown fox"
        whole = self._encode_all([text])[0].tolist()
        self.tokenizer.enable_truncation(2)
        # A post-processor that repeats a text would repeat each slice.
        if self._around is not None and self._encode_all([text])[0].tolist() == whole:
            self.tokenizer.enable_truncation(_SLICE_TOKENS)
        else:
            self.tokenizer.no_truncation()

    def _encode_all(self, texts: list[str], *, add_special_tokens: bool = False) -> list[Tokens]:
        encode = self.tokenizer.encode_batch_fast
        try:
            encodings = encode(texts, add_special_tokens=add_special_tokens)
        except BaseException as error:
            if not _is_failure(error):
                raise
            raise ModelDamagedError(f"tokenizer.json fails on a prompt: {error}") from error
        return [_ids_of(encoding) for encoding in encodings]

    def _find_cuts(self) -> list[str]:
        cuts = cut_tokens(self.added, normalizes=_normalizes(self.tokenizer))
        pieces = ["a", *(f"{cut}b" for cut in cuts[:2])]
        # A post-processor works on the whole, even without special tokens: it may repeat it.
        apart = np.concatenate(self._encode_all(pieces)).tolist()
        return cuts if self._encode_all(["".join(pieces)])[0].tolist() == apart else []

    def _find_around(self) -> tuple[Tokens, Tokens] | None:
        """Ids that the post-processor puts before and after any text; None if it does else."""
        found = None
        for text in ("a", "The quick brown fox"):
            bare = self._encode_all([text])[0].tolist()
            full = self._encode_all([text], add_special_tokens=True)[0].tolist()
            extra = len(full) - len(bare)
            around = [
                (full[:at], full[at + len(bare) :])
                for at in range(extra + 1)
                if full[at : at + len(bare)] == bare
            ]
            if len(around) != 1 or found not in (None, around[0]):
                return None
            found = around[0]
        if found is None:
            return None
        return np.array(found[0], np.uint32), np.array(found[1], np.uint32)


def _ids_of(encoding: tokenizers.Encoding) -> Tokens:
    """Ids of an encoding, which is used up."""
    # Ids come as a list of Python ints under the GIL: 300,000 of them take 15 ms. In slices
    # other threads have their turn between.
    rest = encoding.overflowing
    if not rest:
        encoding.truncate(_SLICE_TOKENS)
        rest = encoding.overflowing
    parts = [encoding, *rest]
    ids = np.empty(sum(map(len, parts)), dtype=np.uint32)
    start = 0
    for part in parts:
        ids[start : start + len(part)] = part.ids
        start += len(part)
    return ids


def _refuse_empty(tokenizer: tokenizers.Tokenizer, added: list[tokenizers.AddedToken]) -> None:
    """Raise where a token is normalized to nothing: it is found everywhere, without end."""
    normalize = tokenizer.normalizer and tokenizer.normalizer.normalize_str
    for token in added:
        if normalize and token.normalized and token.content and not normalize(token.content):
            raise ModelDamagedError(
                f"tokenizer.json cannot be used: its normalizer makes {token.content!r} empty"
            )


def _normalizes(tokenizer: tokenizers.Tokenizer) -> bool:
    if tokenizer.normalizer is None:
        return False
    parts = json.loads(tokenizer.normalizer.__getstate__())
    return parts.get("type") != "Sequence" or bool(parts.get("normalizers"))


def _load_fast(
    text: str, cache_bytes: int, reference: _Reference
) -> tuple[_Fast | None, str | None]:
    """The fast backend, or why it is not taken."""
    try:
        fast = _Fast(text, cache_bytes)
        checks = list(product(_check_texts(reference.added), (False, True)))
        for sample, special in (*checks, (_all_kinds_of_characters(), False)):
            expected = reference.tokenizer.encode(sample, add_special_tokens=special).ids
            # Twice: the second one comes from its cache.
            for _ in range(2):
                if fast.encode(sample, special).tolist() != expected:
                    return None, f"fastokens differs from tokenizers on {sample[:40]!r}"
    except BaseException as error:
        if not _is_failure(error):
            raise
        return None, f"fastokens cannot load it: {error}"
    return fast, None


def _check_texts(added: list[tokenizers.AddedToken]) -> Iterator[str]:
    """Texts on which tokenizers are known to part ways."""
    yield from _SAMPLES
    # Flags of added tokens are the usual difference: each kind of token once, in all company.
    kinds = {
        (token.lstrip, token.rstrip, token.single_word, token.normalized, token.special): token
        for token in reversed(added)
    }
    some = [token.content for token in (*kinds.values(), *added[:8], *added[-8:])]
    # They also part ways where one token strips what another one is.
    yield "".join(f"{a}{b} x{a} {b}" for a, b in product(dict.fromkeys(some), repeat=2))
    for content in dict.fromkeys(some):
        yield f"{content}x {content} y{content}\n{content}{content}  {content}Z"
        yield f" {content.upper()} {content.lower()}\t{content} é{content}。"
    yield "hello".join(some)


def _all_kinds_of_characters() -> str:
    """The first and the last of each run of characters of one category, in company.

    Regex engines differ on what is white space, a word or a letter: PCRE2 takes U+180E
    for white space and 362 marks for the end of a word, and each has its version of Unicode.
    """
    points = (chr(point) for point in (*range(0xD800), *range(0xE000, 0x20000)))
    ends = []
    for _, run in groupby(points, unicodedata.category):
        first, *rest = run
        ends += [first, *rest[-1:]]
    return "".join(f"a{c}B {c}1\n!{c}'s " for c in ends)


_SLICE_TOKENS = 65_536
_SAMPLES = (
    "",
    " ",
    "Hello, world! It's 3.14159 o'clock; I'LL pay $1,234,567.89.",
    "  two  spaces\n\n\n\tand\ttabs \r\n trailing   ",
    "def f(x):\n    return x ** 2  # comment\n\n\nclass A:\n\tpass\n",
    "naïve café — “quotes” ‘single’ … ½ ﬁ ﬂ Å Å é é",
    "日本語のテキスト。中文字符，標點符號！한국어 텍스트",
    "Здравствуй, мир! שלום עולם مرحبا بالعالم नमस्ते ไทย",
    "👋🏽 👨‍👩‍👧‍👦 🇩🇪 🏳️‍🌈 ☃︎ \u200b\u200d\ufeff\u00a0\u2028\u3000 \x00\x07\x7f\x85",
    "a" * 300 + " " * 70 + "\n" * 40 + "0123456789" * 12 + "!?" * 30,
    '{"name": "f", "arguments": {"x": [1, 2.5e-3, null, true]}}',
    "https://example.org/a/b?c=d&e=%20#f  C:\\dir\\file.txt  x@y.z",
    "ＦＵＬＬ　ｗｉｄｔｈ Ⅷ ² ℌ ẛ̣ 𝔘𝔫𝔦 ǅ İ ı ß ΣΑΣ",
)
