"""Index, subscriber and publisher as one: events come in, scores go out, both are told on.

Importing this module compiles the kernels, which takes seconds: only the indexer's replica
does, and it does so while it starts.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from deployments.publisher import Publisher
from deployments.schemas import Mode, RankScore, ScoreAnswer, ScoreQuery
from deployments.settings import PodEndpoint, Settings
from deployments.subscriber import Subscriber
from kvcore.errors import InvalidInputError, SnapshotError, UnknownPodError
from kvcore.hashing import hash_blocks, namespace_root
from kvcore.index import BlockIndex
from kvcore.scorer import score
from kvcore.stream_state import PodState

_log = logging.getLogger("ray.serve")
_MAX_REMEMBERED = 1024  # characters that name a namespace; a salt is as long as a client likes
_REASONS_TOLD = 3  # in one answer; /pods tells all


class IndexService:
    """Own one index and what feeds and reports it.

    Only the event loop that starts it changes the state. Making one restores the snapshot, which
    may take seconds.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._index, note = self._restored()
        self._short_root = lru_cache(maxsize=4096)(self._namespace)
        follow = settings.subscriber
        added = [PodEndpoint.model_validate(pod) for pod in note.get("added", ())]
        configured = {pod.name for pod in follow.pods}
        pods = (*follow.pods, *(pod for pod in added if pod.name not in configured))
        self._subscriber = Subscriber(
            follow.model_copy(update={"pods": pods}),
            self._index,
            model_root=self._root,
            clock=clock,
        )
        self._subscriber.resume(note.get("positions", []))
        self._publisher = Publisher(settings.publisher)
        self._changing = asyncio.Lock()  # held while pods change, and while the index is copied
        # A new process starts elsewhere than its predecessor, so that ingresses ask anew.
        self.pods_version = time.time_ns()

    def _restored(self) -> tuple[BlockIndex, dict[str, Any]]:
        """Return the snapshot's index and its note, or an empty index."""
        settings, path = self._settings.index, self._settings.index.snapshot_path
        limits = {
            "capacity_bytes": settings.capacity_bytes,
            "max_waiting_blocks": settings.max_waiting_blocks,
        }
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        if path is None or not Path(path).exists():
            return BlockIndex(**limits), {}
        try:
            index, note = BlockIndex.restore(path, **limits)
        except SnapshotError as error:
            problem = str(error)
        else:
            if note["block_size"] == self._settings.block_size:
                n_blocks = sum(holder.blocks for holder in index.holder_stats())
                _log.info("indexer: restored %d blocks from %s", n_blocks, path)
                return index, note
            problem = f"its blocks have {note['block_size']} tokens"
        _log.error("indexer: starts empty, the snapshot %s is of no use: %s", path, problem)
        return BlockIndex(**limits), {}

    async def start(self) -> str | None:
        """Open the sockets and return where scores are published."""
        await self._publisher.start()
        await self._subscriber.start()
        return self._publisher.bound_endpoint

    async def save(self) -> None:
        """Write the snapshot; scores go on, and events wait for the few milliseconds of a copy.

        Raises:
            OSError: The file cannot be written; the older one stays.
        """
        path = self._settings.index.snapshot_path
        if path is None:
            return
        async with self._changing:
            self._subscriber.pause()
            try:
                copy = await asyncio.to_thread(self._index.snapshot, self._note())
            finally:
                self._subscriber.go_on()
        await asyncio.to_thread(copy.write, path)

    def _note(self) -> dict[str, Any]:
        """Return what a successor needs beside the index: JSON-serialisable."""
        configured = self._settings.subscriber.pods
        added = [pod for pod in self._subscriber.pods() if pod not in configured]
        return {
            "block_size": self._settings.block_size,
            "positions": self._subscriber.positions(),
            "added": [pod.model_dump(exclude_unset=True) for pod in added],
        }

    async def close(self) -> dict[str, int]:
        """Flush the publisher, save the snapshot, close all; return what was published."""
        await self._publisher.close()
        try:
            await self.save()
        except OSError:
            _log.exception("the last snapshot could not be written")
        await self._subscriber.close()
        return vars(self._publisher.counters)

    def endpoints(self) -> list[PodEndpoint]:
        """Return the pods that are followed by configuration or by request."""
        return self._subscriber.pods()

    def pods(self) -> list[dict[str, Any]]:
        """Return what is known of each rank of each pod, as JSON would say it."""
        return [
            {**status._asdict(), "state": status.state.value}
            for status in self._subscriber.statuses()
        ]

    async def add_pod(self, pod: PodEndpoint) -> None:
        """Follow a pod from now on.

        Raises:
            InvalidInputError: Its endpoint is malformed, or there are too many pods.
        """
        async with self._changing:
            try:
                self._subscriber.add_pod(pod)
            except OSError as error:  # zmq's errors are OSErrors
                raise InvalidInputError(f"pod {pod.name}: {error}") from error
            self.pods_version += 1

    async def remove_pod(self, name: str) -> int:
        """Forget a pod and return how many blocks it held.

        Raises:
            UnknownPodError: There is no such pod.
        """
        async with self._changing:
            if name not in {status.pod for status in self._subscriber.statuses()}:
                raise UnknownPodError(f"there is no pod {name}")
            self.pods_version += 1
            return self._subscriber.remove_pod(name)

    def answer(self, query: ScoreQuery) -> ScoreAnswer:
        """Score one prompt and publish the result."""
        size, weights = self._settings.block_size, self._settings.index.tier_weights
        tokens = np.frombuffer(query.tokens, dtype=np.uint32)
        root = self._root(query.model, query.lora, query.salt)
        keys = hash_blocks(tokens, block_size=size, root=root)
        scores = score(self._index, keys, tier_weights=weights, pods=query.pods)
        # The engine always computes the last token, so a last block that ends the prompt
        # is held and yet not reused.
        n_reusable = max(0, (tokens.size - 1) // size)
        reused = scores
        if n_reusable < keys.size:
            reused = score(self._index, keys[:n_reusable], tier_weights=weights, pods=query.pods)
        cached: dict[str, int] = {}
        for rank in reused:
            cached[rank.pod] = max(cached.get(rank.pod, 0), rank.blocks * size)
        mode, reason = self._trust(query.pods)
        if not keys.size:
            reason = f"the prompt's {tokens.size} tokens are less than one block of {size}"
        answer = ScoreAnswer(
            scores=[RankScore(*rank) for rank in scores],
            cached_tokens=cached,
            mode=mode,
            reason=reason,
            n_tokens=tokens.size,
            n_blocks=keys.size,
            block_size=size,
            pods_version=self.pods_version,
        )
        self._publish(query, answer)
        return answer

    def _root(self, model: str, lora: str | None, salt: str | None) -> int:
        is_short = len(model) + len(lora or "") + len(salt or "") <= _MAX_REMEMBERED
        return (self._short_root if is_short else self._namespace)(model, lora, salt)

    def _namespace(self, model: str, lora: str | None, salt: str | None) -> int:
        size = self._settings.block_size
        return namespace_root(model, block_size=size, lora=lora, salt=salt)

    def _trust(self, pods: tuple[str, ...] | None) -> tuple[Mode, str | None]:
        """Say how far the pods' blocks are known, and which pods are the doubtful ones."""
        doubts = [
            f"{pod}: {why}" if rank == 0 else f"{pod} rank {rank}: {why}"
            for (pod, rank), (state, why) in self._subscriber.states().items()
            if state is not PodState.EXACT and (pods is None or pod in pods)
        ]
        if not doubts:
            return "EXACT", None
        more = len(doubts) - _REASONS_TOLD
        told = doubts[:_REASONS_TOLD] + ([f"and {more} more pods"] if more > 0 else [])
        return "PARTIAL", "; ".join(told)

    def _publish(self, query: ScoreQuery, answer: ScoreAnswer) -> None:
        if not self._publisher.is_on:
            return
        scores = answer.pod_scores()
        size = {"n_tokens": answer.n_tokens, "block_size": answer.block_size}
        if query.chat is not None:
            chat = query.chat
            self._publisher.publish_chat(
                id=chat["id"],
                model=query.model,
                messages=chat["messages"],
                rendered_template=chat["rendered_template"],
                kv_scores=scores,
                template_vars=chat["template_vars"],
                processing_time_ms=max(0.0, (time.time() - chat["received_at"]) * 1e3),
                request_id=query.request_id,
                **size,
            )
        elif query.prompt is not None:
            self._publisher.publish_scores(
                model=query.model,
                prompt=query.prompt,
                pod_scores=scores,
                request_id=query.request_id,
                **size,
            )
