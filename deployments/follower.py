"""One publisher followed: its sequence, its feed into the index, its replay socket."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, NamedTuple

import zmq

from deployments.settings import CurveSettings, EventsSettings
from deployments.sockets import close_socket, open_socket, watch
from kvcore.errors import EventDecodeError
from kvcore.events import EventBatch
from kvcore.feed import Feed, ModelRoot
from kvcore.index import BlockIndex
from kvcore.stream import Stream
from kvcore.stream_state import Clear, PodState, Position, Step, StreamLimits

log = logging.getLogger(__name__)

_END = b"\xff" * 8
MAX_RANK = 1024


class PodStatus(NamedTuple):
    """What is known about one data-parallel rank of a pod, and how well."""

    pod: str
    rank: int
    state: PodState
    reason: str | None  # None when EXACT
    since: float  # seconds since the epoch, when the state began
    last_seq: int | None
    lag_s: float | None  # engine clock to application, of the last batch; None before any
    blocks: int
    counters: dict[str, int]


class Follower:
    """Follow one publisher, which is one data-parallel rank of a pod."""

    def __init__(
        self,
        settings: EventsSettings,
        index: BlockIndex,
        pod: str,
        rank: int,
        *,
        names_itself: bool,
        replay: str | None,
        model: str | None,
        curve: CurveSettings | None,
        model_root: ModelRoot,
        decode: Callable[[bytes], EventBatch],
        context: zmq.Context,
        loop: asyncio.AbstractEventLoop,
        wake: Callable[[Any], None],
        changed: Callable[[], None],
        wall_clock: Callable[[], float],
    ) -> None:
        self.pod, self.rank = pod, rank
        self.lag_s: float | None = None
        limits = StreamLimits(
            max_held_batches=settings.max_held_batches,
            reply_timeout_s=settings.reply_timeout_s,
            max_attempts=settings.max_replay_attempts,
            gap_grace_s=settings.gap_grace_s,
            probe_interval_s=settings.probe_interval_s,
            rebuild_interval_s=settings.rebuild_interval_s,
        )
        self.stream = Stream(has_replay=replay is not None, limits=limits)
        self._settings, self._index, self._model_root = settings, index, model_root
        self._decode = decode
        self._is_model_open, self._is_model_learned = model is None, False
        self._model = model or settings.default_model
        self._replay_endpoint, self._curve = replay, curve
        self._context, self._loop, self._wake = context, loop, wake
        self._wall_clock, self._changed = wall_clock, changed
        self._shown: tuple[str | None, ...] = ()  # the reasons when somebody was last told
        self._names_itself = self._may_name_itself = names_itself  # its rank: with its first batch
        self._feed = self._make_feed(rank)
        self._socket: zmq.Socket | None = None
        self._is_reply_open = False
        self._accusation: str | None = None
        self._state: PodState | None = None
        self._since = 0.0
        if replay is not None:
            self._open_socket()  # a malformed endpoint shows here, not at the first loss

    def _make_feed(self, rank: int) -> Feed:
        return Feed(
            self._index,
            self.pod,
            rank,
            model=self._model,
            block_size=self._settings.block_size,
            model_root=self._model_root,
        )

    def learn_model(self, model: str | None) -> None:
        """Take the topic's model where the settings leave it open."""
        if self._is_model_open and model is not None:
            self._is_model_open, self._is_model_learned = False, True
            self._model = self._feed.model = model

    def accuse(self, reason: str) -> None:
        """Note something that only a misconfigured or hostile pod does."""
        self._accusation = reason
        self._changed()

    def position(self) -> dict[str, Any]:
        """Return where the publisher stands, for the note of a snapshot: JSON-serialisable."""
        return {
            "stream": self.stream.position(),
            "model": self._model,
            "is_model_learned": self._is_model_learned,
            "doubts": [[self.rank, self._feed.doubt]],  # the rank as the batches say
        }

    def resume(self, position: dict[str, Any]) -> None:
        """Go on from a `position`; what cannot be verified later is dropped from the index."""
        if position["is_model_learned"]:
            self.learn_model(position["model"])
        is_kept = position["model"] == self._model and self.stream.resume(
            Position(*position["stream"])
        )
        for rank, doubt in position["doubts"]:
            if is_kept:
                self._be_rank(rank)
                self._feed.doubt, self._may_name_itself = doubt, False
            else:
                self._index.clear_pod(self.pod, rank)

    # -- messages

    def take(
        self,
        seq: int,
        payload: bytes,
        batch: EventBatch,
        now: float,
    ) -> None:
        """Take a live message."""
        self._carry_out(self.stream.receive(seq, payload, batch, now))

    def note_damage(self, seq: int | None, now: float) -> None:
        """Note a live message that could not be read; its number is None where that is damaged."""
        self._carry_out(self.stream.damaged(seq, now))

    def note_break(self, now: float) -> None:
        """Note that the connection to the publisher broke."""
        self._carry_out(self.stream.interrupted(now))

    def tick(self, now: float) -> None:
        """Let time pass."""
        self._carry_out(self.stream.tick(now))
        self.ask(now)

    def ask(self, now: float) -> None:
        """Ask for a replay if one is due."""
        start = self.stream.ask(now)
        if start is None or self._replay_endpoint is None:
            return
        if self._is_reply_open:  # what still comes belongs to the question before
            self._close_socket()
        socket = self._open_socket()
        self._is_reply_open = True
        try:
            socket.send_multipart([b"", start.to_bytes(8, "big")], zmq.NOBLOCK)
        except zmq.Again:
            return  # the timeout asks again, on a new socket
        self._wake(self)  # sending may have used up the descriptor's signal

    def work(self, limit: int, end: float, now: float) -> bool:
        """Apply what waits for its turn, then read some of a reply; tell whether there is more."""
        while self.stream.has_ready:
            self._carry_out(self.stream.go_on())
            if time.perf_counter() >= end:
                return True
        for _ in range(limit):
            if self._socket is None:
                return False
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return False
            self._take_reply(frames, now)
            if time.perf_counter() >= end:
                break
        return True

    def _take_reply(self, frames: list[bytes], now: float) -> None:
        # vLLM since 0.26 and SGLang since 0.5.23 put the topic before the number.
        number, payload = frames[-2:] if len(frames) in (3, 4) else (b"", b"")
        if len(number) != 8:
            self.stream.counters.damaged += 1
            return
        if number == _END:
            self._is_reply_open = False
            self._carry_out(self.stream.reply_ended(now))
            self.ask(now)
            return
        try:
            batch = self._decode(payload)
        except EventDecodeError:
            batch = None
        seq = int.from_bytes(number, "big")
        self._carry_out(self.stream.receive_replayed(seq, payload, batch, now))
        if not self.stream.is_asking:
            self.ask(now)

    def _carry_out(self, steps: list[Step]) -> None:
        for step in steps:
            if isinstance(step, Clear):
                self._feed.reset()
                self._accusation, self._may_name_itself = None, self._names_itself
            else:
                if step.rank in (None, self.rank) or self._may_be(step.rank):
                    self._apply(step)
                self.lag_s = self._wall_clock() - step.ts
        if self.stream.has_ready:
            self._wake(self)
        reasons = (self.stream.problem, self._feed.doubt)
        if reasons != self._shown:
            self._shown = reasons
            self._changed()

    def _may_be(self, rank: int) -> bool:
        """Let the engine say once which rank it is: it knows better than the settings."""
        if self._may_name_itself and rank < MAX_RANK:
            self._be_rank(rank)
            return True
        self._feed.counters.refused_batches += 1
        self.accuse(f"its batches are of rank {rank}, not {self.rank}")
        return False

    def _be_rank(self, rank: int) -> None:
        if rank != self.rank:
            counters = self._feed.counters
            self.rank, self._feed = rank, self._make_feed(rank)
            self._feed.counters = counters

    def _apply(self, batch: EventBatch) -> None:
        feed, self._may_name_itself = self._feed, False
        n_clears = feed.counters.clears
        try:
            feed.apply(batch)
            if feed.counters.clears > n_clears:
                self._accusation = None
        except Exception:
            # A bug of ours must not stop the pod; what it left behind cannot be trusted.
            log.exception("a batch of pod %s could not be applied", self.pod)
            feed.clear()
            feed.counters.failed_batches += 1
            feed.doubt = "a batch could not be applied; see the log"

    # -- state

    def state(self, now: float, waiting: int, losses: int) -> tuple[PodState, str | None]:
        """Return the state and its reason; ``losses`` are blocks the index could not keep."""
        heard_at = self.stream.heard_at
        if heard_at is None:
            return PodState.SILENT, "nothing heard yet"
        problem = self._problem(waiting, losses)
        if now - heard_at > self._settings.silent_after_s:
            reason = f"nothing heard for {now - heard_at:.0f} s"
            return PodState.SILENT, f"{reason}; {problem}" if problem else reason
        return (PodState.PARTIAL, problem) if problem else (PodState.EXACT, None)

    def _problem(self, waiting: int, losses: int) -> str | None:
        problem = self.stream.problem or self._accusation or self._feed.doubt
        if problem is not None:
            return problem
        if waiting:
            return f"{waiting} blocks wait for their parent"
        if losses:
            return f"the index had no room for {losses} blocks"
        return None

    def status(self, now: float, blocks: int, waiting: int, losses: int) -> PodStatus:
        """Return everything that is known about the publisher."""
        state, reason = self.state(now, waiting, losses)
        if state is not self._state:
            self._state, self._since = state, self._wall_clock()
        counters = {
            **asdict(self.stream.counters),
            **asdict(self._feed.counters),
            "waiting_blocks": waiting,
            "dropped_blocks": losses,
        }
        last_seq = self.stream.last_seq
        return PodStatus(
            self.pod, self.rank, state, reason, self._since, last_seq, self.lag_s, blocks, counters
        )

    def close(self) -> None:
        """Close the replay socket."""
        self._close_socket()

    def _open_socket(self) -> zmq.Socket:
        if self._socket is None:
            self._socket = open_socket(
                self._context,
                zmq.DEALER,
                connect=self._replay_endpoint,
                # The engine drops what its queue to us cannot hold, so let it hold a whole buffer.
                receive_hwm=self._settings.receive_hwm * 2,
                max_message_bytes=self._settings.max_message_bytes,
                curve=self._curve,
            )
            watch(self._loop, self._socket, lambda: self._wake(self))
        return self._socket

    def _close_socket(self) -> None:
        if self._socket is not None:
            close_socket(self._loop, self._socket)
            self._socket = None
        self._is_reply_open = False
