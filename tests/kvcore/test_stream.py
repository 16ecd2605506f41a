"""The sequence rules, one by one; ``test_stream_property`` mixes them."""

import json

import pytest

from kvcore.events import AllBlocksCleared, BlockRemoved, EventBatch
from kvcore.stream import Stream
from kvcore.stream_state import Clear, Position, StreamLimits

LIMITS = StreamLimits(max_attempts=3, retry_s=0.1, reply_timeout_s=1.0, probe_interval_s=5.0)


def message(seq, ts=None, events=()):
    ts = float(seq + 1) if ts is None else ts
    return seq, f"{seq} at {ts}".encode(), EventBatch(ts, list(events), None, [])


def replay(stream, messages, now=0.0):
    """Answer the question that is due with these messages; return it and the steps."""
    start = stream.ask(now)
    assert start is not None
    steps = [s for m in messages if m[0] >= start for s in stream.receive_replayed(*m, now)]
    return start, steps + stream.reply_ended(now)


def applied(steps):
    return [s if isinstance(s, str) else "clear" if isinstance(s, Clear) else s.ts for s in steps]


@pytest.fixture
def joined():
    """Return a stream that has applied batches 0 to 2."""
    stream = Stream(has_replay=True, limits=LIMITS)
    replay(stream, [message(0), message(1), message(2)])
    assert stream.problem is None
    return stream


def test_a_late_joiner_replays_the_history():
    """A subscriber that starts after the engine gets no events that were sent before."""
    stream = Stream(has_replay=True, limits=LIMITS)
    assert stream.receive(*message(3), 0.0) == []
    assert stream.problem is not None
    start, steps = replay(stream, [message(n) for n in range(4)])
    assert start == 0
    assert applied(steps) == [1.0, 2.0, 3.0, 4.0]
    assert stream.problem is None


def test_a_late_joiner_without_replay_says_that_history_is_missing():
    """Later events are used, but nobody is told that they are all there is."""
    stream = Stream(has_replay=False, limits=LIMITS)
    assert applied(stream.receive(*message(3), 0.0)) == [4.0]
    assert stream.problem == "batches 0 to 2 are lost"
    assert stream.counters.lost == 3


def test_duplicates_are_dropped_and_counted(joined):
    """A repeated message is not a second copy of its blocks."""
    assert joined.receive(*message(1), 0.0) == []
    assert joined.counters.duplicates == 1


def test_a_gap_is_repaired_in_order(joined):
    """What came behind the gap waits for what was in it."""
    assert joined.receive(*message(5), 10.0) == []
    assert joined.problem == "waiting for batch 3"
    start, steps = replay(joined, [message(n) for n in range(6)], 10.0)
    assert start == 2  # the last applied one comes again, as proof
    assert applied(steps) == [4.0, 5.0, 6.0]
    assert (joined.problem, joined.counters.gaps) == (None, 1)


def test_a_publisher_without_history_is_a_new_one(joined):
    """An engine that was away and came back idle is empty, and that is all there is to know."""
    joined.interrupted(0.0)
    for now in (0.0, 10.0, 20.0):
        assert joined.ask(now) == 2
        steps = joined.tick(now + 2.0)  # nobody answers
    assert applied(steps) == ["clear"]
    assert joined.problem == "the connection broke, and the replay socket does not answer"
    start, steps = replay(joined, [], 100.0)
    assert (start, applied(steps)) == (0, ["clear"])
    replay(joined, [], 100.0)
    assert joined.problem is None


def test_what_a_filled_hole_sets_free_comes_in_portions(joined):
    """Thousands of batches at once would stop every score meanwhile."""
    for seq in range(4, 104):
        assert joined.receive(*message(seq), 0.0) == []
    steps, last = joined.receive(*message(3), 0.0), 103
    while joined.has_ready:
        assert joined.problem is not None  # the index is not there yet
        assert joined.last_seq == 2 + len(steps)
        assert joined.ask(100.0) is None  # nothing is missing
        last += 1
        more = joined.receive(*message(last), 0.0) + joined.go_on()
        assert len(more) <= 2 * LIMITS.max_steps
        steps += more
    assert applied(steps) == [float(seq + 1) for seq in range(3, last + 1)]
    assert (joined.problem, joined.counters.gaps) == (None, 1)
    assert last > 104


