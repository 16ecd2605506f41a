"""From the engines' sockets into the index: every pod followed, every loss noticed.

Everything runs on one event loop in callbacks: sockets wake the subscriber, which works in
slices of ``slice_ms`` and gives way to other tasks between them. ZMQ's own receive queues are
the bounded buffers; what they shed shows as a hole in the sequence and is replayed.
"""

import asyncio
import contextlib
import contextvars
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import zmq

from deployments.follower import MAX_RANK, Follower, PodStatus
from deployments.inlet import Inlet
from deployments.settings import EventsSettings, PodEndpoint
from deployments.sockets import close_socket, guard, parse_topic, rank_endpoint
from kvcore.errors import EventDecodeError, InvalidInputError
from kvcore.events import BatchDecoder, EventBatch
from kvcore.feed import ModelRoot
from kvcore.index import BlockIndex
from kvcore.stream_state import PodState

log = logging.getLogger(__name__)

_TIMER_S = 0.05
_TURN_MESSAGES = 16  # of one socket, before the next one has its turn
_MAX_NAME = 256  # characters of a pod that names itself
_MAX_TOPIC = 1024  # bytes; a longer one names nothing
_NONE = [0, 0, 0]


@dataclass
class SubscriberCounters:
    """Messages that could not be given to any pod."""

    unattributed: int = 0
    refused_claims: int = 0  # one pod's socket using another pod's name
    refused_pods: int = 0  # more pods or ranks than the limits
    errors: int = 0  # unexpected, each with a log line


