"""The whole pipeline over HTTP, with engines that page, evict and publish for real."""

import asyncio
import os
import random
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from tests.http_client import ask, wait_until

pytestmark = pytest.mark.cluster

_WORDS = ["who", "keeps", "this", "cache", "of", "blocks", "and", "where", "did", "that",
          "old", "prefix", "go", "when", "pods", "ran", "full"]  # fmt: skip
_ERROR_KEYS = {"message", "type", "param", "code"}


def _pods(service):
    return ask(f"{service.url}/pods").body["pods"]


def _catch_up(service, url=None):
    """Wait until the index has applied all that every engine has published."""
    pods = ask(f"{url or service.url}/pods").body["pods"]
    newest = {pod["pod"]: ask(f"{pod['url']}/blocks").body["last_seq"] for pod in pods}

    def is_current():
        now = ask(f"{url or service.url}/pods").body["pods"]
        return all(pod["last_seq"] == newest[pod["pod"]] for pod in now)

    wait_until(is_current, "the index did not catch up with the engines")


def _say(service, messages, **more):
    body = {"messages": messages, **more}
    answer = ask(f"{service.url}/v1/chat/completions", body)
    assert answer.status == 200, answer.raw
    return answer


def test_500_multi_turn_requests_are_predicted_exactly(service):
    """Under eviction, what we predict for the chosen pod is what its engine then reports."""
    draw = random.Random(7)
    chats: list[list[dict]] = []
    wrong, hits = [], 0
    for number in range(500):
        if not chats or draw.random() < 0.2:
            start = [
                {"role": "system", "content": f"You are guide {draw.randrange(4)} of the index."}
            ]
            chats.append(start)
        chats = chats[-12:]
        chat = draw.choice(chats)
        chat.append(
            {"role": "user", "content": " ".join(draw.choices(_WORDS, k=draw.randint(2, 9)))}
        )
        _catch_up(service)
        answer = _say(service, chat, max_tokens=draw.randint(1, 12))
        predicted = int(answer.headers["x-kvatlas-predicted-cached-tokens"])
        reported = answer.body["usage"]["prompt_tokens_details"]["cached_tokens"]
        hits += reported > 0
        if predicted != reported:
            wrong.append((number, answer.headers["x-kvatlas-pod"], predicted, reported))
        chat.append(answer.body["choices"][0]["message"])
        if len(chat) > 13:
            chats.remove(chat)
    assert not wrong
    assert hits > 250, "the run must have hits, or it proves nothing"
    assert sum(pod["counters"]["blocks_removed"] for pod in _pods(service)) > 100, (
        "nor without evictions"
    )
    assert {pod["state"] for pod in _pods(service)} == {"EXACT"}


def test_the_index_holds_the_engines_true_blocks(service):
    """Block for block: as many distinct blocks per pod as the engine itself counts."""
    _say(service, [{"role": "user", "content": "count the blocks that you hold, please"}])
    _catch_up(service)
    for pod in _pods(service):
        assert pod["blocks"] == len(ask(f"{pod['url']}/blocks").body["copies"])


def test_a_prompt_scores_what_the_pod_that_served_it_holds(service):
    """Nothing before it was served, every full block after."""
    prompt = "A sentence that no pod has ever seen until this very test was run."
    before = ask(f"{service.url}/score_completions", {"prompt": prompt}).body
    assert before["pod_scores"] == {}
    served = ask(f"{service.url}/v1/completions", {"prompt": prompt, "max_tokens": 1})
    _catch_up(service)
    after = ask(f"{service.url}/score_completions", {"prompt": prompt}).body
    assert after["pod_scores"] == {served.headers["x-kvatlas-pod"]: after["n_blocks"]}
    assert after["n_tokens"] == served.body["usage"]["prompt_tokens"]
    assert (after["model"], after["prompt"], after["block_size"]) == (before["model"], prompt, 4)
    assert (after["mode"], "embedded" in after["reason"]) == ("FALLBACK", True)


def test_both_placements_answer_alike(service):
    """Renderer and tokenizer as deployments give the same scores as inside the ingress."""
    apart = f"{service.url}/apart"
    chat = [{"role": "user", "content": "Where does a renderer live, and does it matter?"}]
    first = _say(service, chat)
    _catch_up(service)
    _catch_up(service, apart)
    again = ask(f"{apart}/v1/chat/completions", {"messages": chat})
    assert again.status == 200
    assert again.headers["x-kvatlas-pod"] == first.headers["x-kvatlas-pod"]
    assert int(again.headers["x-kvatlas-predicted-cached-tokens"]) > 0
    for prompt in (
        "short",
        "a longer prompt that is not cached anywhere, so it scores nothing at all",
    ):
        ours, theirs = (
            ask(f"{u}/score_completions", {"prompt": prompt}).body for u in (service.url, apart)
        )
        for answer in (ours, theirs):
            del answer["request_id"]
        assert ours == theirs


