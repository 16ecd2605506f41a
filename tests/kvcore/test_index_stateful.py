"""The index against a model of dictionaries, over any sequence of events."""

import tempfile
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvcore.hashing import hash_blocks
from kvcore.holders import Holder
from kvcore.index import BlockIndex
from kvcore.scorer import score
from tests import naive

ROOTS = (None, None, 7)
BLOCK_SIZES = (1, 1, 2)
MAX_WAITING = 6

holders = st.builds(
    Holder,
    st.sampled_from(["a", "a", "a", "b"]),
    st.sampled_from([0, 0, 0, 1]),
    st.sampled_from(["gpu", "gpu", "cpu"]),
    st.sampled_from([0, 0, 0, 1]),
)
# Few names and few tokens, so that blocks, names and parents meet in every way.
int_names = st.integers(0, 4)
bytes_names = st.sampled_from([b"", b"\0", b"x" * 31, b"x" * 32, b"y" + b"x" * 31])
names = st.one_of(int_names, int_names, bytes_names)
tokens = st.sampled_from([[0, 0, 0, 0], [0, 1, 0, 1], [1, 1, 1, 0]])


def _encode(some):
    """As engines send them: a list of bytes, or ints in an array or a list."""
    if all(isinstance(name, int) for name in some) and len(some) % 2:
        return np.array(some, dtype=np.uint64)
    return some


class IndexMachine(RuleBasedStateMachine):
    """Every answer, counter and invariant must agree after every step."""

    @initialize(window=st.sampled_from([None, 1, 2]))
    def begin(self, window):
        self.index = BlockIndex(capacity_bytes=1 << 20, max_waiting_blocks=MAX_WAITING)
        self.model = naive.Index(max_waiting_blocks=MAX_WAITING)
        self.ids = {}
        for pod in ("a", "b"):
            self.index.set_window(pod, 0, 1, window)
            self.model.windows[pod, 0, 1] = window

    def id_of(self, holder):
        self.model.holder(holder)
        self.ids[holder] = self.index.holder(*holder)
        return self.ids[holder]

    @rule(
        holder=holders,
        some=st.lists(names, min_size=1, max_size=3),
        parent=st.one_of(st.none(), st.none(), names),
        tokens=tokens,
        extra=st.integers(0, 1),
        root=st.sampled_from(ROOTS),
        block_size=st.sampled_from(BLOCK_SIZES),
        extras=st.sampled_from([None, None, {0: b"image"}]),
    )
    def store(self, *, holder, some, parent, tokens, extra, root, block_size, extras):
        """Names are arbitrary: they repeat, clash, and follow parents nobody has seen."""
        some = [n for n in some if isinstance(n, bytes) == isinstance(some[0], bytes)]
        tokens = (tokens * 2)[: block_size * (len(some) + extra)]
        self._store(holder, some, parent, tokens, block_size=block_size, root=root, extras=extras)

    @rule(holder=holders, tokens=tokens, n=st.integers(1, 4), root=st.sampled_from(ROOTS))
    def store_by_keys(self, holder, tokens, n, root):
        """Publishers of RFC keys name blocks by our own keys."""
        some = naive.hash_blocks(tokens[:n], 1, root)
        self._store(holder, some, None, tokens[:n], root=root)

    @rule(holder=holders, tokens=tokens, at=st.integers(1, 3), root=st.sampled_from(ROOTS))
    def store_after_key(self, holder, tokens, at, root):
        some = naive.hash_blocks(tokens, 1, root)
        self._store(holder, some[at:], some[at - 1], tokens[at:])

    def _store(self, holder, some, parent, tokens, *, block_size=1, root=None, extras=None):
        before = self.model.waiting_blocks()
        result = self.index.store(
            self.id_of(holder),
            _encode(some),
            parent,
            np.array(tokens, dtype=np.uint32),
            block_size=block_size,
            root=root,
            extras=extras,
        )
        self.model.store(
            holder, some, parent, tokens, block_size=block_size, root=root, extras=extras
        )
        assert result.stored + result.waiting == len(some)
        if not result.waiting:
            assert result.joined == before - self.model.waiting_blocks()

    @rule(holder=holders, some=st.lists(int_names, min_size=1, max_size=4))
    def store_known(self, holder, some):
        unknown = self.index.store_known(self.id_of(holder), _encode(some))
        assert unknown == self.model.store_known(holder, some)

    @rule(
        holder=holders,
        some=st.one_of(
            st.lists(int_names, min_size=1, max_size=4),
            st.lists(bytes_names, min_size=1, max_size=2),
        ),
    )
    def remove(self, holder, some):
        unknown = self.index.remove(self.id_of(holder), _encode(some))
        assert unknown == self.model.remove(holder, some)

    @rule(holder=holders, tokens=tokens, at=st.integers(0, 3), root=st.sampled_from(ROOTS))
    def remove_by_key(self, holder, tokens, at, root):
        some = naive.hash_blocks(tokens, 1, root)[at : at + 1]
        unknown = self.index.remove(self.id_of(holder), some)
        assert unknown == self.model.remove(holder, some)

    @rule(pod=st.sampled_from(["a", "b"]), rank=st.sampled_from([None, 0, 1]))
    def clear(self, pod, rank):
        assert self.index.clear_pod(pod, rank) == self.model.clear(pod, rank)

    @rule(pod=st.sampled_from(["a", "b"]))
    def drop(self, pod):
        assert self.index.drop_pod(pod) == self.model.drop(pod)
        self.ids = {h: i for h, i in self.ids.items() if h.pod != pod}

    @rule()
    def restart(self):
        """Restoring equals never having stopped."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "index"
            self.index.snapshot().write(path)
            self.index, _ = BlockIndex.restore(
                path, capacity_bytes=1 << 20, max_waiting_blocks=MAX_WAITING
            )

    @rule(tokens=tokens, root=st.sampled_from(ROOTS), block_size=st.sampled_from(BLOCK_SIZES))
    def ask(self, tokens, root, block_size):
        array = np.array(tokens, dtype=np.uint32)
        keys = hash_blocks(array, block_size=block_size, root=root)
        leading = {s: self.model.leading(s, keys.tolist()) for s in self.model.keys}
        names = self.index.scopes()
        found = {names[s]: n for s, n in self.index.match(keys).T.tolist()}
        assert found == {s: n for s, n in leading.items() if n}
        expected = {
            (pod, rank): hit
            for pod, rank, _ in self.model.keys
            if (hit := self.model.hit(pod, rank, keys.tolist()))
        }
        scores = score(self.index, keys, tier_weights={"gpu": 1.0, "cpu": 0.5})
        assert {(s.pod, s.rank): s.blocks for s in scores} == expected

    @invariant()
    def agrees(self):
        if not hasattr(self, "index"):
            return
        self.index.check()
        stats = {
            s.holder: (s.blocks, s.copies, s.waiting, s.dropped) for s in self.index.holder_stats()
        }
        assert stats == self.model.stats()
        keys = sorted({k for meant in self.model.keys.values() for k in meant.values()})
        seen = self.index.presence(np.array(keys, dtype=np.uint64), self.ids.values())
        for holder, row in zip(self.ids, seen, strict=True):
            held = self.model.held(holder)
            assert row.tolist() == [key in held for key in keys]


IndexMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestIndex = IndexMachine.TestCase
