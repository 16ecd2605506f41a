"""The models whose prompts can be rendered and tokenized, loaded once and kept in a budget."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path

from deployments.model_files import (
    ModelFiles,
    check_name,
    fetch,
    find_local,
    read_folder,
)
from deployments.settings import ModelsSettings
from kvcore.errors import (
    HubTimeoutError,
    ModelDamagedError,
    ModelError,
    ModelNotFoundError,
    TemplateSyntaxError,
)
from kvcore.templates import (
    ChatTemplate,
    Templates,
    choose_template,
    collect_special_tokens,
    collect_templates,
)
from kvcore.tokenization import PromptTokenizer

log = logging.getLogger(__name__)

_EMBEDDED = Path(__file__).parent / "embedded"

# What vLLM 0.33 renders by code of its own, by the architecture in config.json.
_RENDERED_BY_ENGINE = {
    "GptOssForCausalLM": "harmony",
    "DeepseekV32ForCausalLM": "DeepSeek V3.2's encoder",
    "DeepseekV4ForCausalLM": "DeepSeek V4's encoder",
    "DeepseekV4ForConditionalGeneration": "DeepSeek V4's encoder",
    "DeepseekV41ForCausalLM": "DeepSeek V4.1's encoder",
    "KimiK3ForConditionalGeneration": "Kimi K3's encoder",
    "InklingForCausalLM": "Inkling's encoder",
    "InklingForConditionalGeneration": "Inkling's encoder",
    "MoonshotKimiaForCausalLM": "Kimi-Audio's encoder",
    "Alpamayo2Super": "Alpamayo's encoder",
}
# AutoTokenizer builds these anew from their parts: recorded ids then differ from
# tokenizer.json's. By tokenizer class: the model types that this happens to.
_REBUILT = {
    "LlamaTokenizer": ("llama", "yi"),
    "LlamaTokenizerFast": ("llama", "yi"),
    "GPT2Tokenizer": ("minimax", "minimax_m1", "minimax_text_01"),
}


@dataclass(frozen=True)
class Model:
    """One model's tokenizer and chat templates, ready for use; shared, never changed."""

    name: str
    tokenizer: PromptTokenizer
    templates: Templates | None
    special_tokens: dict[str, str]
    source: str  # where the files are from, in words
    processor_template: str | None = None  # for chats without tools, where there is one
    fallback_reason: str | None = None  # why this is not the model that the name says
    rendered_by: str | None = None  # what the engine renders chats with, if not with Jinja
    warning: str | None = None  # why ids could differ from the engine's
    compiled: dict[str, ChatTemplate] = field(default_factory=dict, repr=False)

    @property
    def size_bytes(self) -> int:
        """About how much memory the model takes."""
        return self.tokenizer.size_bytes + 200 * sum(map(len, self.compiled))

    def choose(self, *, named: str | None = None, tools: object | None = None) -> str:
        """Return the text of the template for a chat, as vLLM chooses it.

        Args:
            named: The request's choice: a name, or else a template's text.
            tools: As the request brought them.

        Raises:
            RenderError: The model has no template, or several and no default.
        """
        if named is None and tools is None and self.processor_template is not None:
            return self.processor_template
        return choose_template(self.templates, named=named, tools=tools)

    def template(self, *, tools: object | None = None) -> ChatTemplate:
        """Return the compiled template for a chat; ``tools`` as the request brought them.

        Raises:
            RenderError: The model has no template.
        """
        return self.compiled[self.choose(tools=tools)]