def test_a_reply_with_holes_is_asked_again_from_the_first_one(joined):
    """Engines' replay sockets drop messages and still send the end marker."""
    joined.receive(*message(9), 10.0)
    _, steps = replay(joined, [message(n) for n in (2, 3, 4, 6, 7, 9)], 10.0)
    assert applied(steps) == [4.0, 5.0]
    start, steps = replay(joined, [message(n) for n in range(10)], 10.0)
    assert start == 4
    assert applied(steps) == [6.0, 7.0, 8.0, 9.0, 10.0]


def test_a_lost_tail_is_found_by_a_probe(joined):
    """Nothing arrives after the last message, so nothing shows that it is missing."""
    assert joined.ask(4.9) is None
    _, steps = replay(joined, [message(2), message(3)], 5.0)
    assert applied(steps) == [4.0]


def test_a_restarted_engine_is_known_by_its_clock(joined):
    """Its first batch has an old number and a new time."""
    steps = joined.receive(*message(0, ts=100.0), 10.0)
    assert applied(steps) == ["clear", 100.0]
    assert (joined.problem, joined.counters.restarts, joined.last_seq) == (None, 1, 0)


def test_a_restarted_engine_is_known_by_its_first_bytes(joined):
    """Clocks may be set back; the first batch is another one all the same."""
    steps = joined.receive(*message(0, ts=0.5), 10.0)
    assert applied(steps) == ["clear", 0.5]


def test_an_idle_restarted_engine_is_known_by_the_probe(joined):
    """A restarted engine that publishes nothing has a cold cache, and no last batch to show."""
    steps = []
    for attempt in range(LIMITS.max_attempts):
        _, steps = replay(joined, [], 5.0 + attempt)
    assert applied(steps) == ["clear"]
    replay(joined, [], 20.0)
    assert (joined.problem, joined.last_seq) == (None, None)


def test_a_restarted_engine_behind_a_gap_is_no_repair(joined):
    """The missing numbers are there, but they are another engine's."""
    joined.receive(*message(5, ts=105.0), 10.0)
    others = [message(n, ts=100.0 + n) for n in range(6)]
    start, steps = replay(joined, others, 10.0)
    assert (start, applied(steps)) == (2, ["clear"])
    start, steps = replay(joined, others, 10.0)
    assert (start, applied(steps)) == (0, [100.0, 101.0, 102.0, 103.0, 104.0, 105.0])


def test_a_broken_connection_must_prove_that_nothing_changed(joined):
    """Batch 3 after a break may be a restarted engine's fourth one."""
    joined.interrupted(10.0)
    assert joined.receive(*message(3, ts=103.0), 10.0) == []
    _, steps = replay(joined, [message(n, ts=100.0 + n) for n in range(4)], 10.0)
    assert applied(steps) == ["clear"]
    _, steps = replay(joined, [message(n, ts=100.0 + n) for n in range(4)], 10.0)
    assert applied(steps) == [100.0, 101.0, 102.0, 103.0]


def test_a_broken_connection_to_the_same_engine_costs_nothing(joined):
    """A network that flaps must not empty the index."""
    joined.interrupted(10.0)
    assert joined.problem is not None
    _, steps = replay(joined, [message(n) for n in range(5)], 10.0)
    assert (applied(steps), joined.problem) == ([4.0, 5.0], None)


