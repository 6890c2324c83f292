"""Logs of requests and of changes of model names, and metrics for Prometheus.

The run's `requests.jsonl` gets a line for each request, and its `adapters.jsonl` a line for each change of the served
names.

No line holds a key, a prompt, an answer or a tenant's path. The labels of metrics have few values: a model's name, a
tenant, a status.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from time import monotonic, process_time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from align.rollout.serving_engine import Stats
from align.serve.model_names import Arm

log = logging.getLogger(__name__)


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


UNLOGGED = {"logged": False}


@dataclass(slots=True)
class RequestRecord:
    """The log entry of one HTTP request: its tenant, model, token counts, status and times.

    Attributes:
        tenant: name of the tenant; empty for an unknown key.
        asked: `model` of the request, if the tenant may use such a model.
        answered: name of the model that answered.
        adapter: digest of the adapter that answered; empty for the base alone.
        base: digest of the base.
        arm: label of the chosen arm; empty for a name with one arm.
        cached_tokens: prompt tokens that came from the prefix cache.
        first_token_s, seconds: time to the first token and to the end, since the request's head was received.
        began: start of the request on the monotonic clock.
    """

    id: str
    path: str
    time: str = field(default_factory=utc_now)
    tenant: str = ""
    asked: str = ""
    answered: str = ""
    base: str = ""
    adapter: str = ""
    arm: str = ""
    stream: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    finish_reasons: list[str] = field(default_factory=list)
    status: int = 0
    first_token_s: float | None = None
    seconds: float = 0.0
    began: float = field(default_factory=monotonic, metadata=UNLOGGED)

    def measure_elapsed(self) -> float:
        """Return the seconds since the head of the request was received."""
        return monotonic() - self.began


class JsonLinesLog:
    """A file to which JSON lines are appended.

    A failed write, on a full disk say, does not fail the request; the first one is logged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = Lock()
        self._warned = False
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def append(self, values: Mapping[str, Any]) -> None:
        """Append a mapping as one JSON line to the file. A failed write is not raised, and is logged once."""
        line = json.dumps(values, ensure_ascii=False)
        try:
            with self._lock:
                self._file.write(line + "\n")
        except (OSError, ValueError) as error:
            if not self._warned:
                log.warning("%s cannot be written (%s); requests are still answered", self.path.name, error)
            self._warned = True

    def close(self) -> None:
        with self._lock:
            self._file.close()


class RequestLog(JsonLinesLog):
    """The log file of HTTP requests, with one JSON line for each."""

    def write(self, record: RequestRecord) -> None:
        values = {each.name: getattr(record, each.name) for each in fields(record) if not each.metadata}
        self.append({name: round(value, 6) if isinstance(value, float) else value for name, value in values.items()})


class AdapterLog(JsonLinesLog):
    """The log file of the served names: each change adds a JSON line with all names and their adapters."""

    def write(self, names: Mapping[str, Sequence[Arm]]) -> None:
        targets = {
            name: [
                {"label": arm.label, "adapter": arm.version and arm.version.digest, "weight": arm.weight}
                for arm in arms
            ]
            for name, arms in names.items()
        }
        self.append({"time": utc_now(), "names": targets})


MOST_MODELS = 200
"""Maximum number of models, and of tenants, that have a metric label of their own.

Any number of names may be loaded over time, and each label value is a time series that is never removed."""
OTHER = "(other)"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class EngineCollector(Collector):
    """A Prometheus collector that reads the engine's counters at each scrape."""

    def __init__(self, stats: Callable[[], Stats], cpu_s: Callable[[], float]) -> None:
        self.stats = stats
        self.cpu_s = cpu_s

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
        yield CounterMetricFamily("align_cpu_seconds", "Processor time of the whole server.", process_time())


def add_label(name: str, used_labels: set[str]) -> str:
    """Add a name to `used_labels` and return it, or return `(other)` if `MOST_MODELS` other names are in use."""
    if name and name not in used_labels and len(used_labels) < MOST_MODELS:
        used_labels.add(name)
    return name if name in used_labels or not name else OTHER


class Metrics:
    """The server's Prometheus metrics: counts, tokens and latencies of requests by model and tenant.

    Args:
        stats: returns the engine's counters.
        cpu_s: returns the CPU time of the engine's thread in seconds.
    """

    def __init__(self, stats: Callable[[], Stats], cpu_s: Callable[[], float]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(stats, cpu_s))
        self._models: set[str] = set()
        self._tenants: set[str] = set()
        self.requests = self._counter("align_requests", "Requests, by model and HTTP status.", "model", "status")
        self.prompt = self._counter("align_prompt_tokens", "Tokens of prompts, once a request.", "model")
        self.completion = self._counter("align_completion_tokens", "Tokens of answers.", "model")
        self.tenant_requests = self._counter(
            "align_tenant_requests", "Requests, by tenant and status.", "tenant", "status"
        )
        self.tenant_prompt = self._counter("align_tenant_prompt_tokens", "Tokens of prompts, by tenant.", "tenant")
        self.tenant_completion = self._counter(
            "align_tenant_completion_tokens", "Tokens of answers, by tenant.", "tenant"
        )
        self.first = self._histogram("align_time_to_first_token_seconds", "From request to first token.", SECONDS)
        self.between = self._histogram("align_inter_token_latency_seconds", "From token to token.", STEP_SECONDS)
        self.whole = self._histogram("align_request_seconds", "From request to the end of its answer.", SECONDS)

    def observe(self, record: RequestRecord) -> None:
        """Add an ended request's tokens and times to the metrics of its model and tenant."""
        model = self.get_model_label(record.answered)
        tenant = self.get_tenant_label(record.tenant)
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

    def get_token_intervals(self, model: str) -> Histogram:
        """Return the Prometheus histogram of the seconds between two tokens in a model's answers."""
        return self.between.labels(self.get_model_label(model))

    def get_model_label(self, name: str) -> str:
        """Return a model's name as a metric label, or `(other)` if too many names are in use, see `add_label`."""
        return add_label(name, self._models)

    def get_tenant_label(self, name: str) -> str:
        """Return a tenant's name as a metric label, or `(other)` if too many names are in use, see `add_label`.

        The name is empty for an unknown key.
        """
        return add_label(name, self._tenants)

    def render(self) -> bytes:
        """Return the metrics in Prometheus's text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(name, meaning, labels, registry=self.registry)

    def _histogram(self, name: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, meaning, ("model",), buckets=buckets, registry=self.registry)
