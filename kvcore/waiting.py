"""Runs of blocks whose parent is not known yet: bounded, the oldest goes first."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from kvcore.engine_hashes import EngineHash
from kvcore.hashing import Tokens
from kvcore.holders import Scope


@dataclass
class WaitingRun:
    """One store that cannot be placed; ``names[i]`` is None once it was removed again."""

    holder: int
    scope: Scope
    names: list[EngineHash | None]
    parent: EngineHash
    tokens: Tokens
    block_size: int
    extras: Mapping[int, bytes]
    n_left: int = 0  # names; kept by the area

    def n_blocks(self) -> int:
        """Return how many blocks still wait."""
        return sum(name is not None for name in self.names)

    def n_unnamed(self) -> int:
        """Return how many blocks have tokens alone: a window has left them behind."""
        return self.tokens.size // self.block_size - len(self.names)


class WaitingArea:
    """Runs in order of arrival, found by the parent they wait for or by a name in them."""

    def __init__(self, max_blocks: int) -> None:
        self.max_blocks = max_blocks
        self.runs: dict[int, WaitingRun] = {}
        self.dropped: defaultdict[int, int] = defaultdict(int)  # blocks, by holder
        self.n_blocks = self.n_unnamed = 0
        self._next = 0
        # In order of arrival; dicts, so that taking one out of many costs nothing.
        self._by_parent: defaultdict[tuple[Scope, EngineHash], dict[int, None]] = defaultdict(dict)
        self._by_name: defaultdict[tuple[int, EngineHash], dict[tuple[int, int], None]]
        self._by_name = defaultdict(dict)  # runs, and places in them

    def add(self, run: WaitingRun) -> None:
        """Let a run wait, and drop the oldest ones beyond the bound."""
        number, self._next = self._next, self._next + 1
        self.runs[number] = run
        run.n_left = run.n_blocks()
        self.n_blocks += run.n_left
        self.n_unnamed += run.n_unnamed()
        self._by_parent[run.scope, run.parent][number] = None
        for place, name in enumerate(run.names):
            if name is not None:
                self._by_name[run.holder, name][number, place] = None
        while max(self.n_blocks, self.n_unnamed) > self.max_blocks:
            oldest = self.take(next(iter(self.runs)))
            self.dropped[oldest.holder] += oldest.n_blocks()

    def take(self, number: int) -> WaitingRun:
        """Take a run out."""
        run = self.runs.pop(number)
        self.n_blocks -= run.n_left
        self.n_unnamed -= run.n_unnamed()
        self._forget(self._by_parent, (run.scope, run.parent), number)
        for place, name in enumerate(run.names):
            if name is not None:
                self._forget(self._by_name, (run.holder, name), (number, place))
        return run

    def cancel(self, holder: int, name: EngineHash) -> bool:
        """Remove one copy of a block that waits, of the oldest run that has it."""
        found = self._by_name.get((holder, name))
        if not found:
            return False
        number, place = next(iter(found))
        run = self.runs[number]
        run.names[place] = None
        self._forget(self._by_name, (holder, name), (number, place))
        self.n_blocks -= 1
        run.n_left -= 1
        if not run.n_left:
            self.take(number)
        return True

    def children(self, scope: Scope, parent: EngineHash) -> list[int]:
        """Return the numbers of the runs that wait for a parent."""
        return list(self._by_parent.get((scope, parent), ()))

    def clear(self, holder: int) -> None:
        """Drop what waits for a holder, and its count of dropped blocks."""
        for number in [n for n, run in self.runs.items() if run.holder == holder]:
            self.take(number)
        self.dropped.pop(holder, None)

    @staticmethod
    def _forget(entries: defaultdict, key: tuple, entry: int | tuple[int, int]) -> None:
        del entries[key][entry]
        if not entries[key]:
            del entries[key]
