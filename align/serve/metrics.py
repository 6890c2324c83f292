"""What a server measures of itself, for Prometheus. A label has few values: a name of a model, a status, a path."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from align.rollout.requests import Stats
from align.serve.request_log import Record

MOST_MODELS, OTHER = 200, "(other)"
"""Names of models, and of tenants, that are told apart. Names may be loaded without end, and each is a time series of
its own for ever."""
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class EngineCollector(Collector):
    """The engine's own counts, asked for at each scrape."""

    def __init__(self, stats: Callable[[], Stats], cpu_s: Callable[[], float]) -> None:
        self.stats, self.cpu_s = stats, cpu_s

    def collect(self) -> Iterator[Any]:
        stats = self.stats()
        yield GaugeMetricFamily("align_requests_running", "Answers that are being decoded.", stats.running)
        yield GaugeMetricFamily("align_requests_waiting", "Answers that wait for a slot.", stats.waiting)
        yield GaugeMetricFamily("align_adapters_resident", "Adapters whose weights are in memory.", stats.resident)
        yield CounterMetricFamily("align_decode_steps", "Decode steps.", stats.steps)
        yield CounterMetricFamily(
            "align_engine_prompt_tokens", "Tokens of prompts, one for each answer.", stats.prompt_tokens
        )
        yield CounterMetricFamily(
            "align_prefix_cache_hit_tokens", "Of these, from the prefix cache.", stats.cached_tokens
        )
        yield CounterMetricFamily("align_engine_generated_tokens", "Tokens that were drawn.", stats.generated_tokens)
        yield CounterMetricFamily("align_engine_cpu_seconds", "Processor time of the engine's thread.", self.cpu_s())
        yield CounterMetricFamily("align_cpu_seconds", "Processor time of the whole server.", time.process_time())


def label(name: str, known: set[str]) -> str:
    """Return a name as a label, which is the same for all names beyond the first `MOST_MODELS`."""
    if name and name not in known and len(known) < MOST_MODELS:
        known.add(name)
    return name if name in known or not name else OTHER


class Metrics:
    """Counts and histograms of requests.

    Args:
        stats: of the engine.
        cpu_s: processor time of its thread, in seconds.
    """

    def __init__(self, stats: Callable[[], Stats], cpu_s: Callable[[], float]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(stats, cpu_s))
        self._models: set[str] = set()
        self._tenants: set[str] = set()
        self.requests = self._counter("align_requests", "Requests, by model and HTTP status.", "model", "status")
        self.prompt = self._counter("align_prompt_tokens", "Tokens of prompts, once a request.", "model")
        self.completion = self._counter("align_completion_tokens", "Tokens of answers.", "model")
        by_tenant = "align_tenant_requests", "Requests, by tenant and status."
        self.tenant_requests = self._counter(*by_tenant, "tenant", "status")
        self.tenant_prompt = self._counter("align_tenant_prompt_tokens", "Tokens of prompts, by tenant.", "tenant")
        answers = "align_tenant_completion_tokens", "Tokens of answers, by tenant."
        self.tenant_completion = self._counter(*answers, "tenant")
        self.first = self._histogram("align_time_to_first_token_seconds", "From request to first token.", SECONDS)
        self.between = self._histogram("align_inter_token_latency_seconds", "From token to token.", STEP_SECONDS)
        self.whole = self._histogram("align_request_seconds", "From request to the end of its answer.", SECONDS)

    def observe(self, record: Record) -> None:
        """Count a request that has ended."""
        model, tenant = self.model(record.answered), self.tenant(record.tenant)
        self.tenant_requests.labels(tenant, str(record.status)).inc()
        self.tenant_prompt.labels(tenant).inc(record.prompt_tokens)
        self.tenant_completion.labels(tenant).inc(record.completion_tokens)
        self.requests.labels(model, str(record.status)).inc()
        if record.answered:
            self.prompt.labels(model).inc(record.prompt_tokens)
            self.completion.labels(model).inc(record.completion_tokens)
            if record.finish_reasons:
                self.whole.labels(model).observe(record.seconds)
        if record.first_token_s is not None:
            self.first.labels(model).observe(record.first_token_s)

    def between_tokens(self, model: str) -> Histogram:
        """Where the seconds from token to token of a model's answers are counted."""
        return self.between.labels(self.model(model))

    def model(self, name: str) -> str:
        """Return the label of a model's name."""
        return label(name, self._models)

    def tenant(self, name: str) -> str:
        """Return the label of a tenant; empty if the key was not known."""
        return label(name, self._tenants)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(name, meaning, labels, registry=self.registry)

    def _histogram(self, name: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, meaning, ("model",), buckets=buckets, registry=self.registry)
