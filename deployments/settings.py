"""What an operator may set: the YAML's ``args``, checked before anything starts."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from typing_extensions import Self

from kvcore.chat_fields import RESERVED_VARIABLES


class Section(BaseModel):
    """An unknown key is an error; values never change after start-up."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Positive = Annotated[float, Field(gt=0)]
Placement = Literal["inline", "deployment"]  # in the ingress replica, or in replicas of its own
Bytes = Annotated[int, Field(ge=0)]


class ModelsSettings(Section):
    """Which models there are, and where their tokenizers and chat templates come from.

    A model is looked up in ``folders``, then in ``search``, then on the hub.
    ``HF_TOKEN``, ``HF_HOME``, ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` are respected.
    """

    default: str = "ibm-granite/granite-3.3-2b-instruct"  # `model` at the top of the file
    allowed: tuple[str, ...] = ()  # further models that requests may name; "*" allows any
    folders: dict[str, str] = {}  # model name -> its folder; allowed without further words
    search: tuple[str, ...] = ()  # folders that hold models by name or in the hub cache's layout
    revisions: dict[str, str] = {}  # model name -> branch, tag or commit on the hub
    engine_renders: tuple[str, ...] = ()  # models whose engine renders without Jinja: prompts only
    use_hub: bool = True
    endpoint: str | None = None  # another hub than HF_ENDPOINT's
    cache_dir: str | None = None  # another cache than HF_HOME's
    hub_timeout_s: Positive = 2.0  # for one answer of the hub
    hub_retries: Annotated[int, Field(ge=0)] = 2  # while it says that it is busy
    fetch_timeout_s: Positive = 300.0  # for all files of one model
    retry_after_s: Positive = 300.0  # until a default that could not be fetched is tried again
    capacity_bytes: Bytes = 4 << 30  # of loaded models; the least recently used ones go first
    fastokens: bool = True  # use it where it proves to give the same ids
    token_cache_bytes: Bytes = 64 << 20  # per model, of text segments and their ids


class RendererSettings(Section):
    """How chats become prompts; defaults are vLLM's."""

    placement: Placement = "inline"
    max_chars: Annotated[int, Field(ge=1)] = 4 << 20  # of all messages and tools of a request
    max_messages: Annotated[int, Field(ge=1)] = 2048
    default_template_kwargs: dict[str, object] = {}  # the engines' --default-chat-template-kwargs
    content_format: Literal["auto", "string", "openai"] = "auto"
    exclude_tools_when_tool_choice_none: bool = False
    transformers_5_21: bool = False  # the engines run transformers 5.21 or newer
    trust_request_chat_template: bool = False  # render a request's own template, within limits
    request_template_timeout_s: Positive = 2.0
    request_template_memory_bytes: Bytes = 256 << 20

    @field_validator("default_template_kwargs")
    @classmethod
    def _are_variables(cls, variables: dict[str, object]) -> dict[str, object]:
        for name in variables:
            if name in RESERVED_VARIABLES:
                raise ValueError(f"{name} is no template variable")
        return variables


class TokenizerSettings(Section):
    """How prompts become token ids."""

    placement: Placement = "inline"
    max_chars: Annotated[int, Field(ge=1)] = 4 << 20  # of a prompt; longer ones are refused
    # Shorter ones are encoded on the event loop: 0.1 ms, or 4 ms for so many blanks, where
    # a thread's round trip costs 0.2 ms. An eighth of it where fastokens does not load.
    inline_chars: Annotated[int, Field(ge=0)] = 12_288


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
    url: str | None = None  # its OpenAI server; None: scored, but nothing is sent there
    events: ZmqEndpoint | None = None  # to connect to; None: the pod connects to our ``bind``
    replay: ZmqEndpoint | None = None  # the engine's replay socket
    model: Name | None = None  # base model; None: from the topic, or the default model
    ranks: Annotated[int, Field(ge=1, le=1024)] = 1  # data-parallel size
    curve: CurveSettings | None = None


class EventsSettings(Section):
    """The subscriber: which pods it follows, and what it does when events go missing."""

    block_size: Annotated[int, Field(ge=1, le=4096)] = 16  # `block_size` at the top of the file
    pods: tuple[PodEndpoint, ...] = ()
    bind: ZmqEndpoint | None = None  # one endpoint for pods that connect to us
    default_model: Name = "default"  # `model` at the top of the file
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


class IndexSettings(Section):
    """The block index and what its blocks are worth."""

    capacity_bytes: Annotated[int, Field(ge=1 << 20)] = 1 << 30
    max_waiting_blocks: Annotated[int, Field(ge=0)] = 65_536  # whose parent is not known yet
    answer_timeout_s: Positive = 2.0  # then chats are routed without scores, and scores are a 503
    snapshot_path: str | None = None  # a file to go on from after a restart; None keeps none
    snapshot_interval_s: Positive = 60.0
    tier_weights: dict[str, Annotated[float, Field(ge=0, le=1)]] = {
        "gpu": 1.0, "cpu": 0.8, "cpu_pinned": 0.8, "disk": 0.5, "fs": 0.5, "storage": 0.4,
    }  # fmt: skip


