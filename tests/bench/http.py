"""Requests/s of ``/score_completions`` beside a bare app: ``python -m tests.bench.http``.

Every set-up answers the same 64 prompts of 600 tokens, of which a fleet of three engines
holds half, a third and a sixth. The bare app (`tests.bench.http_bare`) lives through the
whole run and takes turns with each set-up, round by round: "of bare" is the median of the
ratios within a round, which a noisy machine disturbs least.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from deployments.launch import Service
from deployments.settings import Settings
from kvcore.tokenization import PromptTokenizer
from tests.ports import free_ports

ROOT = Path(__file__).parents[2]
EMBEDDED = ROOT / "deployments/embedded"
N_PROMPTS, N_TOKENS, BLOCK_SIZE = 64, 600, 16
HELD_BLOCKS = {"pod-1": 18, "pod-2": 12, "pod-3": 6}  # of the 37 in each prompt
CONNECTIONS = (1, 32)
SET_UPS = {  # name: (the fast ingress that `make run` starts, renderer's and tokenizer's place)
    "HAProxy, inline": (True, "inline"),
    "HAProxy, deployments": (True, "deployment"),
    "default proxy, inline": (False, "inline"),
    "default proxy, deployments": (False, "deployment"),
}
WARM_UP_S, START_TIMEOUT_S, FILL_TIMEOUT_S = 0.3, 120.0, 20.0

Result = dict[str, float]  # of http_load.run
Rounds = dict[int, list[tuple[Result, Result]]]  # by connections: the bare app's, the set-up's


def make_prompts() -> list[str]:
    """Draw prompts of 600 words that are one token each."""
    text = (EMBEDDED / "tokenizer.json").read_text()
    pieces = sorted(json.loads(text)["model"]["vocab"])
    words = [" " + piece[1:] for piece in pieces if re.fullmatch("Ġ[a-z]{3,}", piece)]
    chance = random.Random(7)
    prompts = ["".join(chance.choices(words, k=N_TOKENS)) for _ in range(N_PROMPTS)]
    tokenizer = PromptTokenizer(text)
    lengths = {len(tokenizer.encode(prompt, add_special_tokens=True)) for prompt in prompts}
    if lengths != {N_TOKENS}:
        raise RuntimeError(f"prompts have {lengths} tokens instead of {N_TOKENS}")
    return prompts


def make_config(folder: Path, placement: str) -> tuple[Path, int]:
    """Write local.yaml with engines that do not wait and ports that are free."""
    config = yaml.safe_load((ROOT / "configs/local.yaml").read_text())
    port = free_ports(12)
    config["http_options"]["port"] = port
    arguments = config["applications"][0]["args"]
    arguments.update(
        model="embedded",
        models={"folders": {"embedded": str(EMBEDDED)}, "use_hub": False},
        block_size=BLOCK_SIZE,
        renderer={"placement": placement},
        tokenizer={"placement": placement},
    )
    arguments["publisher"] = {
        "endpoint": f"tcp://127.0.0.1:{port + 1}",
        "replay_endpoint": f"tcp://127.0.0.1:{port + 2}",
    }
    arguments["fleet"].update(
        n_pods=len(HELD_BLOCKS), prefill_us_per_token=0, decode_ms_per_token=0,
        first_http_port=port + 3, first_event_port=port + 6, first_replay_port=port + 9,
    )  # fmt: skip
    path = folder / f"{port}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path, port


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """Post JSON and return what comes back."""
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)  # our own
    with urllib.request.urlopen(request, timeout=30) as answer:  # our own
        return json.load(answer)


def fill(config: Path, port: int, prompts: list[str]) -> None:
    """Let each engine compute its share of every prompt, until the scores say so."""
    arguments = yaml.safe_load(config.read_text())["applications"][0]["args"]
    for pod in Settings.model_validate(arguments).subscriber.pods:
        n_words = HELD_BLOCKS[pod.name] * BLOCK_SIZE
        for prompt in prompts:
            start = "".join(re.findall(" [a-z]+", prompt)[:n_words])
            body = {"model": "embedded", "prompt": start, "max_tokens": 1}
            post(f"{pod.url}/v1/completions", body)
    deadline = time.monotonic() + FILL_TIMEOUT_S
    for prompt in prompts:
        while (answer := score(port, prompt))["pod_scores"] != HELD_BLOCKS:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the index never held what was served: {answer}")
            time.sleep(0.05)
        if answer["mode"] != "EXACT" or answer["n_tokens"] != N_TOKENS:
            raise RuntimeError(f"not the answer to be measured: {answer}")


def score(port: int, prompt: str) -> dict[str, Any]:
    """Ask for one prompt's scores."""
    return post(f"http://127.0.0.1:{port}/score_completions", {"prompt": prompt})