def test_a_salt_keeps_tenants_apart(service):
    """What one tenant cached is no hit for another, in prediction and in truth."""
    chat = [{"role": "user", "content": "My secret is that I like long prompts about blocks."}]
    _say(service, chat, cache_salt="tenant-a")
    _catch_up(service)
    same = _say(service, chat, cache_salt="tenant-a")
    other = _say(service, chat, cache_salt="tenant-b")
    plain = _say(service, chat)
    reported = [
        a.body["usage"]["prompt_tokens_details"]["cached_tokens"] for a in (same, other, plain)
    ]
    predicted = [int(a.headers["x-kvatlas-predicted-cached-tokens"]) for a in (same, other, plain)]
    assert predicted[0] > 0
    assert predicted[1:] == [0, 0]
    assert reported == predicted


def test_the_openai_client_works_unchanged(service):
    """Chat, stream and completion through OpenAI's own package."""
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        model = client.models.list().data[0].id
        messages = [{"role": "user", "content": "Say something about prefixes."}]
        whole = client.chat.completions.create(model=model, messages=messages)  # type: ignore[arg-type] # plain dicts
        assert whole.id.startswith("chatcmpl-")
        assert whole.choices[0].message.content
        assert whole.usage is not None
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
        parts = client.chat.completions.create(model=model, messages=messages, stream=True)  # type: ignore[arg-type] # plain dicts
        text = "".join(part.choices[0].delta.content or "" for part in parts)
        assert text == whole.choices[0].message.content
        ids = client.completions.create(model=model, prompt=[5, 6, 7, 8, 9], max_tokens=2)
        assert ids.usage is not None
        assert ids.usage.prompt_tokens == 5
        with pytest.raises(openai.NotFoundError, match="nobody/nothing"):
            client.completions.create(model="nobody/nothing", prompt="x")


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/score_completions", b"{bad", 400, "line 1 column 2"),
        ("/score_completions", b"[1]", 400, "JSON object"),
        ("/score_completions", b'{"prompt": NaN}', 400, "not valid JSON"),
        ("/score_completions", b'{"prompt": "\\ud800"}', 400, "column"),
        ("/score_completions", b'{"prompt": ' + b"[" * 5000, 400, "not valid JSON"),
        ("/score_completions", {}, 400, "prompt"),
        ("/score_completions", {"prompt": ""}, 400, "prompt"),
        ("/score_completions", {"prompt": [1, -1]}, 400, "token ids"),
        ("/score_completions", {"prompt": "x", "promt": 1}, 400, "promt"),
        ("/score_completions", {"prompt": "x", "model": "../etc/passwd"}, 404, "passwd"),
        ("/score_completions", {"prompt": "x" * 5_000_000}, 413, "limit"),
        ("/score_completions", {"prompt": "x" * 17_000_000}, 413, "limit"),
        ("/v1/completions", {"prompt": ["a", "b"]}, 400, "one prompt"),
        ("/v1/completions", {"prompt": "a", "kv_transfer_params": {}}, 400, "kv_transfer_params"),
        ("/v1/chat/completions", {"messages": []}, 400, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": 5}]}, 400, "messages"),
        ("/v1/chat/completions", {"messages": "hi"}, 400, "messages"),
        ("/nowhere", {}, 404, "Not Found"),
    ],
)
def test_bad_requests_get_openais_error(service, path, body, status, says):
    """Every 4xx names what is wrong, in the shape that clients parse."""
    answer = ask(service.url + path, body)
    error = answer.body["error"]
    assert (answer.status, set(error), error["code"]) == (status, _ERROR_KEYS, status)
    assert says in error["message"]


def test_get_is_not_a_way_to_score(service):
    """The peer answers GET with 200 and null."""
    answer = ask(f"{service.url}/score_completions")
    assert (answer.status, answer.body["error"]["type"]) == (405, "method_not_allowed_error")


def test_a_short_prompt_scores_nothing_and_says_why(service):
    """Not null, not silence: zero blocks and the reason."""
    answer = ask(f"{service.url}/score_completions", {"prompt": "Hi"}).body
    assert (answer["pod_scores"], answer["n_blocks"]) == ({}, 0)
    assert "less than one block" in answer["reason"]


def test_request_ids_are_accepted_echoed_and_published(service):
    """One id from the client's log to ours to the published event."""
    answer = ask(
        f"{service.url}/score_completions", {"prompt": "x"}, headers={"x-request-id": "abc-1"}
    )
    assert answer.headers.get_all("x-request-id") == ["abc-1"]
    assert answer.body["request_id"] == "abc-1"
    made = ask(f"{service.url}/score_completions", {"prompt": "x"})
    assert made.headers.get_all("x-request-id") == [made.body["request_id"]]


