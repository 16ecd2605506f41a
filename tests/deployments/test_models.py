"""Models load once, give way within a budget, and the default one has a stand-in."""

import asyncio
import json
import logging
import pickle
import time

import pytest

from deployments.models import ModelStore, load_model
from deployments.settings import ModelsSettings
from kvcore import errors
from kvcore.errors import HubError, KvError, ModelNotFoundError
from tests.hub import EMBEDDED, FILES, MODEL, Hub, write_folder


@pytest.fixture
def hub():
    with Hub({MODEL: dict(FILES)}) as server:
        yield server


@pytest.fixture
def settings(hub, tmp_path):
    return ModelsSettings(
        default=MODEL, endpoint=hub.url, cache_dir=str(tmp_path / "cache"),
        hub_timeout_s=0.5, hub_retries=1, allowed=("*",), fastokens=False,
    )  # fmt: skip


def _change(settings, **changes):
    return settings.model_copy(update=changes)


def test_a_burst_loads_a_model_once(hub, settings):
    """Loading takes seconds and hundreds of megabytes."""

    async def burst():
        store = ModelStore(settings)
        return await asyncio.gather(*(store.get(MODEL) for _ in range(50)))

    models = asyncio.run(burst())
    assert len({id(model) for model in models}) == 1
    assert max(hub.asked.values()) == 1


def test_one_who_gives_up_does_not_spoil_it_for_the_others(settings):
    """A client's disconnect cancels its own wait only."""

    async def run():
        store = ModelStore(settings)
        impatient, patient = (asyncio.create_task(store.get(MODEL)) for _ in range(2))
        await asyncio.sleep(0)
        impatient.cancel()
        return await patient

    assert asyncio.run(run()).fallback_reason is None


def test_a_failed_load_is_tried_again_next_time(hub, settings):
    """A passing fault of the hub must not stick."""
    hub.trouble = {"api": 500}

    async def run():
        store = ModelStore(_change(settings, default="x/y"))
        with pytest.raises(HubError):
            await store.get(MODEL)
        hub.trouble = {}
        return await store.get(MODEL)

    assert asyncio.run(run()).name == MODEL


def test_the_embedded_model_stands_in_for_the_default_one_and_says_so(hub, settings, caplog):
    """Wrong scores without a sign are what this project is against."""
    hub.trouble = {"api": 404}

    async def run():
        store = ModelStore(settings)
        return [await store.get() for _ in range(3)]

    with caplog.at_level(logging.ERROR):
        models = asyncio.run(run())
    assert models[0].name == MODEL
    assert models[0].source == "embedded"
    assert "stands in" in str(models[0].fallback_reason)
    assert [r.message.startswith("FALLBACK") for r in caplog.records] == [True]


def test_the_default_model_takes_its_place_once_it_can_be_had(hub, settings):
    """A hub that was down at start must not mean fallback for ever."""
    now = [0.0]
    hub.trouble = {"api": 500}

    async def run():
        store = ModelStore(_change(settings, retry_after_s=60, hub_retries=0), clock=lambda: now[0])
        reasons = [(await store.get()).fallback_reason]
        hub.trouble = {}
        reasons.append((await store.get()).fallback_reason)
        now[0] = 61.0
        reasons.append((await store.get()).fallback_reason)  # starts the load, does not wait
        await asyncio.gather(*store._loading.values())
        reasons.append((await store.get()).fallback_reason)
        return reasons

    reasons = asyncio.run(run())
    assert [reason is not None for reason in reasons] == [True, True, True, False]


def test_no_model_hub_delays_the_start_by_seconds_at_most(tmp_path):
    """No network is the normal case for a first try; it must not hang."""
    settings = ModelsSettings(
        default=MODEL, endpoint="http://127.0.0.1:9", cache_dir=str(tmp_path)
    )  # port 9 refuses
    started = time.monotonic()
    model = asyncio.run(ModelStore(settings).get())
    assert "reached" in str(model.fallback_reason)
    assert time.monotonic() - started < 30  # it takes half a second; retries would take 23