def test_a_gap_older_than_the_buffer_costs_the_blocks(joined):
    """Removals may be among what is lost; what is left could be too much."""
    joined.receive(*message(9), 10.0)
    steps = []
    for attempt in range(LIMITS.max_attempts):
        _, steps = replay(joined, [message(n) for n in (7, 8, 9)], 20.0 + attempt)
    assert applied(steps) == ["clear", 8.0, 9.0, 10.0]
    assert joined.problem == "batches 3 to 6 are lost"
    assert joined.counters.lost == 4


def test_lost_history_is_forgiven_when_the_cache_is_cleared(joined):
    """An empty cache is known exactly."""
    test_a_gap_older_than_the_buffer_costs_the_blocks(joined)
    joined.receive(*message(10, events=[AllBlocksCleared()]), 30.0)
    assert joined.problem is None


def test_a_silent_replay_socket_does_not_hold_up_live_events_for_ever(joined):
    """After some attempts the stream goes on without what is missing, and says so."""
    joined.receive(*message(4), 10.0)
    now, steps = 10.0, []
    while not steps:
        joined.ask(now)
        now += 1.0
        steps = joined.tick(now)
    assert applied(steps) == ["clear", 5.0]
    assert joined.problem == "batches 3 to 3 are lost"
    assert joined.counters.replays_failed == LIMITS.max_attempts


def test_lost_history_is_rebuilt_when_the_whole_of_it_can_be_had(joined):
    """A replay socket that was down when it mattered may come back with everything."""
    test_a_silent_replay_socket_does_not_hold_up_live_events_for_ever(joined)
    start, steps = replay(joined, [message(n) for n in range(5)], 100.0)
    assert (start, applied(steps)) == (0, ["clear", 1.0, 2.0, 3.0, 4.0, 5.0])
    assert joined.problem is None


def test_without_replay_a_late_batch_has_some_grace():
    """Two messages that change places are no loss."""
    stream = Stream(has_replay=False, limits=LIMITS)
    stream.receive(*message(0), 0.0)
    assert stream.receive(*message(2), 0.0) == []
    assert applied(stream.receive(*message(1), 0.1)) == [2.0, 3.0]
    assert stream.problem is None


def test_two_publishers_of_one_name_are_told(joined):
    """Their numbers collide with other bytes."""
    steps = joined.receive(2, b"something else", message(2)[2], 10.0)
    assert applied(steps) == ["clear"]
    assert joined.problem == "two publishers use this name"


def test_what_cannot_be_held_is_shed_and_comes_again_by_replay():
    """A flood behind a hole takes bounded memory."""
    stream = Stream(has_replay=True, limits=StreamLimits(max_held_batches=10))
    for n in range(1, 100):
        stream.receive(*message(n), 0.0)
    assert stream.counters.shed == 89
    _, steps = replay(stream, [message(n) for n in range(100)])
    assert applied(steps) == [float(n + 1) for n in range(100)]


def test_without_replay_a_full_store_is_not_waited_for():
    """Under a flood, waiting for a late batch would shed all that comes meanwhile."""
    stream = Stream(has_replay=False, limits=StreamLimits(max_held_batches=10))
    stream.receive(*message(0), 0.0)
    steps = [s for n in range(2, 100) for s in stream.receive(*message(n), 0.0)]
    assert applied(steps) == ["clear", *(float(n + 1) for n in range(2, 100))]
    assert (stream.counters.shed, stream.counters.lost) == (0, 1)


def test_the_missing_batch_is_taken_even_when_the_store_is_full():
    """It is what everything held is waiting for."""
    stream = Stream(has_replay=True, limits=StreamLimits(max_held_batches=10))
    stream.receive(*message(0), 0.0)
    for n in range(2, 12):
        stream.receive(*message(n), 0.0)
    assert len(stream.receive(*message(1), 0.0)) == 11


def test_a_batch_that_its_own_publisher_holds_damaged_is_stepped_over(joined):
    """Asking for it again would never end."""
    joined.damaged(3, 10.0)
    start = joined.ask(10.0)
    assert start == 2
    joined.receive_replayed(*message(2), 10.0)
    assert applied(joined.receive_replayed(3, b"\xc1", None, 10.0)) == ["clear"]
    assert joined.problem == "batch 3 cannot be read"