def test_the_readmes_subscriber_receives_what_is_published(service):
    """The fifteen lines that we show people are run as they stand."""
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    found = re.search(r"<!-- subscriber -->\s*```python\n(.*?)```", readme, re.DOTALL)
    assert found is not None
    command = [sys.executable, "-c", found[1], service.settings.publisher.endpoint, "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as subscriber:
        try:
            # It joins some time after it starts; what was published before is not for it.
            def publish():
                ask(f"{service.url}/score_completions", {"prompt": "told to subscribers"})
                _say(service, [{"role": "user", "content": "told to subscribers"}], max_tokens=1)
                return subscriber.poll() is not None

            wait_until(publish, "the subscriber did not receive two events", 30.0)
            output = subscriber.stdout.read() if subscriber.stdout else ""
        finally:
            subscriber.kill()
    assert "kv." in output
    assert len(output.splitlines()) >= 2


def test_clients_that_leave_freeze_nobody(service):
    """Disconnects under load must not stop the shared call to the indexer."""

    async def leave():
        _, port = service.url.rsplit(":", 1)
        _, writer = await asyncio.open_connection("127.0.0.1", int(port))
        body = b'{"prompt": "%s"}' % (b"gone before the answer " * 200)
        head = b"POST /score_completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(
            body
        )
        writer.write(head + body)
        await writer.drain()
        writer.close()

    async def leave_often():
        for _ in range(10):
            await asyncio.gather(*(leave() for _ in range(20)))

    with ThreadPoolExecutor(4) as pool:
        stayers = [
            pool.submit(ask, f"{service.url}/score_completions", {"prompt": f"stays {i}"})
            for i in range(100)
        ]
        asyncio.run(leave_often())
        assert {stayer.result(30).status for stayer in stayers} == {200}
    assert ask(f"{service.url}/score_completions", {"prompt": "after"}).status == 200


def test_pods_come_and_go_while_it_runs(service):
    """A removed pod's blocks are gone at once; added again, its history is replayed."""
    apart = f"{service.url}/apart"
    _catch_up(service, apart)
    pods = {pod["pod"]: pod for pod in ask(f"{apart}/pods").body["pods"]}
    held = pods["pod-1"]["blocks"]
    removed = ask(f"{apart}/pods/pod-1", method="DELETE").body
    assert removed == {"removed": "pod-1", "blocks": held}
    assert "pod-1" not in {pod["pod"] for pod in ask(f"{apart}/pods").body["pods"]}
    assert ask(f"{apart}/pods/pod-1", method="DELETE").status == 404
    fleet = service.settings.fleet
    entry = next(pod for pod in fleet.pods(service.settings.model) if pod.name == "pod-1")
    assert ask(f"{apart}/pods", entry.model_dump(exclude_none=True)).status == 201
    _catch_up(service, apart)
    again = {pod["pod"]: pod for pod in ask(f"{apart}/pods").body["pods"]}["pod-1"]
    assert again["blocks"] == len(ask(f"{entry.url}/blocks").body["copies"])


def _indexer_pid(service):
    url = f"http://127.0.0.1:{service.dashboard_port}/api/serve/applications/"
    replicas = ask(url).body["applications"]["kvatlas"]["deployments"]["Indexer"]["replicas"]
    return next((r["pid"] for r in replicas if r["state"] == "RUNNING"), None)


def test_an_indexer_that_is_killed_goes_on_from_its_snapshot(service):
    """After kill -9, the recovered scores are those of the other indexer, which never died.

    Meanwhile chats are served without scores, a score is a 503, and both say why.
    """
    chats = [
        [{"role": "user", "content": f"Chat {n} is about what survives, and what {n} does not."}]
        for n in range(12)
    ]
    for chat in chats[:6]:
        _say(service, chat)
    _catch_up(service)
    kept = Path(service.settings.index.snapshot_path)
    before = kept.stat().st_mtime
    wait_until(lambda: kept.stat().st_mtime > before, "no snapshot was written")
    pid = _indexer_pid(service)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    refused = ask(f"{service.url}/score_completions", {"prompt": "too early"})
    assert (refused.status, set(refused.body["error"])) == (503, _ERROR_KEYS)
    first, *_ = [_say(service, chat) for chat in chats[6:]]  # engines go on: these are missed
    assert first.headers["x-kvatlas-mode"] == "UNAVAILABLE"
    assert "index" in first.headers["x-kvatlas-reason"]

    def states():
        answer = ask(f"{service.url}/pods")
        return answer.status == 200 and {pod["state"] for pod in answer.body["pods"]}

    wait_until(lambda: states() == {"EXACT"}, "the index did not recover", 120)
    assert _indexer_pid(service) not in {None, pid}
    apart = f"{service.url}/apart"
    _catch_up(service)
    _catch_up(service, apart)
    applied = {pod["pod"]: pod["counters"]["applied"] for pod in _pods(service)}
    assert all(count < pod["last_seq"] for pod in _pods(service) if (count := applied[pod["pod"]]))
    scored = 0
    for chat in chats:
        prompt = ask(f"{service.url}/render", {"messages": chat}).body["prompt"]
        body = {"prompt": prompt, "add_special_tokens": False}
        ours, theirs = (ask(f"{url}/score_completions", body).body for url in (service.url, apart))
        assert ours["pod_scores"] == theirs["pod_scores"]
        assert ours["cached_tokens"] == theirs["cached_tokens"]
        scored += bool(ours["pod_scores"])
    assert scored == len(chats), "every chat was served, so every prompt is held somewhere"
    ours, theirs = (ask(f"{url}/pods").body["pods"] for url in (service.url, apart))
    assert {pod["pod"]: pod["blocks"] for pod in ours} == {
        pod["pod"]: pod["blocks"] for pod in theirs
    }
