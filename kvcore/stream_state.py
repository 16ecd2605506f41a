"""What a publisher's stream is told, hands out, counts and leaves behind."""

import zlib
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from kvcore.events import EventBatch


class PodState(str, Enum):
    """How far a pod's scores can be trusted."""

    EXACT = "EXACT"  # every batch from the engine's first one on is applied
    PARTIAL = "PARTIAL"  # something is missing; scores may be too low
    SILENT = "SILENT"  # nothing has been heard for too long


@dataclass(frozen=True)
class StreamLimits:
    """How patient a stream is, and how much it holds."""

    max_held_batches: int = 4096  # behind a hole; later ones come again with the replay
    max_held_bytes: int = 64 << 20
    max_steps: int = 16  # held batches handed over at once; the rest waits for `Stream.go_on`
    reply_timeout_s: float = 2.0  # without a single message of the reply
    retry_s: float = 0.2  # doubles with each fruitless attempt, up to the probe interval
    max_attempts: int = 4  # fruitless replays before a hole counts as lost
    gap_grace_s: float = 0.5  # for a late batch where there is no replay to ask
    probe_interval_s: float = 2.0  # a lost tail shows only when asked for
    rebuild_interval_s: float = 30.0  # between attempts to replay the whole history


@dataclass
class StreamCounters:
    """Everything that ever happened to a message; none is dropped without one of these moving."""

    received: int = 0
    replayed: int = 0
    applied: int = 0
    duplicates: int = 0
    shed: int = 0
    damaged: int = 0
    gaps: int = 0
    lost: int = 0  # batches given up
    restarts: int = 0
    conflicts: int = 0
    replays_asked: int = 0
    replays_failed: int = 0


class Clear(NamedTuple):
    """Drop the publisher's blocks before the next step."""

    reason: str


Step = Clear | EventBatch


class Mark(NamedTuple):
    """What identifies a batch besides its number."""

    size: int
    crc: int

    @classmethod
    def of(cls, payload: bytes) -> "Mark":
        """Return the mark of a payload's bytes."""
        return cls(len(payload), zlib.crc32(payload))


class Position(NamedTuple):
    """Where a stream stands; small and JSON-serialisable, to be kept with an index snapshot."""

    next_seq: int
    newest_ts: float | None
    first: tuple[int, int] | None
    last: tuple[int, int] | None
    lost: str | None
