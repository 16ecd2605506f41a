"""Models come from folders, the hub's cache, the hub or the package, and fail by name."""

import asyncio
import json
import logging
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.model_files import check_name
from deployments.models import ModelStore, load_model
from deployments.settings import ModelsSettings
from kvcore import errors
from kvcore.errors import (
    HubBusyError,
    HubError,
    HubTimeoutError,
    KvError,
    ModelDamagedError,
    ModelError,
    ModelForbiddenError,
    ModelNotFoundError,
    ModelUnsupportedError,
)
from tests.hub import COMMIT, Hub

EMBEDDED = Path(__file__).parents[2] / "deployments" / "embedded"
FILES = {
    "tokenizer.json": (EMBEDDED / "tokenizer.json").read_bytes(),
    "tokenizer_config.json": b'{"bos_token": "<s>", "chat_template": "old"}',
    "chat_template.jinja": b"new {{ messages[0].content }}",
    "additional_chat_templates/tool_use.jinja": b"tools {{ messages[0].content }}",
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"weights",
    "modeling.py": b"code",
}
MODEL = "some-org/some-model"


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


def _folder(path, files=FILES):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def _change(settings, **changes):
    return settings.model_copy(update=changes)


# --- the hub ------------------------------------------------------------------------


def test_the_hub_is_asked_for_small_files_only(hub, settings, monkeypatch):
    """Never weights, never code; the token goes along, and the files are the model's."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    model = load_model(MODEL, settings)
    fetched = {
        path.rpartition(f"{COMMIT}/")[2] for path in hub.asked if path.startswith("GET /some")
    }
    assert fetched == set(FILES) - {"model.safetensors", "modeling.py"}
    assert hub.tokens == {"Bearer hf_secret"}
    assert model.fallback_reason is None
    assert model.special_tokens == {"bos_token": "<s>"}
    assert model.template().text.startswith("new")
    assert model.template(tools=[]).text.startswith("tools")


def test_a_second_load_comes_from_the_cache_even_without_the_hub(hub, settings):
    """A restart in an outage must not need the hub."""
    load_model(MODEL, settings)
    hub.trouble = {"api": "hang up"}
    assert "cache" in load_model(MODEL, settings).source
    assert load_model(MODEL, _change(settings, use_hub=False)).tokenizer is not None


@pytest.mark.parametrize(
    ("trouble", "error", "message"),
    [
        ({"api": 401}, ModelForbiddenError, "HF_TOKEN"),
        ({"api": 403}, ModelForbiddenError, "licence"),
        ({"api": 404}, ModelNotFoundError, "no model"),
        ({"api": 429}, HubBusyError, "rate limiting"),
        ({"api": 503}, HubBusyError, "busy"),
        ({"api": 500}, HubError, "500"),
        ({"api": "slow"}, HubTimeoutError, "in time"),
        ({"api": "hang up"}, HubError, "reached"),
        ({"tokenizer.json": 403}, ModelForbiddenError, "licence"),
        ({"tokenizer.json": "cut"}, ModelDamagedError, "incomplete"),
    ],
)
def test_each_trouble_of_the_hub_has_its_own_error(hub, settings, trouble, error, message):
    """An operator who reads it knows what to do, and HTTP gets the right status."""
    hub.trouble = trouble
    with pytest.raises(ModelError, match=message) as caught:
        load_model(MODEL, settings)
    assert type(caught.value) is error


def test_busy_hubs_are_asked_again_and_missing_models_are_not(hub, settings):
    """Retries are for what passes."""
    hub.trouble = {"api": 429}
    with pytest.raises(HubBusyError):
        load_model(MODEL, settings)
    assert hub.asked.total() == 2
    hub.trouble, hub.asked = {}, type(hub.asked)()
    with pytest.raises(ModelNotFoundError):
        load_model("some-org/unknown", settings)
    assert hub.asked.total() == 1


@pytest.mark.parametrize(
    ("file", "data", "error"),
    [
        ("tokenizer.json", b'{"model": {"type": "BPE"', ModelDamagedError),
        ("tokenizer.json", b"<html>Please log in</html>", ModelDamagedError),
        ("tokenizer_config.json", b"[]", ModelDamagedError),
        ("tokenizer_config.json", b"\xff\xfe", ModelDamagedError),
        ("config.json", b"{", ModelDamagedError),
        ("chat_template.jinja", b"{% for", ModelDamagedError),
    ],
)
def test_corrupt_files_are_named(hub, settings, file, data, error):
    """A proxy's login page in place of a file is a classic."""
    hub.models[MODEL][file] = data
    with pytest.raises(error):
        load_model(MODEL, settings)


def test_malformed_templates_in_the_config_are_an_error(tmp_path):
    """The config is foreign data like any other."""
    for bad in (b"5", b"[5]", b'[{"name": "default"}]'):
        files = {"tokenizer.json": FILES["tokenizer.json"],
                 "tokenizer_config.json": b'{"chat_template": ' + bad + b"}"}  # fmt: skip
        folder = _folder(tmp_path / "m", files)
        with pytest.raises(ModelDamagedError, match="malformed"):
            load_model("m", ModelsSettings(fastokens=False, folders={"m": str(folder)}))