def test_least_recently_used_models_go_first(tmp_path):
    """Within a budget of bytes; the default one stays."""
    names = [f"m{at}" for at in range(4)]
    folders = {name: str(write_folder(tmp_path / name)) for name in names}
    size = load_model("m0", ModelsSettings(fastokens=False, folders=folders)).size_bytes
    settings = ModelsSettings(
        fastokens=False, default="m0", folders=folders, capacity_bytes=3 * size + size // 2
    )

    async def run():
        store = ModelStore(settings)
        for name in ("m0", "m1", "m2", "m1", "m3"):
            await store.get(name)
        return {name for name, model in store.known().items() if model is not None}

    assert asyncio.run(run()) == {"m0", "m1", "m3"}


def test_only_configured_models_are_loaded_by_default(hub, settings):
    """Else anyone could fill the disk with models."""
    closed = _change(settings, allowed=(), default="other/model")
    with pytest.raises(ModelNotFoundError, match="does not exist here"):
        asyncio.run(ModelStore(closed).get(MODEL))
    assert not hub.asked


@pytest.mark.parametrize(
    ("changes", "rendered_by"),
    [
        ({}, None),
        ({"config.json": b'{"architectures": ["GptOssForCausalLM"]}'}, "harmony"),
        ({"config.json": b'{"architectures": ["DeepseekV32ForCausalLM"]}'}, "DeepSeek"),
        ({"config.json": b'{"model_type": "gpt_oss"}'}, "harmony"),
        ({"consolidated.safetensors": b"", "tekken.json": b"{}"}, "mistral-common"),
        ({"consolidated.00.pth": b"", "tekken.json": b"{}"}, None),
        ({"tekken.json": b"{}"}, None),
    ],
)
def test_models_whose_engine_bypasses_jinja_are_recognised(tmp_path, changes, rendered_by):
    """Their chats would be rendered wrongly here; their prompts can be scored."""
    folder = write_folder(tmp_path / "m", {**FILES, **changes})
    model = load_model("m", ModelsSettings(fastokens=False, folders={"m": str(folder)}))
    assert (model.rendered_by or "").split()[:1] == (rendered_by or "").split()[:1]


def test_a_processors_own_template_serves_chats_without_tools(tmp_path):
    """As in vLLM, for multimodal models whose processor was saved before chat_template.jinja."""
    own = {"chat_template.json": b'{"chat_template": "p"}'}
    processor = {**FILES, **own, "preprocessor_config.json": b"{}"}
    for name, files, expected in (("text", {**FILES, **own}, "new"), ("multi", processor, "p")):
        folder = write_folder(tmp_path / name, files)
        model = load_model(name, ModelsSettings(fastokens=False, folders={name: str(folder)}))
        assert model.template().text.split()[0] == expected
        assert model.template(tools=[]).text.split()[0] == "tools"
        assert model.choose(named="default").split()[0] == "new"


@pytest.mark.parametrize(
    ("tokenizer_class", "model_type", "warns"),
    [
        ("GPT2Tokenizer", "minimax_m1", True),
        ("LlamaTokenizer", "llama", False),  # the file is byte-level, so it is taken as it is
        ("PreTrainedTokenizerFast", "llama", False),
    ],
)
def test_a_model_that_autotokenizer_rebuilds_carries_a_warning(
    tmp_path, tokenizer_class, model_type, warns
):
    """Engines may then compute other ids than tokenizer.json says."""
    changes = {
        "tokenizer_config.json": json.dumps({"tokenizer_class": tokenizer_class}).encode(),
        "config.json": json.dumps({"model_type": model_type}).encode(),
    }
    folder = write_folder(tmp_path / "m", {**FILES, **changes})
    warning = load_model("m", ModelsSettings(fastokens=False, folders={"m": str(folder)})).warning
    assert ("rebuilds" in (warning or "")) is warns


def test_errors_survive_pickling():
    """Ray carries them between replicas by their arguments."""
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, KvError):
            n_arguments = kind.__init__.__code__.co_argcount - 1 if "__init__" in vars(kind) else 1
            error = kind(*range(n_arguments))
            again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own object
            assert (type(again), str(again)) == (kind, str(error))


def test_the_embedded_model_is_whole():
    """It ships in the package; its template renders every role, tools and calls."""
    config = json.loads((EMBEDDED / "tokenizer_config.json").read_text())
    assert config["eos_token"] == "<|im_end|>"  # noqa: S105 - no password
    model = load_model("m", ModelsSettings(fastokens=False, folders={"m": str(EMBEDDED)}))
    assert model.template().variables >= {"messages", "tools", "add_generation_prompt"}
