"""Every error that kvcore raises on purpose, in one tree.

    KvError
    ├── InvalidInputError          the request cannot be scored as it stands
    │   ├── PromptTooLongError     more tokens or characters than the service accepts
    │   └── ArrayError             an array of another dtype or shape; a bug in the caller
    ├── ModelError                 a model's tokenizer or template is not to be had
    ├── EventDecodeError           an engine's message is not an event batch
    ├── IndexUnavailableError      the index cannot answer now; route without it
    └── SnapshotError              a snapshot is foreign, damaged or of another version

A new error goes below the nearest base, and is born with that base's HTTP status.
"""


class KvError(Exception):
    """Anything kvcore raises on purpose; caught at the edges, never inside kvcore."""


class InvalidInputError(KvError):
    """The request cannot be scored as it stands."""


class PromptTooLongError(InvalidInputError):
    """The prompt exceeds what the service accepts."""

    def __init__(self, size: int, limit: int, unit: str) -> None:
        super().__init__(size, limit, unit)  # every argument: Ray pickles by ``args``
        self.size, self.limit, self.unit = size, limit, unit

    def __str__(self) -> str:
        return f"prompt has {self.size:,} {self.unit}, the limit is {self.limit:,}"


class ArrayError(InvalidInputError, TypeError):
    """An array has another dtype, shape or layout than asked for: a bug in the caller."""


class ModelError(KvError):
    """A model's tokenizer or template is not to be had."""


class EventDecodeError(KvError):
    """An engine's message is not an event batch."""


class IndexUnavailableError(KvError):
    """The index cannot answer now; the caller may route without it."""


class SnapshotError(KvError):
    """A snapshot is foreign, damaged or of another version."""
