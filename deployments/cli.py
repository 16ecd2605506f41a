"""The ``kvatlas`` command: run a configuration, show it at work, check a machine."""

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

import yaml
from pydantic import ValidationError

from deployments import demo
from deployments.launch import LaunchError, Service, read_settings
from deployments.preflight import find_problems


def main() -> None:
    """Parse the command line and exit with its status."""
    parser = argparse.ArgumentParser(prog="kvatlas", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="start Ray and Serve with a configuration; Ctrl+C stops")
    run.add_argument("config", nargs="?", type=Path, default=Path("configs/local.yaml"))
    check = commands.add_parser("check", help="say what would keep a configuration from starting")
    check.add_argument("config", nargs="?", type=Path, default=Path("configs/local.yaml"))
    show = commands.add_parser("demo", help="walk through what the running service does")
    show.add_argument("--url", default=f"http://127.0.0.1:{os.environ.get('HTTP_PORT') or 8080}")
    show.add_argument("--events", default="tcp://127.0.0.1:5557", help="where it publishes")
    arguments = parser.parse_args()
    try:
        if arguments.command == "run":
            sys.exit(_run(arguments.config))
        if arguments.command == "check":
            sys.exit(_check(arguments.config))
        sys.exit(demo.main(arguments.url, arguments.events))
    except FileNotFoundError as error:
        sys.exit(f"kvatlas: {error.filename} does not exist")
    except ValidationError as error:
        sys.exit(_explain(error))


def _run(config: Path) -> int:
    started = time.monotonic()

    def say(line: str) -> None:
        print(f"kvatlas {time.monotonic() - started:5.1f} s  {line}", flush=True)

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    # SIGINT too: a shell that starts us in the background leaves it ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    service = Service(config, say=say)
    try:
        service.start()
        print(_banner(service), flush=True)
        service.wait()
    except LaunchError as error:
        print(f"\nkvatlas could not start.\n{error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        say("interrupted")
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):  # a second one must not leave Ray behind
            signal.signal(number, signal.SIG_IGN)
        service.stop()
    return 0


def _check(config: Path) -> int:
    document = yaml.safe_load(config.read_text())
    settings = read_settings(document)
    port = int(os.environ.get("HTTP_PORT") or (document.get("http_options") or {}).get("port", 8000))
    problems = find_problems([(port, "the HTTP API"), *settings.ports()])
    print("\n".join(problems) or f"{config} can start here.")
    return 1 if problems else 0


def _banner(service: Service) -> str:
    settings = service.settings
    prompt = "The quick brown fox jumps over the lazy dog."
    lines = [
        "",
        f"  API        {service.url}    (/score_completions, /v1/chat/completions, /pods, /ready)",
        f"  dashboard  http://127.0.0.1:{service.dashboard_port}",
    ]
    if settings.publisher.endpoint:
        lines.append(f"  events     {settings.publisher.endpoint}    (topics kv.… and kv.chat.…)")
    if settings.fleet:
        lines.append(
            f"  fleet      {settings.fleet.n_pods} simulated engines, blocks of {settings.block_size} tokens"
        )
    lines += [
        "",
        "  Try it (run `make demo` in another terminal for the tour, Ctrl+C here to stop):",
        "",
        f"  curl -s {service.url}/score_completions -H 'content-type: application/json' \\",
        f"    -d '{{\"prompt\": \"{prompt}\"}}'",
        "",
    ]
    return "\n".join(lines)


def _explain(error: ValidationError) -> str:
    lines = ["kvatlas: the configuration is not valid"]
    for problem in error.errors(include_url=False):
        key = ".".join(str(part) for part in problem["loc"]) or "args"
        kind = "unknown key" if problem["type"] == "extra_forbidden" else problem["msg"]
        lines.append(f"  {key}: {kind}")
    return "\n".join(lines)
