"""What runs in the limited process: one render job from stdin, one answer to stdout.

python -m deployments.template_process MEMORY_BYTES CPU_SECONDS
"""

import json
import resource
import sys
from datetime import datetime
from typing import Any

from kvcore.chat import ChatOptions, render_request
from kvcore.errors import InvalidInputError, PromptTooLongError
from kvcore.templates import ChatTemplate


def main() -> None:
    """Limit this process to MEMORY_BYTES and CPU_SECONDS, its arguments; then serve one job."""
    memory_bytes, cpu_s = int(sys.argv[1]), int(sys.argv[2])
    for kind, limit in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))
    job = sys.stdin.buffer.read()
    if not job:
        return  # the service has stopped
    try:
        answer = json.dumps(_render(json.loads(job)))
    except InvalidInputError as error:
        answer = json.dumps({"error": type(error).__name__, "args": error.args})
    except MemoryError:
        return  # no answer says it: there may be no memory left to say more
    sys.stdout.write(answer)


def _render(job: dict[str, Any]) -> dict[str, Any]:
    text, special = render_request(
        ChatTemplate(job["template"]),
        job["request"],
        job["special_tokens"],
        ChatOptions(**job["options"]),
        datetime.fromisoformat(job["now"]),
    )
    if len(text) > job["max_chars"]:
        raise PromptTooLongError(len(text), job["max_chars"], "characters")
    return {"text": text, "add_special_tokens": special}
