"""A wrong configuration is refused by the name of its key, before anything starts."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from deployments.launch import read_settings
from deployments.settings import FleetSettings, Settings, with_environment

_LOCAL = Path(__file__).parents[2] / "configs" / "local.yaml"


@pytest.mark.parametrize(
    ("args", "key"),
    [
        ({"blok_size": 16}, "blok_size"),
        ({"fleet": {"pods": 3}}, "fleet.pods"),
        ({"renderer": {"placement": "somewhere"}}, "renderer.placement"),
        (
            {"renderer": {"default_template_kwargs": {"tools": []}}},
            "renderer.default_template_kwargs",
        ),
        ({"events": {"pods": [{"name": "a", "event": "tcp://x"}]}}, "events.pods.0.event"),
        ({"block_size": 0}, "block_size"),
        ({"index": {"tier_weights": {"gpu": 2}}}, "index.tier_weights.gpu"),
    ],
)
def test_a_wrong_key_or_value_is_named(args, key):
    """The operator reads which line to mend."""
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate(args)
    assert ".".join(map(str, caught.value.errors()[0]["loc"])) == key


@pytest.mark.parametrize("args", [{"events": {"block_size": 16}}, {"models": {"default": "x"}}])
def test_nothing_is_said_twice(args):
    """Two places for one value would disagree one day, and then every score is wrong."""
    with pytest.raises(ValidationError, match="at the top"):
        Settings.model_validate(args)


def test_the_originals_environment_variables_keep_working():
    """MODEL_NAME and BLOCK_SIZE win over the file and are checked like it."""
    settings = with_environment(Settings(), {"MODEL_NAME": "a/b", "BLOCK_SIZE": "32"})
    assert (settings.model, settings.block_size) == ("a/b", 32)
    assert with_environment(Settings(block_size=8), {"BLOCK_SIZE": ""}).block_size == 8
    with pytest.raises(ValidationError):
        with_environment(Settings(), {"BLOCK_SIZE": "many"})


def test_the_defaults_are_the_originals():
    """Granite and blocks of 256, unless the file says otherwise."""
    settings = Settings()
    assert (settings.model, settings.block_size) == ("ibm-granite/granite-3.3-2b-instruct", 256)
    assert settings.model_store.default == settings.subscriber.default_model == settings.model


def test_the_shipped_configuration_is_valid_and_binds_loopback_only():
    """What `make run` starts must not be reachable from elsewhere."""
    document = yaml.safe_load(_LOCAL.read_text())
    settings = read_settings(document)
    assert document["http_options"]["host"] == "127.0.0.1"
    endpoints = [settings.publisher.endpoint, settings.publisher.replay_endpoint]
    for pod in settings.subscriber.pods:
        endpoints += [pod.events, pod.replay, pod.url]
    assert all("//127.0.0.1:" in (endpoint or "") for endpoint in endpoints)
    ports = [port for port, _ in settings.ports()]
    assert len(ports) == len(set(ports)) == 3 * 3 + 2


def test_the_fleet_is_configured_as_real_pods_are():
    """The index learns of simulated engines by the same entries."""
    pods = FleetSettings(n_pods=2, first_http_port=1000).pods("m")
    assert [(pod.name, pod.url) for pod in pods] == [
        ("pod-1", "http://127.0.0.1:1000"),
        ("pod-2", "http://127.0.0.1:1001"),
    ]