class ModelStore:
    """Loads models by name, once for all who wait, and forgets those longest unused.

    Belongs to one event loop. Where the default model is not to be had, the embedded
    one stands in under its name, says so, and the default is tried again later.
    """

    def __init__(
        self, settings: ModelsSettings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings, self._clock = settings, clock
        self._models: dict[str, Model] = {}  # least recently used first
        self._loading: dict[str, asyncio.Task[Model]] = {}
        self._retry_at = float("inf")
        # Of its own: loads that wait for a slow hub must not keep prompts from being encoded.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="load-model")

    async def get(self, name: str | None = None) -> Model:
        """Return a model, the default one for None; the first call loads it.

        Raises:
            ModelNotFoundError: No model's name, none that requests may load, or unknown.
            ModelError: Its files are not to be had; the subclass says why.
        """
        name = name or self._settings.default
        model = self._models.get(name)
        if model is not None:
            if len(self._models) > 1:
                self._models[name] = self._models.pop(name)  # used last
            if model.fallback_reason is not None and self._clock() >= self._retry_at:
                self._start_loading(name)  # answers with the stand-in meanwhile
            return model
        self._check_allowed(name)
        # Shielded: one impatient caller must not cancel the load for the others.
        return await asyncio.shield(self._start_loading(name))

    def known(self) -> dict[str, Model | None]:
        """Return the configured and loaded models; None: not loaded yet."""
        names = [self._settings.default, *self._settings.folders, *self._settings.allowed]
        configured = {name: self._models.get(name) for name in names if name != "*"}
        return {**configured, **self._models}

    def _check_allowed(self, name: str) -> None:
        settings = self._settings
        if name in (settings.default, *settings.folders, *settings.allowed):
            return
        check_name(name)
        if "*" not in settings.allowed:
            raise ModelNotFoundError(f"the model {name!r} does not exist here")

    def _start_loading(self, name: str) -> asyncio.Task[Model]:
        task = self._loading.get(name)
        if task is None:
            task = self._loading[name] = asyncio.create_task(self._load(name))
            task.add_done_callback(lambda done: self._forget_load(name, done))
        return task

    def _forget_load(self, name: str, done: asyncio.Task[Model]) -> None:
        self._loading.pop(name, None)
        if not done.cancelled():
            done.exception()  # or asyncio reports it as unseen, where nobody waited any more

    async def _load(self, name: str) -> Model:
        try:
            model = await asyncio.wait_for(
                self._in_thread(load_model, name, self._settings), self._settings.fetch_timeout_s
            )
        except asyncio.TimeoutError as error:
            model = await self._stand_in(
                name, HubTimeoutError(f"loading {name} took too long"), error
            )
        except ModelError as error:
            model = await self._stand_in(name, error, error)
        self._models[name] = model
        self._make_room(name)
        return model

    async def _stand_in(self, name: str, reason: ModelError, cause: Exception) -> Model:
        if name != self._settings.default:
            raise reason from cause
        self._retry_at = self._clock() + self._settings.retry_after_s
        before = self._models.get(name)
        if before is not None:
            return before
        text = f"the embedded model stands in for {name}: {reason}"
        log.error("FALLBACK: %s. Scores will not match engines that serve the real model.", text)
        embedded = await self._in_thread(load_embedded, self._settings)
        return replace(embedded, name=name, fallback_reason=text)

    def _in_thread(self, load: Callable[..., Model], *arguments: object) -> asyncio.Future[Model]:
        return asyncio.get_running_loop().run_in_executor(self._threads, load, *arguments)

    def _make_room(self, newest: str) -> None:
        keep = {newest, self._settings.default}
        for name in [name for name in self._models if name not in keep]:
            if sum(m.size_bytes for m in self._models.values()) <= self._settings.capacity_bytes:
                return
            log.info("forgetting model %s, the longest unused one", name)
            del self._models[name]


def load_model(name: str, settings: ModelsSettings) -> Model:
    """Load a model from a configured folder, a search folder or the hub; blocks.

    Raises:
        ModelError: It is not to be had; the subclass says why.
    """
    folder = find_local(name, settings)
    if folder is not None:
        return build_model(name, read_folder(folder, f"folder {folder}"), settings)
    files = fetch(name, settings)
    try:
        return build_model(name, files, settings)
    except ModelDamagedError:
        # The cache would hand out the damaged file for ever.
        return build_model(name, fetch(name, settings, force=True), settings)


def load_embedded(settings: ModelsSettings) -> Model:
    """Load the model that comes with the package; needs no network."""
    return build_model("embedded", read_folder(_EMBEDDED, "embedded"), settings)


def build_model(name: str, files: ModelFiles, settings: ModelsSettings) -> Model:
    """Make a model from its files; takes up to seconds for a large vocabulary.

    Raises:
        ModelDamagedError: tokenizer.json does not load, or a template does not compile.
    """
    config, tokenizer_config = files.parsed("config.json"), files.parsed("tokenizer_config.json")
    tokenizer = PromptTokenizer(
        files.tokenizer, cache_bytes=settings.token_cache_bytes, fast=settings.fastokens
    )
    if tokenizer.fallback_reason:
        log.warning("%s is tokenized by tokenizers: %s", name, tokenizer.fallback_reason)
    templates = collect_templates(
        tokenizer_config,
        files.texts.get("chat_template.jinja"),
        {
            Path(file).stem: text
            for file, text in files.texts.items()
            if file.startswith("additional_chat_templates/")
        },
    )
    texts = [templates] if isinstance(templates, str) else list((templates or {}).values())
    of_processor = _processor_template(files)
    if of_processor is not None:
        texts.append(of_processor)
    try:
        compiled = {text: ChatTemplate(text) for text in texts}
    except TemplateSyntaxError as error:
        raise ModelDamagedError(f"{files.source}: {error}") from error
    warning = _rebuilt(config, tokenizer_config, files.tokenizer)
    if warning:
        log.warning("%s: %s", name, warning)
    return Model(
        name=name,
        tokenizer=tokenizer,
        templates=templates,
        special_tokens=collect_special_tokens(
            tokenizer_config, files.parsed("special_tokens_map.json")
        ),
        source=files.source,
        processor_template=of_processor,
        rendered_by=_rendered_by(name, config, files, settings),
        warning=warning,
        compiled=compiled,
    )


def _processor_template(files: ModelFiles) -> str | None:
    """The template of a multimodal model's processor, where that is a file of its own."""
    if files.listing.isdisjoint(("preprocessor_config.json", "processor_config.json")):
        return None
    text = files.parsed("chat_template.json").get("chat_template")
    return text if isinstance(text, str) else None


def _rendered_by(
    name: str, config: dict, files: ModelFiles, settings: ModelsSettings
) -> str | None:
    if name in settings.engine_renders:
        return "a renderer of its own, by this service's settings"
    if config.get("model_type") == "gpt_oss":
        return "harmony"
    for architecture in config.get("architectures") or ():
        if architecture in _RENDERED_BY_ENGINE:
            return _RENDERED_BY_ENGINE[architecture]
    # vLLM's own test: Mistral's weight format together with Mistral's tokenizer.
    if any(fnmatch(file, "consolidated*.safetensors") for file in files.listing) and any(
        file == "tekken.json" or file.startswith("tokenizer.model.v") for file in files.listing
    ):
        return "mistral-common"
    return None


def _rebuilt(config: dict, tokenizer_config: dict, tokenizer: str) -> str | None:
    tokenizer_class = str(tokenizer_config.get("tokenizer_class"))
    if config.get("model_type") not in _REBUILT.get(tokenizer_class, ()):
        return None
    if tokenizer_class != "GPT2Tokenizer" and '"ByteLevel"' in tokenizer:
        return None  # transformers 5 sees that the class does not fit, and leaves the file as is
    return (
        f"AutoTokenizer rebuilds {tokenizer_class}, so an engine's ids can differ from "
        "tokenizer.json's"
    )