def test_a_snapshot_goes_on_where_it_stood(joined):
    """After a restart of ours, only what happened meanwhile is replayed."""
    saved = Position(*json.loads(json.dumps(joined.position())))
    again = Stream(has_replay=True, limits=LIMITS)
    assert again.resume(saved)
    assert again.problem is not None
    start, steps = replay(again, [message(n) for n in range(5)])
    assert (start, applied(steps), again.problem) == (2, [4.0, 5.0], None)


def test_a_snapshot_of_a_stream_that_has_heard_nothing_is_plain_json():
    """It is stored by libraries that know no infinity, and read as if there were none."""
    text = json.dumps(Stream(has_replay=True).position(), allow_nan=False)
    again = Stream(has_replay=True, limits=LIMITS)
    assert not again.resume(Position(*json.loads(text)))
    start, steps = replay(again, [message(0)])
    assert (start, applied(steps), again.problem) == (0, [1.0], None)


def test_a_snapshot_of_a_publisher_that_can_prove_nothing_is_not_believed(joined):
    """Without a replay, a restarted engine that has come as far again would look the same."""
    again = Stream(has_replay=False, limits=LIMITS)
    assert not again.resume(joined.position())
    assert again.last_seq is None


def test_a_snapshot_of_an_engine_that_restarted_meanwhile_is_dropped(joined):
    """Its blocks are gone."""
    again = Stream(has_replay=True, limits=LIMITS)
    again.resume(joined.position())
    _, steps = replay(again, [message(n, ts=50.0 + n) for n in range(5)])
    assert applied(steps) == ["clear"]
    _, steps = replay(again, [message(n, ts=50.0 + n) for n in range(5)])
    assert applied(steps) == [50.0, 51.0, 52.0, 53.0, 54.0]


def test_events_ride_along_untouched(joined):
    """The stream orders batches, it does not read them."""
    removed = BlockRemoved([b"x"])
    (batch,) = joined.receive(*message(3, events=[removed]), 10.0)
    assert batch.events == [removed]


def test_a_reply_from_before_a_break_proves_nothing(joined):
    """It may have been under way when the engine died: its successor must vouch for itself."""
    assert joined.ask(5.0) == 2
    joined.interrupted(5.0)
    assert joined.receive_replayed(*message(2), 5.0) == []
    assert joined.receive(*message(3, ts=103.0), 5.0) == []
    _, steps = replay(joined, [message(n, ts=100.0 + n) for n in range(4)], 5.0)
    assert applied(steps) == ["clear"]


def test_a_batch_that_comes_live_and_by_replay_is_one(joined):
    """The reply lost its first message, so the second was held until the live one came."""
    joined.receive(*message(5), 5.0)
    joined.ask(5.0)
    assert joined.receive_replayed(*message(3), 5.0) == []
    assert applied(joined.receive(*message(3), 5.0)) == [4.0]
    joined.receive_replayed(*message(4), 5.0)
    assert applied(joined.receive(*message(4), 5.0)) == [5.0, 6.0]
    assert (joined.problem, joined.last_seq) == (None, 5)


def test_without_replay_a_batch_from_before_a_full_store_is_late():
    """Those behind it have just been applied: going back would undo them."""
    stream = Stream(has_replay=False, limits=StreamLimits(max_held_batches=2))
    for n in (0, 4, 5):
        stream.receive(*message(n), 0.0)
    assert applied(stream.receive(*message(2), 0.0)) == ["clear", 5.0, 6.0]
    assert (stream.last_seq, stream.counters.lost, stream.counters.duplicates) == (5, 3, 1)
    assert applied(stream.receive(*message(6), 0.0)) == [7.0]


