"""Time a render against transformers' own cached one, in one run.

    python -m tests.bench.bench_render [PYTHON_WITH_TRANSFORMERS]

The peer runs in its own interpreter (``pip install transformers jinja2`` into any
environment) and the two alternate, so that a noisy machine hits both. Templates are read
from the conformance set (``KVATLAS_SHARED``). Figures are microseconds, medians of rounds.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

from kvcore.templates import ChatTemplate
from tests.conformance_data import full_template

TEMPLATES = {
    "ChatML": "axolotl-chatml.jinja",
    "granite 3.3": "ibm-granite-granite-3.3-2B-Instruct.jinja",
    "Llama 3.1": "meta-llama-Llama-3.1-8B-Instruct.jinja",
    "Qwen3": "Qwen-Qwen3-0.6B.jinja",
}
_USER = {"role": "user", "content": "What is the weather like in Oslo today?"}
_CALL = {"id": "call00001", "type": "function",
         "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}  # fmt: skip
_TOOL = {"type": "function", "function": {
    "name": "get_weather", "description": "Get the current weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}  # fmt: skip
CHATS: dict[str, tuple[list[dict[str, Any]], list[Any] | None]] = {
    "short": ([{"role": "system", "content": "Be brief."}, _USER], None),
    "12 turns": ([{"role": "system", "content": "Be brief."}]
                 + [_USER, {"role": "assistant", "content": "Cold, as ever."}] * 6, None),
    "tools": ([_USER, {"role": "assistant", "content": "", "tool_calls": [_CALL]},
               {"role": "tool", "content": "-3", "tool_call_id": "call00001"}, _USER],
              [_TOOL, _TOOL]),
}  # fmt: skip
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

_PEER = """
import json, sys, time
from transformers import PreTrainedTokenizerFast
from tokenizers import Tokenizer, models
job = json.loads(sys.stdin.readline())
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **job["special"])
for line in sys.stdin:
    template, chat, n = json.loads(line)
    messages, tools = job["chats"][chat]
    def render():
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False,
            chat_template=job["templates"][template], add_generation_prompt=True)
    text = render()
    start = time.perf_counter()
    for _ in range(n):
        render()
    print(json.dumps([text, (time.perf_counter() - start) / n]), flush=True)
"""


def main(python: str, rounds: int = 15, n: int = 200) -> None:
    """Print a table of both renders and their ratio."""
    texts = {name: full_template(file) for name, file in TEMPLATES.items()}
    templates = {name: ChatTemplate(text) for name, text in texts.items()}
    with subprocess.Popen(  # noqa: S603 - the interpreter is the caller's choice
        [python, "-c", _PEER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as peer:
        assert peer.stdin
        assert peer.stdout

        def ask(question: Any) -> None:
            print(json.dumps(question), file=peer.stdin, flush=True)

        ask({"special": SPECIAL, "chats": CHATS, "templates": texts})
        print(f"{'':22}{'transformers':>14}{'kvatlas':>10}{'ratio':>8}   (microseconds)")
        for name, template in templates.items():
            for chat, (messages, tools) in CHATS.items():
                theirs, ours = [], []
                for _ in range(rounds):
                    ask([name, chat, n])
                    expected, seconds = json.loads(peer.stdout.readline())
                    theirs.append(seconds)

                    def render(template=template, messages=messages, tools=tools):
                        return template.render(
                            messages, tools=tools, variables=SPECIAL,
                            add_generation_prompt=True, now=datetime.now(),
                        )  # fmt: skip

                    assert render() == expected, (name, chat)
                    ours.append(_time(render, n))
                a, b = statistics.median(theirs) * 1e6, statistics.median(ours) * 1e6
                print(f"{name:12}{chat:10}{a:14.1f}{b:10.1f}{b / a:8.2f}")
        peer.stdin.close()


def _time(call: Callable[[], object], n: int) -> float:
    start = time.perf_counter()
    for _ in range(n):
        call()
    return (time.perf_counter() - start) / n


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else sys.executable)
