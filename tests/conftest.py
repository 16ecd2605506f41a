"""One Ray instance for all end-to-end tests: started once, ended by name of its processes."""

import shutil
import tempfile
from pathlib import Path

import pytest
import yaml

from deployments.launch import running
from tests.ports import free_ports

_N_PODS = 3


def _configuration(scratch: Path) -> dict:
    """Two applications over one fleet: everything inline at ``/``, apart at ``/apart``."""
    first = free_ports(3 * _N_PODS + 4)
    http, events, replay, own = (first + i * _N_PODS for i in range(4))
    fleet = {
        "n_pods": _N_PODS, "capacity_blocks": 96, "first_http_port": http,
        "first_event_port": events, "first_replay_port": replay,
        "prefill_us_per_token": 0, "decode_ms_per_token": 0, "max_output_tokens": 12,
    }  # fmt: skip
    pods = [
        {
            "name": f"pod-{i + 1}", "url": f"http://127.0.0.1:{http + i}",
            "events": f"tcp://127.0.0.1:{events + i}", "replay": f"tcp://127.0.0.1:{replay + i}",
        }
        for i in range(_N_PODS)
    ]  # fmt: skip
    publisher = {
        "endpoint": f"tcp://127.0.0.1:{own}",
        "replay_endpoint": f"tcp://127.0.0.1:{own + 1}",
    }
    main = {"block_size": 4, "models": {"use_hub": False}}
    index = {"snapshot_path": str(scratch / "kept" / "index"), "snapshot_interval_s": 1}
    apart = {"renderer": {"placement": "deployment"}, "tokenizer": {"placement": "deployment"}}
    build = "deployments.app:build"
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": own + 2},
        "logging_config": {"enable_access_log": False},
        "applications": [
            {
                "name": "kvatlas", "route_prefix": "/", "import_path": build,
                "args": {**main, "publisher": publisher, "fleet": fleet, "index": index},
            },
            {
                "name": "apart", "route_prefix": "/apart", "import_path": build,
                "args": {**main, **apart, "events": {"pods": pods}},
            },
        ],
    }  # fmt: skip


@pytest.fixture(scope="session")
def service():
    """The running service; its Ray logs are printed where it does not start."""
    scratch = Path(tempfile.mkdtemp(prefix="kva-"))  # short: Ray's sockets live below it
    config = scratch / "test.yaml"
    config.write_text(yaml.safe_dump(_configuration(scratch)))
    try:
        with running(config, say=print, ray_dir=scratch / "ray") as started:
            yield started
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