class HttpSettings(Section):
    """Limits of the HTTP face."""

    max_body_bytes: Annotated[int, Field(ge=1024)] = 16 << 20


class EngineClientSettings(Section):
    """How requests are passed on to the pods."""

    connect_timeout_s: Annotated[float, Field(gt=0)] = 2.0
    read_timeout_s: Annotated[float, Field(gt=0)] = 600.0  # between two chunks of an answer
    avoid_s: Annotated[float, Field(ge=0)] = 5.0  # after a connection failed


class FleetSettings(Section):
    """The simulated engines; pod ``i`` (from 0) uses each first port plus ``i``."""

    n_pods: Annotated[int, Field(ge=1, le=64)] = 3
    capacity_blocks: Annotated[int, Field(ge=2)] = 4096  # KV memory of one pod
    first_http_port: Annotated[int, Field(ge=1, le=65_000)] = 8101
    first_event_port: Annotated[int, Field(ge=1, le=65_000)] = 5561
    first_replay_port: Annotated[int, Field(ge=1, le=65_000)] = 5661
    prefill_us_per_token: Annotated[float, Field(ge=0)] = 200.0
    decode_ms_per_token: Annotated[float, Field(ge=0)] = 5.0
    max_output_tokens: Annotated[int, Field(ge=1)] = 32  # a drawn answer has 1 to this many
    seed: int = 0

    def pods(self, model: str) -> tuple[PodEndpoint, ...]:
        """Return the pods as an operator would configure real ones."""
        return tuple(
            PodEndpoint(
                name=f"pod-{i + 1}",
                url=f"http://127.0.0.1:{self.first_http_port + i}",
                events=f"tcp://127.0.0.1:{self.first_event_port + i}",
                replay=f"tcp://127.0.0.1:{self.first_replay_port + i}",
                model=model,
            )
            for i in range(self.n_pods)
        )

    def ports(self) -> Iterator[tuple[int, str]]:
        """Yield each port that the engines open, with what it is for."""
        for i in range(self.n_pods):
            pod = f"simulated pod-{i + 1}"
            yield self.first_http_port + i, f"the HTTP API of {pod}"
            yield self.first_event_port + i, f"the KV events of {pod}"
            yield self.first_replay_port + i, f"the event replay of {pod}"


class Settings(Section):
    """The whole of a configuration's ``args``."""

    model: Name = "ibm-granite/granite-3.3-2b-instruct"  # the default; MODEL_NAME
    block_size: Annotated[int, Field(ge=1, le=4096)] = 256  # tokens, as the engines'; BLOCK_SIZE
    models: ModelsSettings = ModelsSettings()
    renderer: RendererSettings = RendererSettings()
    tokenizer: TokenizerSettings = TokenizerSettings()
    index: IndexSettings = IndexSettings()
    events: EventsSettings = EventsSettings()
    publisher: PublisherSettings = PublisherSettings()
    http: HttpSettings = HttpSettings()
    engines: EngineClientSettings = EngineClientSettings()
    fleet: FleetSettings | None = None

    @model_validator(mode="after")
    def _says_nothing_twice(self) -> Self:
        """Refuse what has its one place at the top of the file."""
        for section, key, place in (
            (self.events, "block_size", "events"),
            (self.events, "default_model", "events"),
            (self.models, "default", "models"),
        ):
            if key in section.model_fields_set:
                raise ValueError(f"{place}.{key} is set at the top of args: model, block_size")
        return self

    @property
    def model_store(self) -> ModelsSettings:
        """Return where models come from, the default one named."""
        return self.models.model_copy(update={"default": self.model})

    @property
    def subscriber(self) -> EventsSettings:
        """Return what the subscriber follows: configured pods and the embedded fleet's."""
        fleet = self.fleet.pods(self.model) if self.fleet else ()
        return self.events.model_copy(
            update={
                "block_size": self.block_size,
                "default_model": self.model,
                "pods": (*self.events.pods, *fleet),
            }
        )

    def ports(self) -> Iterator[tuple[int, str]]:
        """Yield each loopback port that this configuration opens, with what it is for."""
        if self.fleet is not None:
            yield from self.fleet.ports()
        for endpoint, purpose in (
            (self.publisher.endpoint, "the published events"),
            (self.publisher.replay_endpoint, "the replay of published events"),
            (self.events.bind, "the events of pods that connect"),
        ):
            if endpoint and endpoint.startswith("tcp://"):
                yield int(endpoint.rsplit(":", 1)[1]), purpose


def with_environment(settings: Settings, environment: Mapping[str, str]) -> Settings:
    """Let MODEL_NAME and BLOCK_SIZE override the file, as they did for the original.

    Raises:
        pydantic.ValidationError: A variable has no valid value.
    """
    changes = {
        name: environment[variable]
        for name, variable in (("model", "MODEL_NAME"), ("block_size", "BLOCK_SIZE"))
        if environment.get(variable)
    }
    return Settings.model_validate({**settings.model_dump(exclude_unset=True), **changes})
