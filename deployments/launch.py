"""Run one configuration in the foreground: Ray, Serve, and an orderly end.

``serve run CONFIG`` by hand does the same on Ray's defaults. What this adds is the
set-up that Serve cannot set for itself, because Ray reads it when it starts.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import yaml

from deployments.preflight import find_problems
from deployments.settings import Settings, with_environment

_READY_TIMEOUT_S = 240.0
_SERVE_STOP_TIMEOUT_S = 25.0
_RAY_STOP_TIMEOUT_S = 15.0
# The controller answers its shutdown by ending, which the raylet takes for a failure (Ray 2.60).
_FALSE_ALARM = b"Task ServeController.graceful_shutdown failed"


class LaunchError(Exception):
    """The service did not start; the message is for the person at the terminal."""


def ray_environment(scratch: Path) -> dict[str, str]:
    """Return what Ray reads at its start to be fast, observable and on loopback.

    Args:
        scratch: A short path for HAProxy's files; its sockets allow 97 characters.
    """
    tools = Path(sys.executable).parent  # where the dashboard finds py-spy
    return {
        "PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_LOG_TO_STDERR": "1",  # throughput mode hides the replicas' words
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(tools / "kvatlas-haproxy"),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(scratch / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(scratch / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(scratch / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(scratch),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(scratch / "server-state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(_free_port(8404)),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(_free_port(9101)),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(_free_port(8500)),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(64 << 20),
        "RAY_DASHBOARD_ENABLE_PROFILING": "1",
        "RAY_worker_niceness": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_DEDUP_LOGS": "0",
    }


class Service:
    """A Ray head and a ``serve run``, both children of this process.

    Children get sessions of their own, so that Ctrl+C reaches only us and the end is in
    order: Serve first, which closes sockets and flushes events, then Ray.
    """

    def __init__(
        self,
        config: Path,
        *,
        say: Callable[[str], None],
        ray_dir: Path | None = None,
        is_fast: bool = True,
    ) -> None:
        """Take a Serve config; ``is_fast=False`` leaves Serve on its defaults, to compare."""
        self._config_text = yaml.safe_load(config.read_text())
        self._config_path, self._say, self._ray_dir = config, say, ray_dir
        self._is_fast = is_fast
        self._scratch = Path(tempfile.mkdtemp(prefix="kvatlas-"))
        self._ray: subprocess.Popen[bytes] | None = None
        self._serve: subprocess.Popen[bytes] | None = None
        self._words: threading.Thread | None = None
        self.settings = read_settings(self._config_text)
        options = self._config_text.setdefault("http_options", {})
        self.http_port = int(os.environ.get("HTTP_PORT") or options.get("port") or 8000)
        options["port"] = self.http_port
        self.url = f"http://127.0.0.1:{self.http_port}"
        self._ray_port, self.dashboard_port = _free_port(6379), _free_port(8265)

    @property
    def ray_address(self) -> str:
        """Return where a driver connects to this cluster."""
        return f"127.0.0.1:{self._ray_port}"

    def start(self) -> None:
        """Start Ray and Serve and return once a prompt can be scored.

        Raises:
            LaunchError: In a sentence, what is missing or went wrong.
        """
        problems = find_problems([(self.http_port, "the HTTP API"), *self.settings.ports()])
        if problems:
            raise LaunchError("\n".join(problems))
        fast = ray_environment(self._scratch)
        if not self._is_fast:
            fast = {name: fast[name] for name in fast if not name.startswith("RAY_SERVE_")}
        environment = {**os.environ, **fast}
        self._say(f"starting Ray (log: {self._scratch / 'ray.log'})")
        self._start_ray(environment)
        self._say(f"starting Serve with {self._config_path}")
        effective = self._scratch / self._config_path.name
        effective.write_text(yaml.safe_dump(self._config_text))
        self._serve = subprocess.Popen(  # noqa: S603 - our own words and file
            [_tool("serve"), "run", str(effective), "--address", self.ray_address],
            env=environment, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._words = threading.Thread(target=_relay, args=(self._serve.stdout,), daemon=True)
        self._words.start()
        self._wait(self._is_ready, self._serve, "the service", _READY_TIMEOUT_S)

    def wait(self) -> None:
        """Block until Serve is shut down from elsewhere, or its process ends."""
        while self._serve is not None and self._serve.poll() is None:
            time.sleep(1.0)
            if self._applications() == {}:
                self._say("Serve was shut down")
                return

    def stop(self) -> None:
        """End Serve, then Ray, then remove our scratch files; safe to repeat."""
        if self._serve is not None:
            self._say("stopping Serve: sockets close, the last events are flushed")
            _end(self._serve, signal.SIGINT, _SERVE_STOP_TIMEOUT_S)
            if self._words is not None:
                self._words.join(5.0)  # its last words are still to be shown
            self._serve = None
        if self._ray is not None:
            self._say("stopping Ray")
            _end(self._ray, signal.SIGTERM, _RAY_STOP_TIMEOUT_S)
            self._ray = None
            for pid in _processes_naming(str(self._scratch)):  # HAProxy outlives a killed Ray
                os.kill(pid, signal.SIGKILL)
            _forget_cluster(self.ray_address)
            self._say("stopped")
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _start_ray(self, environment: dict[str, str]) -> None:
        log = self._scratch / "ray.log"
        command = [
            _tool("ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1",
            f"--port={self._ray_port}", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self.dashboard_port}",
            f"--ray-client-server-port={_free_port(10001)}",
            f"--dashboard-agent-listen-port={_free_port(52365)}",
            f"--num-cpus={max(4, os.cpu_count() or 1)}", f"--object-store-memory={128 << 20}",
            "--disable-usage-stats",
        ]  # fmt: skip
        if self._ray_dir is not None:
            command.append(f"--temp-dir={self._ray_dir}")
        with log.open("wb") as output:
            self._ray = subprocess.Popen(  # noqa: S603 - our own words
                command, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        try:
            self._wait(lambda: b"Ray runtime started" in log.read_bytes(), self._ray, "Ray", 90.0)
        except LaunchError as error:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
            raise LaunchError(f"{error}\n{tail}") from error

    def _wait(
        self,
        ready: Callable[[], bool],
        child: "subprocess.Popen[bytes]",
        what: str,
        timeout_s: float,
    ) -> None:
        deadline = time.monotonic() + timeout_s
        while not ready():
            if child.poll() is not None:
                raise LaunchError(
                    f"{what} ended with exit code {child.returncode} before it was up"
                )
            failed = self._failed_application() if what == "the service" else None
            if failed:
                raise LaunchError(f"Serve could not deploy the application: {failed}")
            if time.monotonic() > deadline:
                raise LaunchError(f"{what} was not up after {timeout_s:.0f} s")
            time.sleep(0.2)

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/ready", timeout=2) as answer:  # noqa: S310 - our own http URL
                return answer.status == 200
        except (OSError, urllib.error.URLError):
            return False

    def _applications(self) -> dict[str, dict[str, str]] | None:
        url = f"http://127.0.0.1:{self.dashboard_port}/api/serve/applications/"
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return json.load(answer)["applications"]
        except (OSError, ValueError, KeyError):
            return None

    def _failed_application(self) -> str | None:
        for app in (self._applications() or {}).values():
            if app["status"] == "DEPLOY_FAILED":
                return app["message"]
        return None


def read_settings(config: dict[str, object]) -> Settings:
    """Return the validated ``args`` of a Serve config's first application.

    Raises:
        pydantic.ValidationError: Naming each unknown or wrong key.
    """
    applications = config.get("applications")
    arguments = applications[0].get("args") if isinstance(applications, list) else None
    return with_environment(Settings.model_validate(arguments or {}), os.environ)


@contextmanager
def running(config: Path, **options: Callable[[str], None] | Path) -> Iterator[Service]:
    """Run a configuration for the length of a ``with`` block."""
    service = Service(config, **options)  # type: ignore[arg-type] # the two options of Service
    try:
        service.start()
        yield service
    finally:
        service.stop()


def _tool(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def _free_port(preferred: int) -> int:
    """Return the preferred port, or one that the system picks where it is taken."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            # As servers do: a port whose last user has just gone is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise LaunchError("no TCP port is free on 127.0.0.1")


def _relay(lines: IO[bytes]) -> None:
    """Show what Serve prints, but for an alarm that its orderly end always raises."""
    with lines:
        for line in lines:
            if _FALSE_ALARM not in line:
                sys.stdout.buffer.write(line)
                sys.stdout.flush()


def _processes_naming(scratch: str) -> list[int]:
    """Return the processes that were started with our own scratch folder as an argument."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if f"{scratch}/".encode() in entry.read_bytes():
                found.append(int(entry.parent.name))
        except OSError:  # it ended meanwhile
            continue
    return found


def _forget_cluster(address: str) -> None:
    """Remove Ray's note of its latest cluster, or the next ``serve run`` by hand waits for ours."""
    note = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray/ray_current_cluster"
    try:
        if note.read_text().strip() == address:
            note.unlink()
    except OSError:  # there is none
        return


def _end(child: "subprocess.Popen[bytes]", kind: signal.Signals, timeout_s: float) -> None:
    """Ask a child to end, and after ``timeout_s`` end the session that it leads."""
    if child.poll() is None:
        child.send_signal(kind)
        try:
            child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