def test_a_corrupt_file_does_not_stay_in_the_cache(hub, settings):
    """Once the hub is well again, so is the model."""
    hub.models[MODEL]["tokenizer.json"] = FILES["tokenizer.json"][:-1] + b" "
    with pytest.raises(ModelDamagedError):
        load_model(MODEL, settings)
    hub.models[MODEL]["tokenizer.json"] = FILES["tokenizer.json"]
    assert load_model(MODEL, settings).tokenizer is not None


def test_a_model_without_tokenizer_json_is_refused_before_anything_is_fetched(hub, settings):
    """SentencePiece-only models cannot be tokenized here."""
    del hub.models[MODEL]["tokenizer.json"]
    with pytest.raises(ModelUnsupportedError, match=r"tokenizer\.json"):
        load_model(MODEL, settings)
    assert hub.asked.total() == 1


def test_hf_hub_offline_is_obeyed_at_once(tmp_path):
    """Operators set it to keep a service from waiting for a network."""
    code = (
        "import asyncio, time\n"
        "from deployments.models import ModelStore\n"
        "from deployments.settings import ModelsSettings\n"
        f"store = ModelStore(ModelsSettings(cache_dir={str(tmp_path)!r}))\n"
        "start = time.monotonic()\n"
        "model = asyncio.run(store.get())\n"
        "print(model.fallback_reason)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(  # noqa: S603 - our own code
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True,
        timeout=60,
    )  # fmt: skip
    assert "switched off" in done.stdout


# --- the store ----------------------------------------------------------------------


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
    folders = {name: str(_folder(tmp_path / name)) for name in names}
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


# --- names and places ---------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "a/../b", "a\0b", "x" * 10_000, "", ".", "..", "a/b/c", "a b", "~/x",
     "http://x/y", "a\\b", "-a", "a/.b", "a\n", "ä/b", "models--a--b"],
)  # fmt: skip
def test_a_name_that_is_none_touches_neither_disk_nor_hub(hub, settings, tmp_path, name):
    """Names come from clients; paths and URLs are made of them."""
    searched = _change(settings, search=(str(tmp_path),), default="a/b")
    with pytest.raises(ModelNotFoundError) as caught:
        asyncio.run(ModelStore(searched).get(name or "\0"))
    assert len(str(caught.value)) < 300
    assert not hub.asked


@given(st.text(max_size=30))
def test_names_that_pass_are_harmless(name):
    """As a path below a folder and as a part of a URL."""
    try:
        check_name(name)
    except ModelNotFoundError:
        return
    assert name.isascii()
    assert ".." not in name
    assert name.count("/") <= 1
    assert not name.startswith(("/", ".", "-"))


def test_only_configured_models_are_loaded_by_default(hub, settings):
    """Else anyone could fill the disk with models."""
    closed = _change(settings, allowed=(), default="other/model")
    with pytest.raises(ModelNotFoundError, match="does not exist here"):
        asyncio.run(ModelStore(closed).get(MODEL))
    assert not hub.asked


def test_local_folders_and_the_hub_caches_layout_are_found(tmp_path):
    """Air-gapped sites bring their models in by hand, in one form or the other."""
    _folder(tmp_path / "plain" / MODEL)
    cached = tmp_path / "cache" / "models--some-org--cached"
    _folder(cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    settings = ModelsSettings(
        search=(str(tmp_path / "plain"), str(tmp_path / "cache")), use_hub=False, fastokens=False
    )
    assert load_model(MODEL, settings).special_tokens == {"bos_token": "<s>"}
    assert load_model("some-org/cached", settings).templates is not None
    pinned = _change(settings, revisions={"some-org/cached": COMMIT})
    assert load_model("some-org/cached", pinned).templates is not None
    with pytest.raises(ModelError, match="switched off"):
        load_model("some-org/absent", settings)


def test_a_configured_folder_that_is_missing_is_an_error(tmp_path):
    """Not a reason to ask the hub for a model of that name."""
    settings = ModelsSettings(fastokens=False, folders={"m": str(tmp_path / "nowhere")})
    with pytest.raises(ModelNotFoundError, match="folder"):
        load_model("m", settings)


# --- what engines do otherwise ------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "rendered_by"),
    [
        ({}, None),
        ({"config.json": b'{"architectures": ["GptOssForCausalLM"]}'}, "harmony"),
        ({"config.json": b'{"architectures": ["DeepseekV32ForCausalLM"]}'}, "DeepSeek"),
        ({"consolidated.safetensors": b"", "tekken.json": b"{}"}, "mistral-common"),
        ({"tekken.json": b"{}"}, None),
    ],
)
def test_models_whose_engine_bypasses_jinja_are_recognised(tmp_path, changes, rendered_by):
    """Their chats would be rendered wrongly here; their prompts can be scored."""
    folder = _folder(tmp_path / "m", {**FILES, **changes})
    model = load_model("m", ModelsSettings(fastokens=False, folders={"m": str(folder)}))
    assert (model.rendered_by or "").split()[:1] == (rendered_by or "").split()[:1]


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
    folder = _folder(tmp_path / "m", {**FILES, **changes})
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
