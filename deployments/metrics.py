"""What we count, by the names that appear at Ray's metrics port (``ray_kvatlas_…``)."""

from ray.serve import metrics

from deployments.schemas import Mode

_LATENCY_MS = [0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000, 30000]


class IngressMetrics:
    """Counters of one ingress replica."""

    def __init__(self) -> None:
        self._requests = metrics.Counter(
            "kvatlas_requests", "HTTP requests by route and status.", ("route_path", "status")
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
