"""Model files come from folders, the hub's cache and the hub, and fail by name."""

import asyncio
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.model_files import check_name
from deployments.models import ModelStore, load_model
from deployments.settings import ModelsSettings
from kvcore.errors import (
    HubBusyError,
    HubError,
    HubTimeoutError,
    ModelDamagedError,
    ModelError,
    ModelForbiddenError,
    ModelNotFoundError,
    ModelUnsupportedError,
)
from tests.hub import COMMIT, FILES, MODEL, Hub, write_folder


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
        ("config.json", b"[" * 100_000, ModelDamagedError),
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
        folder = write_folder(tmp_path / "m", files)
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
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True,
        timeout=60,
    )  # fmt: skip
    assert "switched off" in done.stdout


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


def test_local_folders_and_the_hub_caches_layout_are_found(tmp_path):
    """Air-gapped sites bring their models in by hand, in one form or the other."""
    write_folder(tmp_path / "plain" / MODEL)
    cached = tmp_path / "cache" / "models--some-org--cached"
    write_folder(cached / "snapshots" / COMMIT)
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
