"""How the tour looks: 80 columns, bars, and plain text wherever nobody watches live."""

import math
import textwrap
from collections.abc import Mapping
from typing import TextIO

WIDTH = 80  # columns
BAR_WIDTH = 32
_NAME_WIDTH = 16
_BOLD, _GREEN, _END = "\033[1m", "\033[32m", "\033[0m"


class Screen:
    """Write lines of at most 80 columns; colours only for a terminal that wants them."""

    def __init__(self, out: TextIO, environment: Mapping[str, str]) -> None:
        self._out = out
        self._has_color = (
            out.isatty() and not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"
        )
        self._glyphs = "█░" if _can_write(out, "█░") else "#."

    def line(self, text: str = "") -> None:
        """Write one line as it is, without what would steer a terminal."""
        self._write(printable(text))

    def title(self, text: str) -> None:
        """Open a part of the tour."""
        rule = "─" if _can_write(self._out, "─") else "-"
        self._write("")
        self._write(self._paint(_BOLD, f"{printable(text)} ".ljust(WIDTH, rule)))

    def say(self, text: str, indent: int = 2) -> None:
        """Write prose, wrapped."""
        for line in wrapped(text, indent):
            self._write(line)

    def bar(self, name: str, part: int, whole: int, unit: str) -> None:
        """Draw ``part`` of ``whole`` as a bar, with both numbers."""
        n_full = filled(part, whole, BAR_WIDTH)
        full, rest = self._glyphs[0] * n_full, self._glyphs[1] * (BAR_WIDTH - n_full)
        label = clipped(name, _NAME_WIDTH).ljust(_NAME_WIDTH)
        self._write(f"    {label} {self._paint(_GREEN, full)}{rest} {part}/{whole} {unit}")

    def _paint(self, code: str, text: str) -> str:
        return f"{code}{text}{_END}" if self._has_color and text else text

    def _write(self, text: str) -> None:
        encoding = self._out.encoding or "utf-8"
        writable = text.encode(encoding, "replace").decode(encoding)
        self._out.write(writable.rstrip() + "\n")
        self._out.flush()


def filled(part: int, whole: int, width: int) -> int:
    """Return how many of ``width`` cells ``part`` of ``whole`` fills.

    Rounded towards the middle: only nothing looks empty, and only all of it looks full.
    """
    if whole <= 0 or part <= 0:
        return 0
    if part >= whole:
        return width
    return min(max(math.floor(width * part / whole), 1), width - 1)


def wrapped(text: str, indent: int) -> list[str]:
    """Break prose into lines of at most 80 columns, each indented."""
    margin = " " * indent
    return textwrap.wrap(
        printable(text),
        WIDTH,
        initial_indent=margin,
        subsequent_indent=margin,
        break_on_hyphens=False,
    )


def clipped(text: str, width: int) -> str:
    """Shorten a text to ``width`` columns, marking the cut with three dots."""
    text = printable(text)
    return text if len(text) <= width else text[: max(0, width - 3)] + "..."


def printable(text: str) -> str:
    """Replace what a terminal would obey: a service's words are shown, not executed."""
    return "".join(char if char.isprintable() else " " for char in text)


def _can_write(out: TextIO, text: str) -> bool:
    try:
        text.encode(out.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True
