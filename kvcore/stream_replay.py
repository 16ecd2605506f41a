"""The question to a publisher's replay socket: when it is due, and what has come of its reply.

One question is asked at a time. One that was of use is followed by a probe some time later, since
a lost tail shows only when asked for. A fruitless one is repeated with growing pauses, and so is
the question for the whole history, which the publisher may no longer have.
"""

from kvcore.stream_state import StreamCounters, StreamLimits


class Replay:
    """The last question, and the schedule of the next; the stream judges what a reply proves."""

    def __init__(self, limits: StreamLimits, counters: StreamCounters) -> None:
        self._limits, self._counters = limits, counters
        self.is_asked = False  # and the reply has not ended
        self.is_empty = True  # no message of the reply has come
        self.is_anchored = False  # the reply began with the last applied batch
        self.is_rebuilding = False  # the whole history was asked for
        self.replayed_to: int | None = None  # in a reply that has not ended
        self.awaited_since = 0.0  # the question, or the last message of its reply
        self._applied_before = 0
        self.due_at = 0.0
        self.attempts = 0  # fruitless ones in a row
        self.rebuild_due_at = 0.0
        self._n_rebuilds = 0  # fruitless ones

    def is_due(self, now: float) -> bool:
        """Whether to ask now."""
        return not self.is_asked and now >= self.due_at

    def has_progress(self) -> bool:
        """Whether batches, replayed or live, were applied since the question."""
        return self._counters.applied > self._applied_before

    def ask(self, now: float, *, is_anchored: bool, is_rebuilding: bool) -> None:
        """Note that the question goes out now."""
        self._counters.replays_asked += 1
        self._applied_before = self._counters.applied
        self.is_asked = self.is_empty = True
        self.is_anchored, self.is_rebuilding = is_anchored, is_rebuilding
        self.awaited_since = now
        if is_rebuilding:
            # Its history may no longer begin at 0: then this asks ever less often.
            interval_s = self._limits.rebuild_interval_s * 2 ** min(self._n_rebuilds, 6)
            self.rebuild_due_at = now + interval_s
            self._n_rebuilds += 1

    def times_out(self, now: float) -> bool:
        """Give up a reply in which the publisher has been silent for too long; tell whether."""
        if not self.is_asked or now - self.awaited_since < self._limits.reply_timeout_s:
            return False
        self.is_asked = False
        self._counters.replays_failed += 1
        return True

    def tries_again(self, due_at: float, *, max_attempts: int) -> bool:
        """Count a fruitless attempt; ask again at ``due_at`` unless there were enough."""
        self.attempts += 1
        if self.attempts >= max_attempts:
            return False
        self.due_at = due_at
        return True

    def back_off(self, now: float) -> None:
        """Ask again after a pause that doubles, up to the probe interval."""
        self.attempts += 1
        wait_s = self._limits.retry_s * 2 ** min(self.attempts, 8)
        self.due_at = now + min(wait_s, self._limits.probe_interval_s)

    def settle(self, now: float, *, is_lost: bool) -> None:
        """Leave nothing to ask for but a probe, and the whole history where some ``is_lost``."""
        self.attempts, self.replayed_to = 0, None
        if not is_lost:
            self._n_rebuilds = 0
        self.due_at = now + self._limits.probe_interval_s

    def start_over(self, now: float) -> None:
        """Ask anew, for the position of before is no more; a reply that is on its way goes on."""
        self.is_rebuilding, self.replayed_to = False, None
        self.attempts, self.due_at = 0, now

    def restart(self, now: float) -> None:
        """Ask a new engine: a reply that is on its way is the old one's."""
        self.start_over(now)
        self.is_asked, self._n_rebuilds = False, 0
