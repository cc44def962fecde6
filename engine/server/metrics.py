"""What the server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..outputs import RequestOutput

if TYPE_CHECKING:
    from ..stats import Stats

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Counters and histograms of one server, and its decoder's own numbers as they stand.

    Args:
        stats: those of the decoder; None while there is none.
    """

    def __init__(self, stats: Callable[[], Stats | None]) -> None:
        self.registry = CollectorRegistry()
        common: dict[str, Any] = {"registry": self.registry, "namespace": "engine"}
        self.calls = Counter("http_requests", "HTTP requests, by route and status.", ("route", "status"), **common)
        self.call_seconds = Histogram(
            "http_request_duration_seconds", "From a request's head to the end of its reply.", ("route",), buckets=_SECONDS, **common
        )
        self._ended = Counter("sequences_ended", "Sequences that have ended, by reason.", ("finish_reason",), **common)
        self._first_token = Histogram("time_to_first_token_seconds", "From submission to the first token.", buckets=_SECONDS, **common)
        self._per_token = Histogram(
            "time_per_output_token_seconds", "A sequence's mean time for each token after the first.", buckets=_TOKEN_SECONDS, **common
        )
        self.inter_token = Histogram(
            "inter_token_latency_seconds", "Between a stream's chunks of one choice.", buckets=_TOKEN_SECONDS, **common
        )
        self._prompt_tokens = Counter("prompt_tokens", "Tokens of prompts.", **common)
        self._cached_tokens = Counter("cached_prompt_tokens", "Those of them that the prefix cache had.", **common)
        self._new_tokens = Counter("generation_tokens", "Tokens generated.", **common)
        self.registry.register(_DecoderNumbers(stats))

    def count(self, outputs: Sequence[RequestOutput]) -> None:
        """Take in the outputs of a call."""
        seen = set()
        for output in outputs:
            metrics = output.metrics
            self._ended.labels(output.finish_reason).inc()
            self._new_tokens.inc(metrics.num_new_tokens)
            if output.prompt_index not in seen:
                seen.add(output.prompt_index)
                self._prompt_tokens.inc(metrics.num_prompt_tokens)
                self._cached_tokens.inc(metrics.num_cached_tokens)
            if metrics.time_to_first_token is not None:
                self._first_token.observe(metrics.time_to_first_token)
                if metrics.num_new_tokens > 1:
                    self._per_token.observe((metrics.total_time - metrics.time_to_first_token) / (metrics.num_new_tokens - 1))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _DecoderNumbers(Collector):
    def __init__(self, stats: Callable[[], Stats | None]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        if stats is None:
            return
        yield GaugeMetricFamily("engine_running", "", value=0)
        yield CounterMetricFamily("engine_steps", "", value=0)
