"""Our own events: which prompts and chats were scored, and what every pod got."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgpack
import numpy as np

from deployments.event_log import EventLog
from deployments.settings import PublisherSettings
from kvcore.kernels.wire import fnv1a_64


class Publisher(EventLog):
    """Publish scored prompts and chats, numbered from 1 over both topics."""

    def __init__(self, settings: PublisherSettings, clock: Callable[[], float] = time.time) -> None:
        super().__init__(settings, first_seq=1)
        self._clock = clock

    def publish_scores(
        self,
        *,
        model: str,
        prompt: str,
        pod_scores: Mapping[str, float],
        n_tokens: int,
        block_size: int,
        request_id: str,
    ) -> None:
        """Publish the scores of one prompt on ``kv.{model}``."""
        if not self.is_on:
            return
        body = {
            "prompt": prompt,
            "model": model,
            "timestamp": self._clock(),
            "prompt_hash": _fnv1a_64(prompt.encode("utf-8", "replace")),
            "pod_scores": pod_scores,
            "n_tokens": n_tokens,
            "block_size": block_size,
            "request_id": request_id,
        }
        self._publish(f"kv.{_topic_name(model)}", body)

    def publish_chat(
        self,
        *,
        id: str,  # the field's name on the wire
        model: str,
        messages: Sequence[Mapping[str, Any]],
        rendered_template: str,
        kv_scores: Mapping[str, float],
        template_vars: Mapping[str, Any],
        processing_time_ms: float,
        n_tokens: int,
        block_size: int,
        request_id: str,
    ) -> None:
        """Publish the scores of one chat on ``kv.chat.{model}``."""
        if not self.is_on:
            return
        body = {
            "id": id,
            "model": model,
            "messages": messages,
            "rendered_template": rendered_template,
            "kv_scores": kv_scores,
            "template_vars": template_vars,
            "timestamp": self._clock(),
            "processing_time_ms": processing_time_ms,
            "n_tokens": n_tokens,
            "block_size": block_size,
            "request_id": request_id,
        }
        self._publish(f"kv.chat.{_topic_name(model)}", body)

    def _publish(self, topic_name: str, body: Mapping[str, Any]) -> None:
        self.send(topic_name.encode(), bytes(msgpack.packb(body, unicode_errors="replace") or b""))


def _fnv1a_64(data: bytes) -> int:
    return int(fnv1a_64(np.frombuffer(data, dtype=np.uint8)))


def _topic_name(model: str) -> str:
    return model.replace("/", "_")
