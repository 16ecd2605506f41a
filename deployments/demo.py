"""The tour of a running service: four phases, every figure from the service's own answers.

Prompts begin with a number that is drawn anew, so that no pod has seen them before.
"""

import os
import secrets
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import orjson

from deployments.demo_client import Answer, Client, EventFeed, TourError
from deployments.demo_screen import Screen, clipped

_READY_S = 60.0  # a service that says it is starting may take this long
_CATCH_UP_S = 5.0  # for the index to follow what an engine just did
_EVENT_S = 2.0  # for one published event
_POLL_S = 0.02
_MIN_BLOCKS = 3  # a prompt of fewer would show little
_MAX_BARS = 8
_MAX_TOKENS = 24

_SENTENCES = (
    "The quick brown fox jumps over the lazy dog near the river bank.",
    "A cache keeps what was computed once, so that nobody computes it again.",
    "Every engine tells which blocks it holds, and the index follows each of them.",
)
_CONTINUED = "Then it turns around and runs all the way back home."
_SYSTEM = "You are the guide of a small museum of caches. Answer in one sentence."
_QUESTIONS = (
    "What is a block of a KV cache?",
    "Which pod should get the next prompt, then?",
    "What happens to a block that nobody asks for?",
    "So a long chat gets cheaper with every turn?",
)
_PROMPT = {"prompt": "The quick brown fox jumps over the lazy dog."}
_CHAT = {"messages": [{"role": "user", "content": "Hello!"}]}
_POSTS = (
    ("/score_completions", "which pod holds how much of a prompt", _PROMPT),
    ("/v1/completions", "the same, then served by the best pod", _PROMPT),
    ("/v1/chat/completions", "a chat, rendered, scored and served", _CHAT),
    ("/render", "the text that a chat becomes", _CHAT),
    ("/tokenize", "the ids of a prompt or chat", _PROMPT),
)
_GETS = (
    ("/health", "whether the process answers"),
    ("/ready", "whether prompts can be scored"),
    ("/v1/models", "models known and where they came from"),
    ("/pods", "each pod: blocks, last event, lag, state"),
)


