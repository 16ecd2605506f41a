"""What we count, by the names that appear at Ray's metrics port (``ray_kvatlas_…``)."""

from typing import Any

from ray.serve import metrics

from deployments.schemas import Mode

_LATENCY_MS = [0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000, 30000]


_STATES = ("EXACT", "PARTIAL", "SILENT")


class PodMetrics:
    """What the indexer knows of every pod, as ``GET /pods`` tells it."""

    def __init__(self) -> None:
        tags: Any = ("pod", "rank")  # Ray types a tuple of one
        more: Any = (*tags, "state")
        self._state = metrics.Gauge(
            "kvatlas_pod_state", "1 for the state that the pod is in.", more
        )
        self._blocks = metrics.Gauge("kvatlas_pod_blocks", "KV blocks that the pod holds.", tags)
        self._lag = metrics.Gauge(
            "kvatlas_pod_lag_s", "From the engine's clock to our index, of the last batch.", tags
        )
        more = (*tags, "what")
        self._events = metrics.Counter(
            "kvatlas_pod_events", "What became of the pod's batches and events.", more
        )
        self._told: dict[tuple[str, str], dict[str, int]] = {}  # counters, by pod and rank

    def report(self, pods: list[dict[str, Any]]) -> None:
        """Tell the pods' present states; `PodStatus` says what each one is."""
        gone = set(self._told)
        for status in pods:
            tags = {"pod": status["pod"], "rank": str(status["rank"])}
            key = tags["pod"], tags["rank"]
            gone.discard(key)
            for state in _STATES:
                self._state.set(float(status["state"] == state), {**tags, "state": state})
            self._blocks.set(status["blocks"], tags)
            if status["lag_s"] is not None:
                self._lag.set(status["lag_s"], tags)
            told = self._told.setdefault(key, {})
            for what, count in status["counters"].items():
                if count > told.get(what, 0):
                    self._events.inc(count - told.get(what, 0), {**tags, "what": what})
                told[what] = count
        for pod, rank in gone:  # Ray goes on reporting what was set last
            tags = {"pod": pod, "rank": rank}
            for state in _STATES:
                self._state.set(0.0, {**tags, "state": state})
            self._blocks.set(0, tags)
            del self._told[pod, rank]


class IngressMetrics:
    """Counters of one ingress replica."""

    def __init__(self) -> None:
        keys: Any = ("route_path", "status")  # Ray types a tuple of one
        self._requests = metrics.Counter(
            "kvatlas_requests", "HTTP requests by route and status.", keys
        )
        self._latency = metrics.Histogram(
            "kvatlas_request_latency_ms", "From first byte in to last byte out, milliseconds.",
            _LATENCY_MS, ("route_path",),
        )  # fmt: skip
        self._scored = metrics.Counter(
            "kvatlas_scored_prompts", "Prompts scored, by how far to trust it.", ("mode",)
        )
        self._tokens = metrics.Counter("kvatlas_scored_tokens", "Tokens of the scored prompts.")
        self._predicted = metrics.Counter(
            "kvatlas_predicted_cached_tokens", "What we expected the pod to reuse.", ("pod",)
        )
        self._reported = metrics.Counter(
            "kvatlas_reported_cached_tokens", "What the pod then said it reused.", ("pod",)
        )
        self._mispredicted = metrics.Counter(
            "kvatlas_mispredicted_requests", "Requests where the two differ.", ("pod",)
        )

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count one finished request."""
        self._requests.inc(tags={"route_path": route, "status": str(status)})
        self._latency.observe(seconds * 1e3, tags={"route_path": route})

    def scored(self, mode: Mode, n_tokens: int) -> None:
        """Count one scored prompt."""
        self._scored.inc(tags={"mode": mode})
        if n_tokens:
            self._tokens.inc(n_tokens)

    def compared(self, pod: str, predicted_tokens: int, reported_tokens: int) -> None:
        """Count a prediction beside the engine's own figure."""
        tags = {"pod": pod}
        if predicted_tokens:
            self._predicted.inc(predicted_tokens, tags=tags)
        if reported_tokens:
            self._reported.inc(reported_tokens, tags=tags)
        if predicted_tokens != reported_tokens:
            self._mispredicted.inc(tags=tags)