class Subscriber:
    """Follow every pod's events and apply them to the index; lives on one event loop.

    Only that loop may touch the index meanwhile, so nothing is locked.
    """

    def __init__(
        self,
        settings: EventsSettings,
        index: BlockIndex,
        *,
        model_root: ModelRoot,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.counters = SubscriberCounters()
        self._settings, self._index, self._model_root = settings, index, model_root
        self._clock, self._wall_clock = clock, wall_clock
        self._decode = BatchDecoder().decode
        self._pods: dict[str, PodEndpoint] = {}
        self._removed: set[str] = set()
        self._followers: dict[tuple[str, int], Follower] = {}
        self._inlets: list[Inlet] = []
        self._bound: Inlet | None = None
        self._door: zmq.Socket | None = None
        self._ready: dict[Any, None] = {}  # inlets and followers with something to read, in turn
        self._positions: dict[tuple[str, int], dict[str, Any]] = {}
        self._states: dict[tuple[str, int], tuple[PodState, str | None]] | None = None
        self._is_scheduled = self._is_paused = self._is_closed = False
        self._context: zmq.Context | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None

    # -- life

    def resume(self, positions: list[Any]) -> None:
        """Go on from the `positions` of the snapshot that the index comes from; before `start`."""
        self._positions = {(pod, rank): position for pod, rank, position in positions}

    def pause(self) -> None:
        """Leave the index as it is: what arrives waits in its sockets until `go_on`."""
        self._is_paused = True

    def go_on(self) -> None:
        """End a `pause`."""
        self._is_paused = False
        self._schedule()

    async def start(self) -> None:
        """Open the sockets of all configured pods and begin to follow them.

        Raises:
            zmq.ZMQError: An endpoint is malformed or already bound.
        """
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, 8192)
        try:
            if self._settings.bind is not None:
                self._door = guard(self._loop, self._context, self._settings.curve)
                self._bound = self._open_inlet(None, 0)
            for pod in self._settings.pods:
                self.add_pod(pod)
        except BaseException:
            await self.close()
            raise
        for (name, _), position in self._positions.items():  # no longer configured
            for rank, _ in position["doubts"]:
                self._index.clear_pod(name, rank)
            if name not in self._pods:
                self._index.drop_pod(name)
        self._positions.clear()
        # Serve cancels what a request's context started; this outlives every request.
        contextvars.Context().run(self._on_timer)

    async def close(self) -> None:
        """Close every socket at once; what was not applied stays with the engines."""
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        for follower in self._followers.values():
            follower.close()
        for inlet in self._inlets:
            inlet.close()
        if self._door is not None:
            close_socket(self._loop, self._door)
        self._inlets.clear()
        self._followers.clear()
        if self._context is not None:
            self._context.destroy(linger=0)

    def _running(self) -> tuple[asyncio.AbstractEventLoop, zmq.Context]:
        if self._loop is None or self._context is None:
            raise RuntimeError("the subscriber is not started")
        return self._loop, self._context

    # -- pods

    def add_pod(self, pod: PodEndpoint) -> None:
        """Begin to follow a pod; one that is followed already is replaced.

        Raises:
            InvalidInputError: There are too many pods, or no socket for this one.
            zmq.ZMQError: An endpoint is malformed.
        """
        if pod.name in self._pods:
            if self._pods[pod.name] == pod:
                return
            self.remove_pod(pod.name)
        if pod.events is None and self._bound is None:
            raise InvalidInputError(f"pod {pod.name} has no events endpoint, and nothing is bound")
        if not self._has_room(pod.name):
            raise InvalidInputError(f"more than {self._settings.max_pods} pods")
        self._removed.discard(pod.name)
        if any(name == pod.name for name, _ in self._followers):  # discovered, now configured
            self._unfollow(pod.name)
        self._pods[pod.name] = pod
        try:
            for rank in range(pod.ranks):
                self._follow(pod.name, rank, pod)
                if pod.events is not None:
                    self._open_inlet(pod, rank)
        except BaseException:
            self.remove_pod(pod.name)
            raise

    def remove_pod(self, name: str) -> int:
        """Forget a pod and drop its blocks; return how many it held. Unknown names hold none."""
        self._pods.pop(name, None)
        if self._bound is not None:
            self._removed.add(name)  # it may go on sending to the bound socket
        return self._unfollow(name)

    def pods(self) -> list[PodEndpoint]:
        """Return the configured and added pods."""
        return list(self._pods.values())

    def _unfollow(self, name: str) -> int:
        for inlet in [inlet for inlet in self._inlets if inlet.pod == name]:
            self._ready.pop(inlet, None)
            self._inlets.remove(inlet)
            inlet.close()
        for key in [key for key in self._followers if key[0] == name]:
            follower = self._followers.pop(key)
            self._ready.pop(follower, None)
            follower.close()
        self._states = None
        return self._index.drop_pod(name)

    def _follow(
        self, name: str, rank: int, pod: PodEndpoint | None, model: str | None = None
    ) -> Follower:
        loop, context = self._running()
        follower = Follower(
            self._settings,
            self._index,
            name,
            rank,
            names_itself=pod is not None and pod.events is not None and pod.ranks == 1,
            replay=rank_endpoint(pod.replay, rank) if pod and pod.replay else None,
            model=(pod.model if pod else None) or model,
            curve=pod.curve if pod else None,
            model_root=self._model_root,
            decode=self._decode,
            context=context,
            loop=loop,
            wake=self._wake,
            changed=self._forget_states,
            wall_clock=self._wall_clock,
        )
        position = self._positions.pop((name, rank), None)
        if position is not None:
            follower.resume(position)
        self._followers[name, rank] = follower
        self._states = None
        return follower

    def _forget_states(self) -> None:
        self._states = None

    def _open_inlet(self, pod: PodEndpoint | None, rank: int) -> Inlet:
        loop, context = self._running()
        inlet = Inlet(self._settings, context, pod, rank)
        self._inlets.append(inlet)
        inlet.watch(loop, self._wake)
        return inlet

    # -- work

    def _verify(self, inlet: Inlet) -> None:
        """Ask the publishers behind a broken connection whether they are still the same."""
        inlet.is_broken = False
        now = self._clock()
        for (pod, rank), follower in self._followers.items():
            if inlet.pod is None:
                # Which pod left the bound socket is unknown; one without a replay cannot be asked.
                is_behind = follower.stream.has_replay and not self._has_inlet(pod)
            else:
                is_behind = (pod, rank) == (inlet.pod, inlet.rank)
            if is_behind:
                follower.note_break(now)
                follower.ask(now)

    def _has_room(self, pod: str) -> bool:
        """Whether a pod of this name may be followed; a further rank of one always may."""
        return len({name for name, _ in self._followers} - {pod}) < self._settings.max_pods

    def _has_inlet(self, pod: str) -> bool:
        return pod in self._pods and self._pods[pod].events is not None

    def _wake(self, source: "Inlet | Follower") -> None:
        self._ready[source] = None
        self._schedule()

    def _schedule(self) -> None:
        if self._is_scheduled or self._is_paused or self._is_closed or self._loop is None:
            return
        self._is_scheduled = bool(self._ready)
        if self._ready:
            contextvars.Context().run(self._loop.call_soon, self._work)

    def _work(self) -> None:
        """Read in turn until all is read or the slice is over; other tasks run in between."""
        self._is_scheduled = False
        if self._is_paused:
            return
        end = time.perf_counter() + self._settings.slice_ms / 1000
        while self._ready and not self._is_closed:
            source = next(iter(self._ready))
            del self._ready[source]
            try:
                has_more = self._read(source, end)
            except Exception as exc:
                # One bad message must never stop the others; a broken socket has no more of them.
                self.counters.errors += 1
                log.exception("an event message could not be handled")
                has_more = not isinstance(exc, zmq.ZMQError)
            if has_more and not self._is_closed:
                self._ready[source] = None
            if time.perf_counter() >= end:
                break
        self._schedule()

    def _read(self, source: "Inlet | Follower", end: float) -> bool:
        """Read some messages of one socket; tell whether there may be more."""
        if isinstance(source, Follower):
            return source.work(_TURN_MESSAGES, end, self._clock())
        for _ in range(_TURN_MESSAGES):
            frames = source.receive()
            if frames is None:
                if source.is_broken:
                    self._verify(source)
                return False
            self._take(source, frames, self._clock())
            if time.perf_counter() >= end:
                break
        return True

    def _take(self, inlet: Inlet, frames: list[bytes], now: float) -> None:
        batch: EventBatch | None = None
        seq: int | None = None
        if len(frames) == 3 and len(frames[1]) == 8 and frames[1][0] < 0x80:
            seq = int.from_bytes(frames[1], "big")
            with contextlib.suppress(EventDecodeError):  # counted as damaged below
                batch = self._decode(frames[2])
        follower = self._whose(inlet, frames[0], batch)
        if follower is None:
            return
        if seq is None or batch is None:
            follower.note_damage(seq, now)
        else:
            follower.take(seq, frames[2], batch, now)
        if follower.stream.problem is not None:
            follower.ask(now)

    def _whose(self, inlet: Inlet, topic: bytes, batch: EventBatch | None) -> Follower | None:
        pod, model = parse_topic(topic) if len(topic) <= _MAX_TOPIC else (None, None)
        if inlet.pod is None:
            return self._whose_bound(pod, model, batch)
        follower = self._followers[inlet.pod, inlet.rank]
        if pod is not None and pod != inlet.pod and pod in self._pods:
            self.counters.refused_claims += 1
            follower.accuse(f"its socket used the name of pod {pod}")
            return None
        follower.learn_model(model)
        return follower

    def _whose_bound(
        self, pod: str | None, model: str | None, batch: EventBatch | None
    ) -> Follower | None:
        if pod is None:
            pushing = [p.name for p in self._pods.values() if p.events is None]
            pod = pushing[0] if len(pushing) == 1 else None
        if pod is None or pod in self._removed or len(pod) > _MAX_NAME:
            self.counters.unattributed += 1
            return None
        if self._has_inlet(pod):  # whom we connect to has no business here
            self.counters.refused_claims += 1
            return None
        rank = batch.rank if batch is not None and batch.rank is not None else 0
        known = self._followers.get((pod, rank))
        if known is not None:
            known.learn_model(model)
            return known
        if batch is None:  # nothing readable to tell a rank by
            self.counters.unattributed += 1
            return None
        if rank >= MAX_RANK or not self._has_room(pod):
            self.counters.refused_pods += 1
            return None
        return self._follow(pod, rank, self._pods.get(pod), model)

    def _on_timer(self) -> None:
        if self._is_closed or self._loop is None:
            return
        try:
            self._states = None
            for follower in [] if self._is_paused else list(self._followers.values()):
                self._tick(follower)
        finally:
            self._timer = self._loop.call_later(_TIMER_S, self._on_timer)

    def _tick(self, follower: Follower) -> None:
        try:
            follower.tick(self._clock())
        except Exception:
            # One pod's trouble must not stop the others' clocks.
            self.counters.errors += 1
            log.exception("pod %s could not be asked", follower.pod)

    # -- what others read

    @property
    def bound_endpoint(self) -> str | None:
        """The address of the bound socket, with the port that a wildcard was given."""
        return None if self._bound is None else self._bound.endpoint

    def states(self) -> Mapping[tuple[str, int], tuple[PodState, str | None]]:
        """Return state and reason by (pod, rank), for every answer.

        Cheap: made anew after a change, and every 50 ms for what only time or the index changes.
        """
        if self._states is None:
            now = self._clock()
            sums = self._block_sums()
            self._states = {
                (pod, follower.rank): follower.state(
                    now, *sums.get((pod, follower.rank), _NONE)[1:]
                )
                for (pod, _), follower in self._followers.items()
            }
        return self._states

    def _block_sums(self) -> dict[tuple[str, int], list[int]]:
        """Return blocks, waiting blocks and blocks the index could not keep, by (pod, rank)."""
        sums: dict[tuple[str, int], list[int]] = {}
        for stat in self._index.holder_stats():
            entry = sums.setdefault((stat.holder.pod, stat.holder.rank), [0, 0, 0])
            entry[0] += stat.blocks
            entry[1] += stat.waiting
            entry[2] += stat.dropped + stat.evicted
        return sums

    def statuses(self) -> list[PodStatus]:
        """Return the state of every rank of every pod, in the order they were added."""
        now, sums = self._clock(), self._block_sums()
        return [
            follower.status(now, *sums.get((pod, follower.rank), _NONE))
            for (pod, _), follower in self._followers.items()
        ]

    def positions(self) -> list[Any]:
        """Return where every publisher stands, JSON-serialisable, for a snapshot of the index.

        Both must be of one moment: take them without an await between, or within a `pause`.
        """
        return [
            [pod, rank, follower.position()] for (pod, rank), follower in self._followers.items()
        ]
