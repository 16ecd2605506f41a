"""Every error that kvcore raises on purpose, in one tree.

    KvError
    ├── InvalidInputError          the request cannot be scored as it stands
    │   ├── PromptTooLongError     more tokens or characters than the service accepts
    │   ├── InvalidFieldError      one field of the request, named, is wrong or not to be honoured
    │   ├── RenderError            the chat template refuses the chat, or fails on it
    │   ├── RenderLimitError       a request's own template ran out of its time or memory
    │   ├── UnknownPodError        no pod of that name is followed
    │   ├── TemplateSyntaxError    Jinja cannot compile the template
    │   └── ArrayError             an array of another dtype or shape; a bug in the caller
    ├── ModelError                 a model's tokenizer or template is not to be had
    │   ├── ModelNotFoundError     no such model, or it may not be loaded on request
    │   ├── ModelForbiddenError    the hub wants a token, or a licence accepted
    │   ├── ModelUnsupportedError  its engine does not render by Jinja, or it has no tokenizer.json
    │   ├── ModelDamagedError      its files are cut off or are not what they should be
    │   └── HubError               the hub is not to be reached
    │       ├── HubBusyError       the hub asks to come back later (429)
    │       └── HubTimeoutError    the hub does not answer in time
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


class InvalidFieldError(InvalidInputError):
    """One field of the request is wrong, or cannot be honoured."""

    def __init__(self, param: str, reason: str) -> None:
        super().__init__(param, reason)  # every argument: Ray pickles by ``args``
        self.param, self.reason = param, reason  # param as in "messages[2].content[0].type"

    def __str__(self) -> str:
        return f"{self.param}: {self.reason}"


class RenderError(InvalidInputError):
    """The chat template refuses the chat, or fails on it."""


class RenderLimitError(InvalidInputError):
    """A template that came with a request ran out of its time or memory."""


class UnknownPodError(InvalidInputError):
    """No pod of that name is followed."""


class TemplateSyntaxError(InvalidInputError):
    """Jinja cannot compile the template."""


class ModelError(KvError):
    """A model's tokenizer or template is not to be had."""


class ModelNotFoundError(ModelError):
    """No such model here or on the hub, or it may not be loaded on request."""


class ModelForbiddenError(ModelError):
    """The hub wants a token, another one, or its licence accepted."""


class ModelUnsupportedError(ModelError):
    """The model's engine does not render by Jinja, or it comes without tokenizer.json."""


class ModelDamagedError(ModelError):
    """The model's files are cut off, or are not what their names say."""


class HubError(ModelError):
    """The model hub is not to be reached, or fails."""


class HubBusyError(HubError):
    """The model hub asks to come back later."""


class HubTimeoutError(HubError):
    """The model hub does not answer in time."""


class EventDecodeError(KvError):
    """An engine's message is not an event batch."""


class IndexUnavailableError(KvError):
    """The index cannot answer now; the caller may route without it."""


class SnapshotError(KvError):
    """A snapshot is foreign, damaged or of another version."""