def main(url: str, events: str) -> int:
    """Walk through the service at ``url``, listening at ``events``; return an exit status."""
    feed = EventFeed(events)
    try:
        client = Client(url)
        try:
            Tour(client, feed, Screen(sys.stdout, os.environ)).run()
        finally:
            client.close()
    except TourError as error:
        print(f"kvatlas demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `kvatlas demo | head`; the exit must not flush into it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    finally:
        feed.close()
    return 0


class Tour:
    """One walk; it remembers what was said once."""

    def __init__(self, client: Client, feed: EventFeed, screen: Screen) -> None:
        self._client, self._feed, self._screen = client, feed, screen
        self._run = secrets.token_hex(3)
        self._n_requests, self._n_events = 0, 0
        self._told: set[tuple[str, str | None]] = set()
        self._event_patience_s = _EVENT_S
        self._pods: list[str] = []
        self._block_size = 0

    def run(self) -> None:
        """Show all four phases; raises TourError where the service does not play along."""
        self._show_start()
        self._show_scoring()
        self._show_chat()
        self._show_api()

    # --- 1 --------------------------------------------------------------------------

    def _show_start(self) -> None:
        say = self._screen.say
        self._screen.title("1. Initialization")
        ready = self._wait_until_ready()
        models, pods = self._client.get("/v1/models").body, self._client.get("/pods").body
        if not all(isinstance(body.get("data", body.get("pods")), list) for body in (models, pods)):
            raise TourError(f"what answers at {self._client.url} is not kvatlas")
        index = ready.body.get("index") or {}
        say(
            f"{self._client.url} is {ready.body.get('status')}: its index holds "
            f"{index.get('blocks')} blocks of {index.get('pods')} pods."
        )
        for model in models["data"]:
            say(f"model {model['id']} ({model.get('source') or 'not loaded yet'})")
        self._block_size = pods["block_size"]
        say(f"A block is {self._block_size} tokens. The pods, as the index knows them:")
        self._screen.line()
        self._show_pods(pods["pods"])
        self._pods = list(dict.fromkeys(pod["pod"] for pod in pods["pods"]))
        self._screen.line()
        problem = self._feed.connect(_EVENT_S)
        if problem is None:
            say(f"Subscribed to what the service publishes at {self._feed.endpoint}.")
        else:
            say(f"{problem}. The tour goes on without published events.")
            self._event_patience_s = 0.0

    def _wait_until_ready(self) -> Answer:
        deadline, is_said = time.monotonic() + _READY_S, False
        while True:
            ready = self._client.get("/ready")
            if ready.status == 200:
                return ready
            if ready.body.get("status") != "starting":
                raise TourError(f"GET /ready at {self._client.url} answered {ready.status}")
            if time.monotonic() > deadline:
                raise TourError(f"the service is still starting after {_READY_S:.0f} s")
            if not is_said:
                self._screen.say("The service is starting; waiting for it ...")
                is_said = True
            time.sleep(0.5)

    def _show_pods(self, pods: list[dict[str, Any]]) -> None:
        line = self._screen.line
        line(f"    {'pod':16} {'state':10} {'blocks':>8} {'last event':>10} {'lag':>9}")
        for pod in pods:
            name = pod["pod"] if not pod["rank"] else f"{pod['pod']} rank {pod['rank']}"
            seq = "none" if pod["last_seq"] is None else pod["last_seq"]
            lag = "-" if pod["lag_s"] is None else f"{pod['lag_s'] * 1e3:.1f} ms"
            state, blocks = clipped(pod["state"], 10), pod["blocks"]
            line(f"    {clipped(name, 16):16} {state:10} {blocks:>8} {seq:>10} {lag:>9}")
            if pod["reason"]:
                self._screen.say(pod["reason"], indent=6)

    # --- 2 --------------------------------------------------------------------------

    def _show_scoring(self) -> None:
        say = self._screen.say
        self._screen.title("2. Regular scoring")
        say(
            "Each prompt is scored, served by the fleet (POST /v1/completions), and scored "
            "again. A bar is the part of its blocks that a pod holds, from the start on. "
            "Times are those of POST /score_completions; they include HTTP."
        )
        times = self._times_to_fill(_SENTENCES[0])
        if times > 1:
            say(
                f"A sentence is shorter than {_MIN_BLOCKS} blocks of {self._block_size} tokens, "
                f"so each is repeated {times} times."
            )
        prompts = [f"{secrets.token_hex(4)}: {' '.join([s] * times)}" for s in _SENTENCES]
        for i, prompt in enumerate(prompts, 1):
            self._screen.line()
            say(f'Prompt {i}, before: "{clipped(prompt, 120)}"')
            self._show_score(self._score(prompt))
        self._screen.line()
        say("All three are sent at once, so that equal scores are parted by load.")
        served = self._serve_together(prompts)
        for i, (prompt, answer) in enumerate(zip(prompts, served, strict=True), 1):
            self._screen.line()
            self._show_routing(f"Prompt {i} went to", answer, indent=2)
            self._show_score(self._score_after(prompt, answer))
        longer = f"{prompts[0]} {' '.join([_CONTINUED] * times)}"
        self._screen.line()
        say(f'Prompt 4 begins as prompt 1 and goes on: "... {_CONTINUED}"')
        self._show_score(self._score(longer))
        answer = self._complete(self._client, longer, self._next_id())
        self._screen.line()
        self._show_routing("Prompt 4 went to", answer, indent=2)
        self._show_score(self._score_after(longer, answer))

    def _times_to_fill(self, sentence: str) -> int:
        n_tokens = self._client.post("/tokenize", {"prompt": sentence}).body["count"]
        return -(-_MIN_BLOCKS * self._block_size // max(1, n_tokens))

    def _score(self, prompt: str, **more: Any) -> Answer:
        body = {"prompt": prompt, **more}
        return self._client.post("/score_completions", body, self._next_id())

    def _complete(self, client: Client, prompt: str, request_id: str) -> Answer:
        body = {"prompt": prompt, "max_tokens": _MAX_TOKENS}
        return client.post("/v1/completions", body, request_id)

    def _serve_together(self, prompts: list[str]) -> list[Answer]:
        def serve(prompt: str, request_id: str) -> Answer:
            client = Client(self._client.url)
            try:
                return self._complete(client, prompt, request_id)
            finally:
                client.close()

        ids = [self._next_id() for _ in prompts]
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(serve, prompts, ids))

    def _score_after(self, prompt: str, served: Answer, **more: Any) -> Answer:
        """Score a prompt once the pod's events are in the index, or say that they are not."""
        pod, started = served.pod, time.monotonic()

        def is_known(answer: Answer) -> bool:
            return pod is None or answer.held_blocks().get(pod, 0) >= answer.body["n_blocks"]

        answer = _poll(lambda: self._score(prompt, **more), is_known)
        if not is_known(answer):
            waited_s = time.monotonic() - started
            self._screen.say(f"{pod}'s events are not in the index after {waited_s:.0f} s.", 4)
        return answer

    # --- 3 --------------------------------------------------------------------------

    def _show_chat(self) -> None:
        say = self._screen.say
        self._screen.title("3. Chat completions")
        say(
            "One chat, turn by turn: rendered, scored, sent to the pod with the best score. "
            "Bars show the turn's prompt before it was served. Times are those of POST "
            "/render and POST /score_completions; they include HTTP. Simulated engines draw "
            "their words by chance."
        )
        system = " ".join([_SYSTEM] * self._times_to_fill(_SYSTEM))
        messages = [{"role": "system", "content": f"{self._run}: {system}"}]
        turns: list[tuple[int | None, int]] = []
        for number, question in enumerate(_QUESTIONS, 1):
            self._screen.line()
            say(f"Turn {number}, user: {question}")
            messages.append({"role": "user", "content": question})
            served = self._show_turn(messages)
            reply = served.body["choices"][0]["message"]
            name = served.pod or "kvatlas"
            content = reply.get("content") or ""
            say(f'{name} answers: "{clipped(content, 200)}"', indent=4)
            messages.append({"role": "assistant", "content": content})
            turns.append((served.cached_tokens(), served.body["usage"]["prompt_tokens"]))
        if not any(cached is None for cached, _ in turns):
            self._screen.line()
            say("What the engines reported as cached, turn by turn:")
            for number, (cached, n_tokens) in enumerate(turns, 1):
                self._screen.bar(f"turn {number}", cached or 0, n_tokens, "tokens")

    def _show_turn(self, messages: list[dict[str, str]]) -> Answer:
        rendered = self._client.post("/render", {"messages": messages})
        text = rendered.body["prompt"]
        before = self._score(text, add_special_tokens=False)  # the template writes its own
        self._show_score(before, f"render {rendered.took_ms:.1f} ms, ", is_event_shown=False)
        request_id = self._next_id()
        body = {"messages": messages, "max_tokens": _MAX_TOKENS}
        served = self._client.post("/v1/chat/completions", body, request_id)
        headers = served.headers
        self._tell_mode(headers.get("x-kvatlas-mode", "unknown"), headers.get("x-kvatlas-reason"))
        self._show_routing("Sent to", served)
        self._show_event(request_id)
        self._score_after(text, served, add_special_tokens=False)
        self._wait_for_answer_blocks(served.pod)
        return served

    def _wait_for_answer_blocks(self, pod: str | None) -> None:
        """Wait, within bounds, until no event of a pod came between two looks at it."""
        seen: list[object] = [None]

        def is_quiet(answer: Answer) -> bool:
            now = [(p["rank"], p["last_seq"]) for p in answer.body["pods"] if p["pod"] == pod]
            seen.append(now)
            return seen[-1] == seen[-2]

        _poll(lambda: self._client.get("/pods"), is_quiet)

    # --- 4 --------------------------------------------------------------------------

    def _show_api(self) -> None:
        line, url = self._screen.line, self._client.url
        self._screen.title("4. The API that is up")
        self._screen.say("Status is what each route answered to this tour.")
        kind = "-H 'content-type: application/json'"
        for path, purpose, body in _POSTS:
            line()
            line(f"  {self._client.statuses[f'POST {path}']}  POST {path}: {purpose}")
            line(f"    curl -s {url}{path} \\")
            line(f"      {kind} \\")
            line(f"      -d '{orjson.dumps(body).decode()}'")
        line()
        for path, purpose in _GETS:
            line(f"  {self._client.get(path).status}  GET {path}: {purpose}")
            line(f"    curl -s {url}{path}")
        line()
        line("  not tried, as they change the service: POST /pods, DELETE /pods/{name}")
        line(f"    curl -s -X DELETE {url}/pods/NAME")
        line()
        self._summarize_events()

    def _summarize_events(self) -> None:
        feed = self._feed
        if not feed.n_arrived:
            self._screen.say(f"No published event arrived from {feed.endpoint}.")
            return
        unread = f", {feed.n_unreadable} of them unreadable" if feed.n_unreadable else ""
        self._screen.say(
            f"Published events received from {feed.endpoint}: {feed.n_arrived}{unread}; "
            f"{self._n_events} are shown above."
        )

    # --- drawing --------------------------------------------------------------------

    def _show_score(self, answer: Answer, also: str = "", *, is_event_shown: bool = True) -> None:
        body, screen = answer.body, self._screen
        self._tell_mode(body["mode"], body["reason"])
        n_blocks, held = body["n_blocks"], answer.held_blocks()
        size = f"{body['n_tokens']} tokens, {n_blocks} blocks"
        screen.say(f"{also}score {answer.took_ms:.1f} ms; {size}", 4)
        pods = list(dict.fromkeys([*self._pods, *held]))
        shown = sorted(pods, key=lambda pod: -held.get(pod, 0))[:_MAX_BARS]
        for pod in pods:
            if pod in shown:
                screen.bar(pod, held.get(pod, 0), n_blocks, "blocks")
        if len(pods) > len(shown):
            screen.say(f"and {len(pods) - len(shown)} more pods that hold no more than these", 4)
        if is_event_shown:
            self._show_event(body["request_id"])

    def _show_routing(self, what: str, answer: Answer, indent: int = 4) -> None:
        headers, pod = answer.headers, answer.pod
        if pod is None:
            self._screen.say("No engine is configured: kvatlas answered by itself.", indent)
            return
        reported = answer.cached_tokens()
        said = "did not report any" if reported is None else f"reported {reported}"
        n_tokens = answer.body["usage"]["prompt_tokens"]
        self._screen.say(
            f"{what} {pod}: predicted {headers.get('x-kvatlas-predicted-cached-tokens')} cached "
            f"tokens of {n_tokens}, its engine {said} (answer {answer.took_ms:.0f} ms).",
            indent,
        )
        if failed := headers.get("x-kvatlas-failed-over-from"):
            self._screen.say(f"Could not be reached before: {failed}", indent)

    def _show_event(self, request_id: str) -> None:
        event = self._feed.wait_for(request_id, self._event_patience_s)
        if event is None:
            if self._event_patience_s:
                self._screen.say(
                    f"No published event arrived within {_EVENT_S:.0f} s; the tour goes on.", 4
                )
            self._event_patience_s = 0.0  # a silent subscriber is waited for once
            return
        self._n_events += 1
        scores = ", ".join(f"{pod} {score}" for pod, score in event.scores.items()) or "none"
        self._screen.say(f"published: {event.topic} seq {event.seq}", 4)
        self._screen.say(f"request {event.request_id}, scores: {scores}", 6)

    def _tell_mode(self, mode: str, reason: str | None) -> None:
        """Say a mode with its reason the first time that an answer has it."""
        if (mode, reason) in self._told:
            return
        self._told.add((mode, reason))
        self._screen.say(f"Mode {mode}: {reason}." if reason else f"Mode {mode}.", 4)

    def _next_id(self) -> str:
        self._n_requests += 1
        return f"demo-{self._run}-{self._n_requests}"


def _poll(ask: Callable[[], Answer], is_enough: Callable[[Answer], bool]) -> Answer:
    deadline = time.monotonic() + _CATCH_UP_S
    while not is_enough(answer := ask()) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return answer
