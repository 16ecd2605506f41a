"""What an operator may set: the YAML's ``args``, checked before anything starts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """An unknown key is an error; values never change after start-up."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Positive = Annotated[float, Field(gt=0)]
Bytes = Annotated[int, Field(ge=0)]


class ModelsSettings(Section):
    """Which models there are, and where their tokenizers and chat templates come from.

    A model is looked up in ``folders``, then in ``search``, then on the hub.
    ``HF_TOKEN``, ``HF_HOME``, ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` are respected.
    """

    default: str = "ibm-granite/granite-3.3-2b-instruct"  # where a request names no model
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
    retry_after_s: Positive = (
        300.0  # until a default model that could not be fetched is tried again
    )
    capacity_bytes: Bytes = 4 << 30  # of loaded models; the least recently used ones go first
    fastokens: bool = True  # use it where it proves to give the same ids
    token_cache_bytes: Bytes = 64 << 20  # per model, of text segments and their ids


class RendererSettings(Section):
    """How chats become prompts; defaults are vLLM's."""

    max_chars: Annotated[int, Field(ge=1)] = 4 << 20  # of all messages and tools of a request
    max_messages: Annotated[int, Field(ge=1)] = 2048
    default_template_kwargs: dict[str, object] = {}  # the engines' --default-chat-template-kwargs
    content_format: Literal["auto", "string", "openai"] = "auto"
    exclude_tools_when_tool_choice_none: bool = False
    trust_request_chat_template: bool = False  # render a request's own template, within limits
    request_template_timeout_s: Positive = 2.0
    request_template_memory_bytes: Bytes = 256 << 20


class TokenizerSettings(Section):
    """How prompts become token ids."""

    max_chars: Annotated[int, Field(ge=1)] = 4 << 20  # of a prompt; longer ones are refused
    # Shorter ones are encoded on the event loop: 0.1 ms, or 4 ms for so many blanks, where
    # a thread's round trip costs 0.2 ms. An eighth of it where fastokens does not load.
    inline_chars: Annotated[int, Field(ge=0)] = 12_288
