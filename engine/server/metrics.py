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
        self._first_token = Histogram("time_to_first_token_seconds", "From submission to the first token.", buckets=_SECONDS, **common)
        self._per_token = Histogram(
            "time_per_output_token_seconds", "A sequence's mean time for each token after the first.", buckets=_TOKEN_SECONDS, **common
        )
        self.inter_token = Histogram(
            "inter_token_latency_seconds", "Between a stream's chunks of one choice.", buckets=_TOKEN_SECONDS, **common
        )
        self.registry.register(_DecoderNumbers(stats))

    def observe(self, outputs: Sequence[RequestOutput]) -> None:
        """Take in the times of a call's outputs."""
        for output in outputs:
            metrics = output.metrics
            if metrics.time_to_first_token is not None:
                self._first_token.observe(metrics.time_to_first_token)
                if metrics.num_new_tokens > 1:
                    self._per_token.observe((metrics.total_time - metrics.time_to_first_token) / (metrics.num_new_tokens - 1))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _DecoderNumbers(Collector):
    """The decoder's ``Stats`` under Prometheus' names."""

    def __init__(self, stats: Callable[[], Stats | None]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        if stats is None:
            return
        for name, help, value in (
            ("running_requests", "Requests that have a place in the batch.", stats.num_running),
            ("waiting_requests", "Requests that have none yet, or no longer.", stats.num_waiting),
            ("cache_blocks", "Blocks of the KV cache.", stats.num_blocks),
            ("cache_blocks_free", "Those that no request holds.", stats.num_free_blocks),
            ("cache_blocks_cached", "Those in the prefix cache.", stats.num_cached_blocks),
            ("cache_use_ratio", "Share of blocks that requests hold.", stats.cache_use),
            ("prefix_cache_hit_ratio", "Share of prompt tokens that the prefix cache had.", stats.hit_rate),
            ("draft_acceptance_ratio", "Share of drafted tokens that were accepted.", stats.acceptance),
            ("step_seconds", "Median of the last steps.", stats.step_seconds),
            ("tokens_per_second", "New tokens of the last steps.", stats.tokens_per_second),
        ):
            yield GaugeMetricFamily(f"engine_{name}", help, value=value)
        for name, help, value in (
            ("steps", "Steps run.", stats.num_steps),
            ("prompt_tokens", "Tokens of prompts.", stats.num_prompt_tokens),
            ("cached_prompt_tokens", "Those of them that the prefix cache had.", stats.num_cached_tokens),
            ("generation_tokens", "Tokens generated.", stats.num_new_tokens),
            ("preemptions", "Requests that lost their place in the batch.", stats.num_preemptions),
            ("drafted_tokens", "Tokens drafted and verified.", stats.num_drafted),
            ("accepted_tokens", "Those of them that were accepted.", stats.num_accepted),
        ):
            yield CounterMetricFamily(f"engine_{name}", help, value=value)
        for name, help, label, values in (
            ("finished_requests", "Requests that have ended.", "finish_reason", stats.num_finished),
            ("step_part_seconds", "Time spent in each part of steps.", "part", stats.seconds),
        ):
            family = CounterMetricFamily(f"engine_{name}", help, labels=[label])
            for key, value in values.items():
                family.add_metric([key], value)
            yield family
