"""Time tokenizing against ``tokenizers``' own encode, in one run.

    python -m tests.bench.bench_tokenize [NAME ...]

Needs the files of ``python -m tests.fetch_tokenizers``. Figures are medians of rounds:
each round has texts that nothing has seen before. At the end a heartbeat shows how long
an event loop is kept waiting while a prompt of a megabyte is tokenized.
"""

import asyncio
import random
import statistics
import sys
import time
from hashlib import pbkdf2_hmac
from pathlib import Path

import tokenizers

from deployments.tokenizer import SWITCH_INTERVAL_S
from kvcore.tokenization import PromptTokenizer
from tests.fetch_tokenizers import path_of

NAMES = ("qwen2_5", "llama3_1", "deepseek_v3", "claude")
_MARKERS = {
    "qwen2_5": ("<|im_start|>{role}\n", "<|im_end|>\n"),
    "llama3_1": ("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>"),
    "deepseek_v3": ("<\uff5c{role}\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
    "claude": ("<META_START>{role}\n", "<META_END>\n"),
}
_WORDS = [
    word
    for path in sorted(Path(tokenizers.__file__).parents[1].glob("*/__init__.py"))[:300]
    for word in path.read_text(errors="ignore").split(" ")
    if word
]


def main(names: list[str], rounds: int = 7) -> None:
    """Print a table per workload."""
    chance = random.Random(11)
    print(f"{'':14}{'':22}{'tokenizers':>12}{'kvatlas':>10}{'times':>8}   (ms per prompt)")
    for name in names:
        text = path_of(name).read_text()
        reference = tokenizers.Tokenizer.from_str(text)
        reference.no_truncation()
        for fast in (True, False):
            tokenizer = PromptTokenizer(text, fast=fast)
            if fast and tokenizer.backend != "fastokens":
                continue
            label = f"{name} {'fastokens' if fast else 'segments'}"
            _warm(tokenizer, chance)
            _row(label, "20 turns to 12k", reference, tokenizer,
                 [_growing_chat(name, chance) for _ in range(rounds)])  # fmt: skip
            _row(label, "new, 8.6k tokens", reference, tokenizer,
                 [[_prose(chance, 8600)] for _ in range(rounds)])  # fmt: skip
            asyncio.run(_measure_gaps(label, tokenizer, chance))


def _row(label, workload, reference, tokenizer, rounds):
    theirs, ours = [], []
    for prompts in rounds:
        seconds, expected = _time(
            lambda prompt: reference.encode(prompt, add_special_tokens=False).ids, prompts
        )
        theirs.append(seconds)
        seconds, got = _time(
            lambda prompt: tokenizer.encode(prompt, add_special_tokens=False), prompts
        )
        ours.append(seconds)
        assert [ids.tolist() for ids in got] == expected
    a, b = statistics.median(theirs) * 1e3, statistics.median(ours) * 1e3
    print(f"{label:24}{workload:18}{a:6.2f}{b:10.3f}{a / b:8.1f}", flush=True)


def _time(encode, prompts):
    start = time.perf_counter()
    results = [encode(prompt) for prompt in prompts]
    return (time.perf_counter() - start) / len(prompts), results


async def _measure_gaps(label, tokenizer, chance, rounds=11):
    """Longest wait of a loop beside one prompt, and beside as long a work without the GIL.

    The second is what a busy core and its other tenants cost; the rest is ours.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_S)  # as the service does
    texts = [_prose(chance, 300_000)[:1_000_000] for _ in range(rounds)]
    took, ours, others = [], [], []
    for text in texts:
        gaps: list[float] = []
        heart = asyncio.create_task(_beat(gaps))
        await asyncio.sleep(0.01)
        start = time.perf_counter()
        await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=False)
        took.append(time.perf_counter() - start)
        ours.append(max(gaps))
        gaps.clear()
        await asyncio.to_thread(_work_without_gil, took[-1])
        others.append(max(gaps))
        heart.cancel()
    a, b, c = (statistics.median(values) * 1e3 for values in (took, ours, others))
    print(
        f"{label:24}1 MB in a thread: {a:.0f} ms, longest gap {b:.1f} ms (without GIL {c:.1f} ms)"
    )


def _work_without_gil(seconds):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pbkdf2_hmac("sha256", b"", b"", 10_000)  # a few milliseconds


async def _beat(gaps):
    while True:
        start = time.perf_counter()
        await asyncio.sleep(0.001)
        gaps.append(time.perf_counter() - start - 0.001)


def _warm(tokenizer, chance):
    """Services run for days: the words of the language have been seen."""
    for _ in range(40):
        tokenizer.encode(_prose(chance, 8600), add_special_tokens=False)


def _prose(chance, n_tokens):
    return " ".join(chance.choice(_WORDS) for _ in range(n_tokens // 4))


def _growing_chat(name, chance):
    before, after = _MARKERS[name]
    prompt, prompts = "", []
    for turn in range(20):
        role = "assistant" if turn % 2 else "user"
        prompt += before.format(role=role) + _prose(chance, 600) + after
        prompts.append(prompt + before.format(role="assistant"))
    return prompts


if __name__ == "__main__":
    main(sys.argv[1:] or list(NAMES))
