"""The order of one publisher's batches: what to apply, what to ask again, what is lost.

A publisher numbers its batches from 0 and keeps the last few thousand for replay. A ``Stream``
sees what arrives, live or replayed, and hands back steps in an order in which every batch comes
once and none is missing. The rules:

- Only ``next_seq`` is ever applied; later batches are held, bounded, until the hole is filled.
- A replay is asked from the *last applied* batch, not from the one after it. Its bytes prove that
  the publisher is still the one we followed; a restarted engine has other bytes, or none.
- A hole that nobody can fill costs the publisher's blocks: lost removals would leave blocks that
  are gone. The stream goes on behind the hole, and says that history is lost until the engine
  clears its cache, restarts, or shows its whole history.
- What a filled hole sets free comes in portions, so that thousands of batches never stop the
  caller for long: `has_ready` tells of more, and `go_on` hands it over.

Pure: time is an argument (monotonic seconds); the caller owns sockets and the index.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from kvcore.events import AllBlocksCleared, EventBatch
from kvcore.stream_state import Mark, Position, StreamCounters, StreamLimits


class Clear(NamedTuple):
    """Drop the publisher's blocks before the next step."""

    reason: str


Step = Clear | EventBatch


@dataclass
class Stream:
    """The sequence state of one publisher.

    ``receive`` and ``receive_replayed`` return the steps to carry out now, in order. ``tick``
    returns steps too, after time alone decided something; ``ask`` says where to start a replay.
    """

    has_replay: bool
    limits: StreamLimits = field(default_factory=StreamLimits)
    counters: StreamCounters = field(default_factory=StreamCounters)
    next_seq: int = 0
    newest_ts: float = float("-inf")  # engine clock
    lost: str | None = None  # why some history will never be known
    heard_at: float | None = None  # any sign of life

    def __post_init__(self) -> None:
        self._first: Mark | None = None
        self._last_payload: bytes | None = None  # marked only when somebody compares
        self._last: Mark | None = None
        self._held: dict[int, tuple[bytes, EventBatch]] = {}
        self._held_bytes = 0
        self._seen_seq = -1  # highest number known to exist
        self._is_joined = False  # next_seq means something
        self._suspicion: str | None = None  # the publisher has to prove that nothing is missing
        self._replayed_to: int | None = None  # in a reply that has not ended
        self._is_rebuilding = False
        self._n_rebuilds = 0  # fruitless ones
        self._asked_from: int | None = None
        self._asked_at = 0.0
        self._is_anchored = False  # this reply began with the last applied batch
        self._progress = 0  # batches applied since the reply was asked for
        self._reply_first: int | None = None
        self._attempts = 0
        self._next_ask_at = 0.0
        self._next_rebuild_at = 0.0
        self._hole_since: float | None = None

    # -- what the caller reads

    @property
    def problem(self) -> str | None:
        """Why the stream is not exact now, or None."""
        if self.lost is not None:
            return self.lost
        if self._suspicion is not None:
            return f"{self._suspicion}; the publisher is being verified"
        if not self._is_joined and not self.has_replay:
            return "nothing received yet"
        if self._is_joined and (self.has_ready or self._has_hole()):
            is_filled = "batches behind a filled hole are being applied"
            return is_filled if self.has_ready else f"waiting for batch {self.next_seq}"
        if not self._is_joined or self._replayed_to == self.next_seq:
            return "history is being replayed"
        return None

    @property
    def has_ready(self) -> bool:
        """Whether held batches can be applied now: `go_on`."""
        return self.next_seq in self._held and self._is_joined and self._suspicion is None

    @property
    def last_seq(self) -> int | None:
        """Number of the last applied batch."""
        return self.next_seq - 1 if self.next_seq > 0 else None

    def position(self) -> Position:
        """Return what a later process needs to go on from here."""
        newest_ts = self.newest_ts if self.next_seq > 0 else None  # JSON has no infinity
        return Position(self.next_seq, newest_ts, self._first, self._last_mark(), self.lost)

    def resume(self, position: Position) -> bool:
        """Go on from a snapshot's position, once the publisher has proved to be the same.

        False: nothing could ever prove it, so its blocks of the snapshot are not to be believed.
        """
        if not self.has_replay or position.last is None or position.newest_ts is None:
            return False
        self.next_seq, self.newest_ts = position.next_seq, position.newest_ts
        self._first = Mark(*position.first) if position.first else None
        self._last = Mark(*position.last)
        self.lost = position.lost
        self._seen_seq = self.next_seq - 1
        self._is_joined, self._suspicion = True, "the process restarted"
        return True

    # -- what arrives

    def receive(self, seq: int, payload: bytes, batch: EventBatch, now: float) -> list[Step]:
        """Take one live message."""
        self.counters.received += 1
        self.heard_at = now
        is_next = seq == self.next_seq and self._is_joined and self._suspicion is None
        if is_next and not (self._held and self.has_ready):
            steps = self._apply(payload, batch)
            is_quiet = not self._held and self._hole_since is None
            return steps if is_quiet else steps + self._drain()
        if not self._is_joined:
            return self._join(seq, payload, batch, now)
        if seq < self.next_seq:
            return self._revisit(seq, payload, batch, now)
        self._seen_seq = max(self._seen_seq, seq)
        steps: list[Step] = []
        if self._is_full(payload) and not self.has_replay and not self.has_ready:
            steps = self._give_up(now)  # waiting longer would only lose more
            if seq < self.next_seq:
                return steps + self._revisit(seq, payload, batch, now)
        self._hold(seq, payload, batch)
        self._note_hole(now)
        if self._suspicion is not None:  # it waits until the publisher has proved itself
            self._next_ask_at = min(self._next_ask_at, now)
            return steps
        return steps + self._drain()

    def receive_replayed(
        self, seq: int, payload: bytes, batch: EventBatch | None, now: float
    ) -> list[Step]:
        """Take one message of a replay; ``batch`` is None where its payload is damaged."""
        self.counters.replayed += 1
        self.heard_at = self._asked_at = now
        if self._asked_from is None:
            return []  # a straggler of a reply that was given up
        if self._reply_first is None:
            self._reply_first = seq
        self._seen_seq = max(self._seen_seq, seq)
        steps: list[Step] = []
        if seq == 0 and self._is_rebuilding and batch is not None:
            steps = self._begin_again(payload, batch, now)
        elif seq == self.next_seq - 1 and self._last_mark() is not None:
            if self._last_mark() == Mark.of(payload):
                if self._suspicion is not None:
                    self._suspicion, self._replayed_to = None, self.next_seq
                self._is_anchored = True
                steps = self._drain()
            else:
                steps = self._restart("the publisher restarted", now)
        elif seq < self.next_seq:
            pass  # asked again from before a hole, or from 0
        elif batch is None:
            steps = self._step_over(seq)
        elif (
            seq == self.next_seq
            and seq not in self._held
            and (self._is_anchored or not self._is_joined)
        ):
            self._is_joined = self._is_anchored = True
            steps = [*self._apply(payload, batch), *self._pass(seq)]
        else:
            self._hold(seq, payload, batch)
        if any(isinstance(step, EventBatch) for step in steps):
            self._replayed_to = self.next_seq
        return steps

    def reply_ended(self, now: float) -> list[Step]:
        """Take the end marker of a replay."""
        if self._asked_from is None:
            return []
        self.heard_at = now
        self._asked_from = None
        if not self._is_joined:
            return self._end_join(now)
        if self._is_rebuilding and self._reply_first is None and self.next_seq > 0:
            return self._restart("the publisher has no history: it restarted", now)
        self._is_rebuilding = False
        if self._last_mark() is not None and not self._is_anchored:
            return self._end_unanchored(now)
        if not self._has_hole():
            self._settle(now)
            return []
        return self._end_fruitless(now)

    def damaged(self, seq: int | None, now: float) -> list[Step]:
        """Count a live message that could not be read: what it held must be asked for."""
        self.counters.damaged += 1
        self.heard_at = now
        self._next_ask_at = now
        if seq is not None and seq >= self.next_seq:
            self._seen_seq = max(self._seen_seq, seq)
            self._note_hole(now)
            return []
        if not self.has_replay:
            return self._lose("a message could not be read")
        self._suspect("a message could not be read")
        return []

    def interrupted(self, now: float) -> list[Step]:
        """Note that the connection broke: a restarted engine may hide behind the next number."""
        self._drop_held()  # if the publisher is still the same, it replays them
        self._asked_from = None  # what is left of this reply may be from before the break
        if not self._is_joined:
            self._next_ask_at = now
            return []
        if not self.has_replay:
            return self._lose("the connection broke, and there is no replay to ask what was missed")
        self._next_ask_at = now
        if self._last_mark() is None and self.next_seq > 0:
            return self._restart("the connection broke", now)  # no replay could vouch for it
        self._suspect("the connection broke")
        return []

    def go_on(self) -> list[Step]:
        """Return more of the held batches whose turn has come."""
        return self._drain() if self.has_ready else []

    # -- what time decides

    def ask(self, now: float) -> int | None:
        """Return the number to start a replay from, if one is due; it counts as asked."""
        if not self.has_replay or self._asked_from is not None or now < self._next_ask_at:
            return None
        if self.has_ready:
            return None  # the hole to ask for lies behind what is held
        # Where nothing proves the last batch (none yet, or it was stepped over), ask for the next.
        self._is_anchored = self._is_joined and self._last_mark() is None
        start = self.next_seq if self._is_anchored or not self._is_joined else self.next_seq - 1
        self._is_rebuilding = (
            self.lost is not None
            and not self._held
            and not self._has_hole()
            and now >= self._next_rebuild_at
        )
        if self._is_rebuilding:
            # Its history may no longer begin at 0: then this asks ever less often.
            start = 0
            interval_s = self.limits.rebuild_interval_s * 2 ** min(self._n_rebuilds, 6)
            self._next_rebuild_at = now + interval_s
            self._n_rebuilds += 1
        self._asked_from, self._asked_at = start, now
        self._progress = 0
        self._reply_first = None
        self.counters.replays_asked += 1
        return start

    def tick(self, now: float) -> list[Step]:
        """Let time pass: replies that do not come, holes that nobody fills."""
        if self._asked_from is not None:
            if now - self._asked_at < self.limits.reply_timeout_s:
                return []
            self._asked_from = None
            self.counters.replays_failed += 1
            return self._end_fruitless(now)
        if self.has_replay or self.has_ready or self._hole_since is None or not self._has_hole():
            return []
        is_late = now - self._hole_since >= self.limits.gap_grace_s
        return self._give_up(now) if is_late else []

    @property
    def is_asking(self) -> bool:
        """Whether a reply is awaited."""
        return self._asked_from is not None

    # -- inside

    def _last_mark(self) -> Mark | None:
        if self._last is None and self._last_payload is not None:
            self._last = Mark.of(self._last_payload)
        return self._last

    def _has_hole(self) -> bool:
        """Whether a batch that exists, and is not held, is missing."""
        return self._seen_seq - self.next_seq + 1 > len(self._held)

    def _note_hole(self, now: float) -> None:
        if self._hole_since is None and self._has_hole():
            self.counters.gaps += 1
            self._hole_since = now

    def _apply(self, payload: bytes, batch: EventBatch) -> list[Step]:
        if self.next_seq == 0:
            self._first = Mark.of(payload)
        self._seen_seq = max(self._seen_seq, self.next_seq)
        self.next_seq += 1
        self._last_payload, self._last = payload, None
        self.newest_ts = max(self.newest_ts, batch.ts)
        self.counters.applied += 1
        self._progress += 1
        if self.lost is not None and any(isinstance(e, AllBlocksCleared) for e in batch.events):
            self.lost = None  # whatever was missing is gone now
        return [batch]

    def _hold(self, seq: int, payload: bytes, batch: EventBatch) -> None:
        if seq in self._held:
            self.counters.duplicates += 1
        elif self._is_full(payload):
            self.counters.shed += 1
        else:
            self._held[seq] = (payload, batch)
            self._held_bytes += len(payload)

    def _pass(self, seq: int) -> list[Step]:
        """Go on behind a batch that is settled; another copy of it may be held."""
        if seq in self._held:
            self._held_bytes -= len(self._held.pop(seq)[0])
            self.counters.duplicates += 1
        return self._drain()

    def _is_full(self, payload: bytes) -> bool:
        return (
            len(self._held) >= self.limits.max_held_batches
            or self._held_bytes + len(payload) > self.limits.max_held_bytes
        )

    def _drain(self) -> list[Step]:
        steps: list[Step] = []
        while self.next_seq in self._held and len(steps) < self.limits.max_steps:
            payload, batch = self._held.pop(self.next_seq)
            self._held_bytes -= len(payload)
            steps += self._apply(payload, batch)
        if not self._has_hole():
            self._hole_since = None
        return steps

    def _drop_held(self) -> None:
        self.counters.shed += len(self._held)
        self._held.clear()
        self._held_bytes = 0
        self._seen_seq = self.next_seq - 1
        self._hole_since = None

    def _join(self, seq: int, payload: bytes, batch: EventBatch, now: float) -> list[Step]:
        if seq == 0:  # nothing came before it
            self._is_joined = True
            self._seen_seq = max(self._seen_seq, 0)
            return [*self._apply(payload, batch), *self._drain()]
        self._seen_seq = max(self._seen_seq, seq)
        self._hold(seq, payload, batch)
        if self.has_replay:
            return []
        return self._give_up(now)

    def _revisit(self, seq: int, payload: bytes, batch: EventBatch, now: float) -> list[Step]:
        """Tell a duplicate from a restarted engine by its clock and its bytes."""
        is_other_first = seq == 0 and self._first is not None and self._first != Mark.of(payload)
        if batch.ts > self.newest_ts or is_other_first:
            steps = self._restart("the engine restarted", now)
            self._is_joined = True
            self._seen_seq = seq
            if seq > 0:
                self._hole_since = now
                self.counters.gaps += 1
            self._hold(seq, payload, batch)
            return steps + self._drain()
        if seq == self.next_seq - 1 and self._last_mark() != Mark.of(payload):
            self.counters.conflicts += 1
            return self._lose("two publishers use this name")
        self.counters.duplicates += 1
        return []

    def _restart(self, reason: str, now: float) -> list[Step]:
        self.counters.restarts += 1
        self.next_seq = 0
        self._drop_held()
        self.newest_ts = float("-inf")
        self._first = self._last = self._last_payload = None
        self._is_joined = self._is_rebuilding = False
        self._suspicion = self._replayed_to = None
        self._n_rebuilds = 0
        self.lost = None
        self._asked_from = None  # the rest of this reply is for a position that is no more
        self._attempts, self._next_ask_at = 0, now
        return [Clear(reason)]

    def _begin_again(self, payload: bytes, batch: EventBatch, now: float) -> list[Step]:
        """Rebuild from the first batch on: the whole history is there after all."""
        asked_from, n_restarts, n_rebuilds = (
            self._asked_from, self.counters.restarts, self._n_rebuilds
        )  # fmt: skip
        # What came live since the question may be newer than its reply.
        seen_seq = self._seen_seq if self._progress or self._held else 0
        steps = self._restart("history is being rebuilt", now)
        self.counters.restarts, self._n_rebuilds = n_restarts, n_rebuilds
        self._asked_from, self._seen_seq = asked_from, seen_seq
        self._is_joined = self._is_anchored = True
        return [*steps, *self._apply(payload, batch)]

    def _end_join(self, now: float) -> list[Step]:
        if self._reply_first is None and not self._held:
            self._is_joined = True  # an engine that has published nothing yet
            self._settle(now)
            return []
        self._attempts += 1
        if self._attempts < 2:  # the reply itself can lose messages
            self._next_ask_at = now
            return []
        return self._give_up(now)

    def _end_unanchored(self, now: float) -> list[Step]:
        self._attempts += 1
        if self._attempts < self.limits.max_attempts:
            self._next_ask_at = now + (0.0 if self._progress else self.limits.retry_s)
            return []
        if self._reply_first is None:
            return self._restart("the publisher no longer knows its last batch", now)
        if self.next_seq in self._held and self._suspicion is None:
            # Its buffer begins right behind our position, and the connection never broke.
            steps = self._drain()
            self._settle(now)
            return steps
        return self._give_up(now)

    def _end_fruitless(self, now: float) -> list[Step]:
        if self._progress:
            self._attempts = 0
            self._next_ask_at = now
            return []
        is_needed = self._suspicion is not None or (self._has_hole() and not self.has_ready)
        if is_needed and self._attempts + 1 >= self.limits.max_attempts:
            return self._give_up(now)
        self._back_off(now)
        return []

    def _back_off(self, now: float) -> None:
        self._attempts += 1
        wait_s = self.limits.retry_s * 2 ** min(self._attempts, 8)
        self._next_ask_at = now + min(wait_s, self.limits.probe_interval_s)

    def _settle(self, now: float) -> None:
        self._attempts, self._replayed_to = 0, None
        if self.lost is None:
            self._n_rebuilds = 0
        self._next_ask_at = now + self.limits.probe_interval_s

    def _step_over(self, seq: int) -> list[Step]:
        """A batch that is damaged in the publisher's own buffer will never be readable."""
        self.counters.damaged += 1
        if seq != self.next_seq:
            return []
        self.next_seq, self._last, self._last_payload = seq + 1, None, None
        self.counters.lost += 1
        self.lost = f"batch {seq} cannot be read"
        return [Clear(self.lost), *self._pass(seq)]

    def _give_up(self, now: float) -> list[Step]:
        """Go on behind the hole without what was in it."""
        target = min(self._held) if self._held else self._seen_seq + 1
        missing = target - self.next_seq
        self.lost = (
            f"batches {self.next_seq} to {target - 1} are lost"
            if missing
            else f"{self._suspicion}, and the replay socket does not answer"
        )
        had_any = self.next_seq > 0
        self.counters.lost += missing
        self.next_seq = target
        self._is_joined, self._suspicion = True, None
        self._settle(now)
        self._next_rebuild_at = now + self.limits.rebuild_interval_s
        self._last = self._last_payload = None
        steps: list[Step] = [Clear(self.lost)] if had_any else []
        steps += self._drain()
        if self._has_hole():  # the next one
            self._hole_since = self._next_ask_at = now
        return steps

    def _suspect(self, reason: str) -> None:
        """Believe nothing newer until a reply has begun with the last applied batch."""
        if self.next_seq == 0:
            self._is_joined = False  # or with the first one
        elif self._last_mark() is not None:
            self._suspicion = reason

    def _lose(self, reason: str) -> list[Step]:
        self.lost = reason
        return [Clear(reason)]
