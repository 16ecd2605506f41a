"""What is missing before the newest known batch, and the batches held until it comes.

What is held is bounded by number and by bytes, for a flood behind a hole must not fill the memory.
What finds no room is shed and counted; where there is a replay, it comes again with that.
"""

from kvcore.events import EventBatch
from kvcore.stream_state import StreamCounters, StreamLimits


class Hole:
    """The missing batches from the stream's ``next_seq`` on, in one hole or several."""

    def __init__(self, limits: StreamLimits, counters: StreamCounters) -> None:
        self._limits, self._counters = limits, counters
        self.held: dict[int, tuple[bytes, EventBatch]] = {}  # by number; changed here alone
        self.seen_seq = -1  # highest number known to exist
        self.since: float | None = None
        self._held_bytes = 0

    def is_open(self, next_seq: int) -> bool:
        """Whether a batch that exists, and is not held, is missing."""
        return self.seen_seq - next_seq + 1 > len(self.held)

    def see(self, seq: int) -> None:
        """Note that a batch of this number exists."""
        self.seen_seq = max(self.seen_seq, seq)

    def note(self, next_seq: int, now: float) -> None:
        """Count the hole when it opens."""
        if self.since is None and self.is_open(next_seq):
            self._counters.gaps += 1
            self.since = now

    def is_late(self, next_seq: int, now: float) -> bool:
        """Whether what is missing has had its time to come late."""
        if self.since is None or not self.is_open(next_seq):
            return False
        return now - self.since >= self._limits.gap_grace_s

    def has_room(self, payload: bytes) -> bool:
        """Whether one more batch may be held."""
        return (
            len(self.held) < self._limits.max_held_batches
            and self._held_bytes + len(payload) <= self._limits.max_held_bytes
        )

    def hold(self, seq: int, payload: bytes, batch: EventBatch) -> None:
        """Keep a batch for its turn, or count why not."""
        if seq in self.held:
            self._counters.duplicates += 1
        elif self.has_room(payload):
            self.held[seq] = (payload, batch)
            self._held_bytes += len(payload)
        else:
            self._counters.shed += 1

    def take(self, seq: int) -> tuple[bytes, EventBatch]:
        """Take a held batch out."""
        payload, batch = self.held.pop(seq)
        self._held_bytes -= len(payload)
        return payload, batch

    def forget(self, next_seq: int) -> None:
        """Drop what is held, and what is known of anything from ``next_seq`` on."""
        self._counters.shed += len(self.held)
        self.held.clear()
        self._held_bytes = 0
        self.seen_seq = next_seq - 1
        self.since = None