def measure(port: int, prompts: list[str], connections: int, seconds: float) -> Result:
    """Load a server from a process of its own."""
    job = {
        "port": port, "path": "/score_completions", "connections": connections,
        "bodies": [json.dumps({"prompt": prompt}) for prompt in prompts],
        "warm_up_s": WARM_UP_S, "seconds": seconds,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.http_load"], input=json.dumps(job), text=True,
        stdout=subprocess.PIPE, check=True, cwd=ROOT, timeout=seconds + 30,
    )  # fmt: skip
    return json.loads(done.stdout)


@contextlib.contextmanager
def bare_app(config: Path, port: int) -> Iterator[None]:
    """Run the bare app for the length of a ``with`` block."""
    call = [sys.executable, "-m", "tests.bench.http_bare", str(config), str(port)]
    with subprocess.Popen(call, cwd=ROOT) as child:  # our own
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not is_ready(port):
                if child.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the bare app did not start (exit {child.poll()})")
                time.sleep(0.2)
            yield
        finally:
            child.terminate()
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()


def is_ready(port: int) -> bool:
    """Ask whether a server answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


def service_rounds(
    folder: Path, name: str, bare_port: int, prompts: list[str], options: argparse.Namespace
) -> Rounds:
    """Start a set-up, measure it in turn with the bare app, and stop it."""
    is_fast, placement = SET_UPS[name]
    config, port = make_config(folder, placement)
    service = Service(config, say=lambda text: say(f"{name}: {text}"), is_fast=is_fast)
    try:
        service.start()
        fill(config, port, prompts)
        return {
            connections: [
                (
                    measure(bare_port, prompts, connections, options.seconds),
                    measure(port, prompts, connections, options.seconds),
                )
                for _ in range(options.rounds)
            ]
            for connections in CONNECTIONS
        }
    finally:
        service.stop()


def table(alone: dict[int, list[Result]], found: dict[str, Rounds]) -> Iterator[str]:
    """Yield the lines of the result."""
    yield f"{'':27}{'conn':>4}{'req/s':>8}{'min':>8}{'p50 ms':>9}{'p99 ms':>9}{'of bare':>9}"
    for connections in CONNECTIONS:
        yield row("bare app, no Ray running", connections, alone[connections])
        pairs = [pair for rounds in found.values() for pair in rounds[connections]]
        yield row("bare app, Ray idle beside", connections, [bare for bare, _ in pairs])
        for name, rounds in found.items():
            shares = [ours["per_s"] / bare["per_s"] for bare, ours in rounds[connections]]
            ours = [ours for _, ours in rounds[connections]]
            yield f"{row(name, connections, ours)}{statistics.median(shares):9.0%}"


def row(name: str, connections: int, rounds: list[Result]) -> str:
    """Return medians over rounds, and the slowest round."""
    rate, p50, p99 = (
        statistics.median(one[key] for one in rounds) for key in ("per_s", "p50_ms", "p99_ms")
    )
    slowest = min(one["per_s"] for one in rounds)
    return f"{name:27}{connections:4}{rate:8,.0f}{slowest:8,.0f}{p50:9.2f}{p99:9.2f}"


def say(text: str) -> None:
    """Tell of progress, beside the result."""
    print(f"bench-http: {text}", file=sys.stderr, flush=True)


def main() -> None:
    """Measure everything in one run and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="per set-up and connections")
    parser.add_argument("--seconds", type=float, default=2.0, help="per round")
    parser.add_argument("--only", default="", help="set-ups whose names contain this")
    options = parser.parse_args()
    names = [name for name in SET_UPS if options.only in name]
    for variable in ("HTTP_PORT", "BLOCK_SIZE", "MODEL_NAME"):  # they would override the set-ups
        os.environ.pop(variable, None)
    # A terminated run must still end what it started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    load_before, prompts = os.getloadavg()[0], make_prompts()
    found: dict[str, Rounds] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        config, port = make_config(folder, "inline")
        say("starting the bare app")
        with bare_app(config, port):
            fill(config, port, prompts)
            alone = {
                connections: [
                    measure(port, prompts, connections, options.seconds)
                    for _ in range(options.rounds)
                ]
                for connections in CONNECTIONS
            }
            for name in names:
                found[name] = service_rounds(folder, name, port, prompts, options)
    print(
        f"POST /score_completions, {N_TOKENS} tokens, {N_PROMPTS} prompts, half the blocks held.\n"
        f"{os.cpu_count()} cores ({platform.machine()}), load {load_before:.1f} before the run, "
        f"Python {platform.python_version()}, Ray {importlib.metadata.version('ray')}.\n"
        f"Medians of {options.rounds} rounds of {options.seconds:g} s for each set-up; "
        "min is the slowest round's req/s.\n"
    )
    print("\n".join(table(alone, found)))


if __name__ == "__main__":
    main()