def test_a_pod_is_not_exact_before_the_end_of_a_reply():
    """What the reply has still to bring is missing, whether a number shows it or not."""
    stream = Stream(has_replay=True, limits=LIMITS)
    stream.ask(0.0)
    stream.receive_replayed(*message(0), 0.0)
    assert stream.problem == "history is being replayed"
    stream.reply_ended(0.0)
    assert stream.problem is None
    stream.interrupted(1.0)
    stream.ask(1.0)
    stream.receive_replayed(*message(0), 1.0)
    assert stream.problem == "history is being replayed"
    stream.reply_ended(1.0)
    assert stream.problem is None


def test_a_batch_that_cannot_be_read_is_missing_until_it_is_replayed(joined):
    """Nothing may come after it that would show the hole, and the replay socket may be down."""
    joined.damaged(3, 10.0)
    assert joined.problem == "waiting for batch 3"
    replay(joined, [message(2), message(3)], 10.0)
    assert joined.problem is None
    joined.damaged(None, 20.0)
    assert joined.problem == "a message could not be read; the publisher is being verified"
    replay(joined, [message(3)], 20.0)
    assert joined.problem is None


def test_what_came_live_while_history_is_rebuilt_is_not_forgotten(joined):
    """The reply was written before it, so its end does not tell that all is there."""
    test_a_silent_replay_socket_does_not_hold_up_live_events_for_ever(joined)
    assert joined.ask(100.0) == 0
    joined.receive(*message(5), 100.0)
    steps = [s for n in range(5) for s in joined.receive_replayed(*message(n), 100.0)]
    joined.reply_ended(100.0)
    assert joined.problem == "waiting for batch 5"
    start, more = replay(joined, [message(n) for n in range(6)], 100.0)
    assert (start, applied(steps + more)[-2:], joined.problem) == (4, [5.0, 6.0], None)


def test_a_rebuild_is_tried_again_whatever_its_replies_lost(joined):
    """The whole history is still there; only the way to it loses messages."""
    test_a_silent_replay_socket_does_not_hold_up_live_events_for_ever(joined)
    now, history = 100.0, [message(n) for n in range(5)]
    for _ in range(5):
        start, _ = replay(joined, history[1:], now)
        assert (start, joined.problem) == (0, "batches 3 to 3 are lost")
        now += 1000.0
    replay(joined, history, now)
    assert joined.problem is None


def test_a_history_that_cannot_be_had_is_asked_for_ever_less_often(joined):
    """A whole buffer is much to send for nothing."""
    test_a_gap_older_than_the_buffer_costs_the_blocks(joined)
    asked = []
    for now in range(30, 4030):
        if (start := joined.ask(now)) is not None:
            asked += [now] if start == 0 else []
            joined.receive_replayed(*message(9), now)
            joined.reply_ended(now)
    assert len(asked) == 8


def test_a_break_before_the_first_batch_leaves_nothing_exact():
    """What was held is dropped, and with it the only sign that there is more."""
    stream = Stream(has_replay=True, limits=LIMITS)
    replay(stream, [])
    stream.receive(*message(1), 1.0)
    stream.interrupted(1.0)
    assert stream.problem is not None
    replay(stream, [message(0), message(1)], 1.0)
    assert (stream.problem, stream.last_seq) == (None, 1)


def test_without_replay_an_earlier_clear_does_not_forgive_a_later_loss():
    """A batch that was held may clear the cache, and what could not be read came after it."""
    stream = Stream(has_replay=False, limits=LIMITS)
    stream.receive(*message(0), 0.0)
    stream.receive(*message(2, events=[AllBlocksCleared()]), 0.0)
    stream.damaged(3, 0.0)
    stream.receive(*message(1), 0.0)
    assert (stream.last_seq, stream.problem) == (2, "waiting for batch 3")
    assert applied(stream.tick(1.0)) == ["clear"]
    assert stream.problem == "batches 3 to 3 are lost"
