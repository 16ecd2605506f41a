"""A process with limits for each template that comes with a request.

Jinja's sandbox confines what a template can reach; the process confines what it can
burn. It serves one request, and parsing happens there, too: Jinja folds constants while
it compiles, so ``{{ 9**9999999 }}`` need not even be rendered to take its time.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from deployments.settings import RendererSettings
from kvcore import errors
from kvcore.chat import ChatOptions
from kvcore.errors import InvalidInputError, RenderLimitError

_MAX_WAITING = 16
# Before it imports anything, it steps back behind requests without templates of their own.
_PROGRAM = "import os; os.nice(19); from deployments.template_process import main; main()"
_ROOT = str(Path(__file__).parents[1])
# What Python, Jinja and a request take before the template does anything.
_BASE_BYTES = 128 << 20


class TemplateSandbox:
    """Renders foreign templates one at a time, each in a process of its own.

    Belongs to one event loop. A spare process waits ahead, once there was a first one,
    so that a request does not wait for Python to start.
    """

    def __init__(self, settings: RendererSettings) -> None:
        self._settings = settings
        self._turn = asyncio.Semaphore(1)
        self._n_waiting = 0
        self._spare: subprocess.Popen[bytes] | None = None

    async def render(
        self,
        template: str,
        request: Mapping[str, Any],
        special_tokens: Mapping[str, str],
        options: ChatOptions,
        now: datetime,
    ) -> tuple[str, bool]:
        """Do what `kvcore.chat.render_request` does, with a template's text, within limits.

        Raises:
            RenderLimitError: It took too long or too much memory, or wrote too much.
            InvalidInputError: The template does not compile, or the render failed.
        """
        if self._n_waiting >= _MAX_WAITING:
            raise RenderLimitError("too many requests with a chat_template are waiting")
        job = {
            "template": template,
            "request": request,
            "special_tokens": special_tokens,
            "options": options._asdict(),
            "now": now.isoformat(),
            "max_chars": self._settings.max_chars,
        }
        # Shielded: a client that goes away must not let the next one in beside its thread.
        task = asyncio.create_task(self._take_turn(job))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._n_waiting += 1
        return await asyncio.shield(task)

    async def _take_turn(self, job: dict[str, Any]) -> tuple[str, bool]:
        try:
            async with self._turn:
                return await asyncio.to_thread(self._run, job)
        finally:
            self._n_waiting -= 1

    def close(self) -> None:
        """End the spare process."""
        if self._spare is not None:
            _end(self._spare)
            self._spare = None

    def _run(self, job: dict[str, Any]) -> tuple[str, bool]:
        process, self._spare = self._spare or self._start(), None
        timeout_s = self._settings.request_template_timeout_s
        try:
            answer, _ = process.communicate(json.dumps(job).encode(), timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise RenderLimitError(f"chat_template did not finish in {timeout_s:g} s") from None
        finally:
            _end(process)
            self._spare = self._start()
        return _read(answer)

    def _start(self) -> subprocess.Popen[bytes]:
        settings = self._settings
        limits = (
            str(_BASE_BYTES + settings.request_template_memory_bytes),
            # A backstop, should this process die before it can end that one.
            str(int(settings.request_template_timeout_s) + 1),
        )
        return subprocess.Popen(  # noqa: S603 - our own module
            [sys.executable, "-c", _PROGRAM, *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # Nothing of the service's own environment: it holds tokens.
            env={"PYTHONPATH": os.pathsep.join([_ROOT, *filter(None, sys.path)])},
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


def _read(answer: bytes) -> tuple[str, bool]:
    if not answer:  # killed by a limit before it could say so
        raise RenderLimitError("chat_template took too much memory or time")
    outcome = json.loads(answer)
    if "text" in outcome:
        return outcome["text"], outcome["add_special_tokens"]
    kind = getattr(errors, outcome["error"], InvalidInputError)
    raise kind(*outcome["args"])
