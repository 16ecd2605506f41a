"""Every setting an operator can make, by section; checked before anything starts."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """An unknown key is an error; values never change after start-up."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Name = Annotated[str, Field(min_length=1, max_length=256)]
ZmqEndpoint = Annotated[str, Field(pattern=r"^(tcp|ipc|inproc)://.+")]


class CurveSettings(Section):
    """CurveZMQ keys in Z85; the secret key is read from an environment variable."""

    public_key: Annotated[str, Field(min_length=40, max_length=40)]
    secret_key_env: Name  # name of the variable that holds the secret key
    server_key: Annotated[str, Field(min_length=40, max_length=40)] | None = None  # to connect
    allowed_keys: tuple[str, ...] = ()  # clients a bound socket lets in; empty lets all in


class PodEndpoint(Section):
    """Where one engine pod publishes; rank ``r`` uses both ports plus ``r``."""

    name: Name
    events: ZmqEndpoint | None = None  # to connect to; None: the pod connects to our ``bind``
    replay: ZmqEndpoint | None = None  # the engine's replay socket
    model: Name | None = None  # base model; None: from the topic, or the default model
    ranks: Annotated[int, Field(ge=1, le=1024)] = 1  # data-parallel size
    curve: CurveSettings | None = None


class EventsSettings(Section):
    """The subscriber: which pods it follows, and what it does when events go missing."""

    block_size: Annotated[int, Field(ge=1, le=4096)] = 16  # tokens; must equal the engines'
    pods: tuple[PodEndpoint, ...] = ()
    bind: ZmqEndpoint | None = None  # one endpoint for pods that connect to us
    default_model: Name = "default"  # of pods that neither the settings nor the topic name
    topic_prefix: str = ""  # other topics are not received
    max_pods: Annotated[int, Field(ge=1)] = 4096  # configured and discovered ones together
    receive_hwm: Annotated[int, Field(ge=1)] = 10_000  # batches queued per pod, then shed
    max_message_bytes: Annotated[int, Field(ge=1024)] = 16 << 20
    slice_ms: Annotated[float, Field(gt=0)] = 1.0  # longest work before other tasks have a turn
    max_held_batches: Annotated[int, Field(ge=1)] = 4096  # behind a hole, per publisher
    reply_timeout_s: Annotated[float, Field(gt=0)] = 2.0  # a replay without a single message
    max_replay_attempts: Annotated[int, Field(ge=1)] = 4  # fruitless, before a hole is lost
    gap_grace_s: Annotated[float, Field(ge=0)] = 0.5  # for late batches, without a replay socket
    probe_interval_s: Annotated[float, Field(gt=0)] = 2.0  # asks for a lost tail
    rebuild_interval_s: Annotated[float, Field(gt=0)] = 30.0  # asks for the whole history
    silent_after_s: Annotated[float, Field(gt=0)] = 30.0  # without any sign of life
    curve: CurveSettings | None = None  # of the bound socket


class PublisherSettings(Section):
    """Our own events about scored prompts and chats."""

    endpoint: ZmqEndpoint | None = None  # to bind; None publishes nothing
    replay_endpoint: ZmqEndpoint | None = None
    send_hwm: Annotated[int, Field(ge=1)] = 10_000  # messages queued per subscriber, then dropped
    buffer_batches: Annotated[int, Field(ge=1)] = 10_000  # kept for replay
    buffer_bytes: Annotated[int, Field(ge=1)] = 64 << 20
    curve: CurveSettings | None = None
