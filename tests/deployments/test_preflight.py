"""What would stop the service is said in one sentence, before Ray's hundred lines."""

import socket
from collections import namedtuple

from deployments import preflight
from deployments.haproxy import narrow
from deployments.preflight import find_problems


def test_a_port_in_use_is_named_with_its_purpose():
    """The sentence holds what to look for and why it is needed."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        (problem,) = find_problems([(port, "the HTTP API")])
    assert f"Port {port} is in use" in problem
    assert "the HTTP API" in problem
    assert find_problems([(port, "the HTTP API")]) == []


def test_too_little_shared_memory_is_named_with_its_cure(tmp_path, monkeypatch):
    """A container's default of 64 MB makes Ray fail in ways that do not say so."""
    usage = namedtuple("usage", "total used free")(64 << 20, 0, 64 << 20)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage)
    (problem,) = find_problems([], shm=tmp_path)
    assert "64 MB free" in problem
    assert "--shm-size" in problem


def test_haproxys_side_listeners_are_narrowed_and_nothing_else():
    """Ray 2.60 binds them to every interface and has no setting for it."""
    config = (
        "frontend prometheus\n    bind :9101\n    mode http\nfrontend http_frontend\n"
        "    bind *:8080\nlisten stats\n  bind *:8404\n  stats enable\n"
    )
    assert narrow(config) == config.replace(":9101", "127.0.0.1:9101").replace(
        "*:8404", "127.0.0.1:8404"
    )
