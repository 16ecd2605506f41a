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

from kvcore.events import AllBlocksCleared, EventBatch
from kvcore.stream_hole import Hole
from kvcore.stream_replay import Replay
from kvcore.stream_state import Clear, Mark, Position, Step, StreamCounters, StreamLimits


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
        self._is_joined = False  # next_seq means something
        self._suspicion: str | None = None  # the publisher has to prove that nothing is missing
        self._hole = Hole(self.limits, self.counters)
        self._replay = Replay(self.limits, self.counters)

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
        if self._is_joined and (self.has_ready or self._hole.is_open(self.next_seq)):
            is_filled = "batches behind a filled hole are being applied"
            return is_filled if self.has_ready else f"waiting for batch {self.next_seq}"
        if not self._is_joined or self._replay.replayed_to == self.next_seq:
            return "history is being replayed"
        return None

    @property
    def has_ready(self) -> bool:
        """Whether held batches can be applied now: `go_on`."""
        return self.next_seq in self._hole.held and self._is_joined and self._suspicion is None

    @property
    def is_asking(self) -> bool:
        """Whether a reply is awaited."""
        return self._replay.is_asked

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
        self._hole.seen_seq = self.next_seq - 1
        self._is_joined, self._suspicion = True, "the process restarted"
        return True

    # -- what arrives

    def receive(self, seq: int, payload: bytes, batch: EventBatch, now: float) -> list[Step]:
        """Take one live message."""
        self.counters.received += 1
        self.heard_at = now
        is_next = seq == self.next_seq and self._is_joined and self._suspicion is None
        hole = self._hole
        if is_next and not (hole.held and self.has_ready):
            steps = self._apply(payload, batch)
            is_quiet = not hole.held and hole.since is None
            return steps if is_quiet else steps + self._drain()
        if not self._is_joined:
            return self._join(seq, payload, batch, now)
        if seq < self.next_seq:
            return self._revisit(seq, payload, batch, now)
        hole.see(seq)
        steps: list[Step] = []
        if not hole.has_room(payload) and not self.has_replay and not self.has_ready:
            steps = self._give_up(now)  # waiting longer would only lose more
            if seq < self.next_seq:
                return steps + self._revisit(seq, payload, batch, now)
        hole.hold(seq, payload, batch)
        hole.note(self.next_seq, now)
        if self._suspicion is not None:  # it waits until the publisher has proved itself
            self._replay.due_at = min(self._replay.due_at, now)
            return steps
        return steps + self._drain()

    def receive_replayed(
        self, seq: int, payload: bytes, batch: EventBatch | None, now: float
    ) -> list[Step]:
        """Take one message of a replay; ``batch`` is None where its payload is damaged."""
        self.counters.replayed += 1
        replay = self._replay
        self.heard_at = replay.awaited_since = now
        if not replay.is_asked:
            return []  # a straggler of a reply that was given up
        replay.is_empty = False
        self._hole.see(seq)
        is_next = seq == self.next_seq and seq not in self._hole.held
        steps: list[Step] = []
        if seq == 0 and replay.is_rebuilding and batch is not None:
            steps = self._begin_again(payload, batch, now)
        elif seq == self.next_seq - 1 and self._last_mark() is not None:
            if self._last_mark() == Mark.of(payload):
                if self._suspicion is not None:
                    self._suspicion, replay.replayed_to = None, self.next_seq
                replay.is_anchored = True
                steps = self._drain()
            else:
                steps = self._restart("the publisher restarted", now)
        elif seq < self.next_seq:
            pass  # asked again from before a hole, or from 0
        elif batch is None:
            steps = self._step_over(seq)
        elif is_next and (replay.is_anchored or not self._is_joined):
            self._is_joined = replay.is_anchored = True
            steps = [*self._apply(payload, batch), *self._drain()]
        else:
            self._hole.hold(seq, payload, batch)
        if any(isinstance(step, EventBatch) for step in steps):
            replay.replayed_to = self.next_seq
        return steps

    def reply_ended(self, now: float) -> list[Step]:
        """Take the end marker of a replay."""
        replay = self._replay
        if not replay.is_asked:
            return []
        self.heard_at = now
        replay.is_asked = False
        if not self._is_joined:
            return self._end_join(now)
        if replay.is_rebuilding and replay.is_empty and self.next_seq > 0:
            return self._restart("the publisher has no history: it restarted", now)
        replay.is_rebuilding = False
        if self._last_mark() is not None and not replay.is_anchored:
            return self._end_unanchored(now)
        if self._hole.is_open(self.next_seq):
            return self._end_fruitless(now)
        replay.settle(now, is_lost=self.lost is not None)
        return []

    def damaged(self, seq: int | None, now: float) -> list[Step]:
        """Count a live message that could not be read: what it held must be asked for."""
        self.counters.damaged += 1
        self.heard_at = now
        self._replay.due_at = now
        if seq is not None and seq >= self.next_seq:
            self._hole.see(seq)
            self._hole.note(self.next_seq, now)
            return []
        if not self.has_replay:
            return self._lose("a message could not be read")
        self._suspect("a message could not be read")
        return []

    def interrupted(self, now: float) -> list[Step]:
        """Note that the connection broke: a restarted engine may hide behind the next number."""
        self._hole.forget(self.next_seq)  # if the publisher is still the same, it replays them
        self._replay.is_asked = False  # what is left of this reply may be from before the break
        self._replay.due_at = now
        if not self._is_joined:
            return []
        if not self.has_replay:
            return self._lose("the connection broke, and there is no replay to ask what was missed")
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
        replay = self._replay
        if not self.has_replay or not replay.is_due(now) or self.has_ready:
            return None  # where more can be applied, the hole to ask for lies behind it
        is_caught_up = not self._hole.held and not self._hole.is_open(self.next_seq)
        is_rebuilding = self.lost is not None and is_caught_up and now >= replay.rebuild_due_at
        # Where nothing proves the last batch (none yet, or it was stepped over), ask for the next.
        is_anchored = self._is_joined and self._last_mark() is None
        replay.ask(now, is_anchored=is_anchored, is_rebuilding=is_rebuilding)
        if is_rebuilding:
            return 0
        return self.next_seq if is_anchored or not self._is_joined else self.next_seq - 1

    def tick(self, now: float) -> list[Step]:
        """Let time pass: replies that do not come, holes that nobody fills."""
        if self._replay.times_out(now):
            return self._end_fruitless(now)
        is_late = self._hole.is_late(self.next_seq, now)
        return self._give_up(now) if is_late and not self.has_replay and not self.has_ready else []

    # -- inside

    def _last_mark(self) -> Mark | None:
        if self._last is None and self._last_payload is not None:
            self._last = Mark.of(self._last_payload)
        return self._last

    def _apply(self, payload: bytes, batch: EventBatch) -> list[Step]:
        if self.next_seq == 0:
            self._first = Mark.of(payload)
        hole = self._hole
        hole.seen_seq = max(hole.seen_seq, self.next_seq)  # `see` costs a call for each batch
        self.next_seq += 1
        self._last_payload, self._last = payload, None
        self.newest_ts = max(self.newest_ts, batch.ts)
        self.counters.applied += 1
        if self.lost is not None and any(isinstance(e, AllBlocksCleared) for e in batch.events):
            self.lost = None  # whatever was missing is gone now
        return [batch]

    def _drain(self) -> list[Step]:
        steps: list[Step] = []
        hole = self._hole
        while self.next_seq in hole.held and len(steps) < self.limits.max_steps:
            steps += self._apply(*hole.take(self.next_seq))
        if not hole.is_open(self.next_seq):
            hole.since = None
        return steps

    def _join(self, seq: int, payload: bytes, batch: EventBatch, now: float) -> list[Step]:
        if seq == 0:  # nothing came before it
            self._is_joined = True
            return [*self._apply(payload, batch), *self._drain()]
        self._hole.see(seq)
        self._hole.hold(seq, payload, batch)
        return [] if self.has_replay else self._give_up(now)

    def _revisit(self, seq: int, payload: bytes, batch: EventBatch, now: float) -> list[Step]:
        """Tell a duplicate from a restarted engine by its clock and its bytes."""
        is_other_first = seq == 0 and self._first is not None and self._first != Mark.of(payload)
        if batch.ts > self.newest_ts or is_other_first:
            steps = self._restart("the engine restarted", now)
            self._is_joined = True
            self._hole.see(seq)
            if seq > 0:
                self._hole.note(self.next_seq, now)
            self._hole.hold(seq, payload, batch)
            return steps + self._drain()
        if seq == self.next_seq - 1 and self._last_mark() != Mark.of(payload):
            self.counters.conflicts += 1
            return self._lose("two publishers use this name")
        self.counters.duplicates += 1
        return []

    def _restart(self, reason: str, now: float) -> list[Step]:
        self.counters.restarts += 1
        self._replay.restart(now)
        return self._forget(reason)

    def _begin_again(self, payload: bytes, batch: EventBatch, now: float) -> list[Step]:
        """Rebuild from the first batch on: the whole history is there after all."""
        # What came live since the question may be newer than its reply.
        is_behind = self._replay.has_progress() or self._hole.held
        seen_seq = self._hole.seen_seq if is_behind else 0
        self._replay.start_over(now)
        steps = self._forget("history is being rebuilt")
        self._hole.see(seen_seq)
        self._is_joined = self._replay.is_anchored = True
        return [*steps, *self._apply(payload, batch)]

    def _forget(self, reason: str) -> list[Step]:
        """Stand before the first batch, and know nothing of any."""
        self.next_seq, self.newest_ts = 0, float("-inf")
        self._hole.forget(self.next_seq)
        self._first = self._last = self._last_payload = None
        self._is_joined, self._suspicion, self.lost = False, None, None
        return [Clear(reason)]

    def _end_join(self, now: float) -> list[Step]:
        if self._replay.is_empty and not self._hole.held:
            self._is_joined = True  # an engine that has published nothing yet
            self._replay.settle(now, is_lost=self.lost is not None)
            return []
        # Once more, for the reply itself can lose messages.
        return [] if self._replay.tries_again(now, max_attempts=2) else self._give_up(now)

    def _end_unanchored(self, now: float) -> list[Step]:
        replay = self._replay
        pause_s = 0.0 if replay.has_progress() else self.limits.retry_s
        if replay.tries_again(now + pause_s, max_attempts=self.limits.max_attempts):
            return []
        if replay.is_empty:
            return self._restart("the publisher no longer knows its last batch", now)
        if self.next_seq in self._hole.held and self._suspicion is None:
            # Its buffer begins right behind our position, and the connection never broke.
            steps = self._drain()
            replay.settle(now, is_lost=self.lost is not None)
            return steps
        return self._give_up(now)

    def _end_fruitless(self, now: float) -> list[Step]:
        replay = self._replay
        if replay.has_progress():
            replay.attempts, replay.due_at = 0, now
            return []
        is_open = self._hole.is_open(self.next_seq) and not self.has_ready
        is_needed = self._suspicion is not None or is_open
        if is_needed and replay.attempts + 1 >= self.limits.max_attempts:
            return self._give_up(now)
        replay.back_off(now)
        return []

    def _step_over(self, seq: int) -> list[Step]:
        """A batch that is damaged in the publisher's own buffer will never be readable."""
        self.counters.damaged += 1
        if seq != self.next_seq:
            return []
        self.next_seq, self._last, self._last_payload = seq + 1, None, None
        self.counters.lost += 1
        self.lost = f"batch {seq} cannot be read"
        if seq in self._hole.held:  # a copy that came live, and is too late
            self._hole.take(seq)
            self.counters.duplicates += 1
        return [Clear(self.lost), *self._drain()]

    def _give_up(self, now: float) -> list[Step]:
        """Go on behind the hole without what was in it."""
        hole, replay = self._hole, self._replay
        target = min(hole.held) if hole.held else hole.seen_seq + 1
        missing = target - self.next_seq
        if missing:
            self.lost = f"batches {self.next_seq} to {target - 1} are lost"
        else:
            self.lost = f"{self._suspicion}, and the replay socket does not answer"
        had_any = self.next_seq > 0
        self.counters.lost += missing
        self.next_seq = target
        self._is_joined, self._suspicion = True, None
        replay.settle(now, is_lost=True)
        replay.rebuild_due_at = now + self.limits.rebuild_interval_s
        self._last = self._last_payload = None
        steps: list[Step] = [Clear(self.lost)] if had_any else []
        steps += self._drain()
        if hole.is_open(self.next_seq):  # the next one
            hole.since = replay.due_at = now
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
