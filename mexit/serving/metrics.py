"""What the server counts: Prometheus series in a registry of their own, and Triton's statistics.

Units are base units (seconds, MACs), counters end in `_total`. Every label has few values whatever clients
send: a budget that is neither a named one nor the server's own counts as `custom`.
"""

from __future__ import annotations

import threading
import time
from collections import Counter as Tally
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mexit.core.budget import NAMED_FRACTIONS
from mexit.runtime.prediction import Prediction
from mexit.runtime.rate_limiter import RateLimiterState
from mexit.serving.oip import VERSION

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
CUSTOM = "custom"
_BUCKETS_S = (
    *(1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)


@dataclass(frozen=True)
class Timings:
    """Where the time of one answered request went, in nanoseconds."""

    queue: int
    read: int
    infer: int
    write: int

    @property
    def total(self) -> int:
        """From the whole body being there to the response being ready."""
        return self.queue + self.read + self.infer + self.write


class Metrics:
    """The counters of one server; safe to share between threads."""

    def __init__(self, model: str, own_budget: str) -> None:
        """`own_budget` is the server's default, which may be any text; it gets a label of its own."""
        registry = CollectorRegistry()
        self._registry = registry
        self._model = model
        self._budgets = {*NAMED_FRACTIONS, own_budget}
        ProcessCollector(registry=registry)
        self._predictions = Counter(
            "mexit_predictions_total", "Answers given", ["model", "exit", "budget"], registry=registry
        )
        self._macs = Counter("mexit_macs_total", "Multiply-adds spent", ["model"], registry=registry)
        self._saved = Counter(
            "mexit_saved_macs_total", "Multiply-adds that the full network would have cost more", ["model"],
            registry=registry,
        )  # fmt: skip
        self._durations = Histogram(
            "mexit_request_duration_seconds", "From the head of a request to its response", ["route"],
            registry=registry, buckets=_BUCKETS_S,
        )  # fmt: skip
        self._in_flight = Gauge(
            "mexit_requests_in_flight", "Requests being answered", ["route"], registry=registry
        )
        self._errors = Counter("mexit_errors_total", "Responses by error status", ["status"], registry=registry)
        self._statistics = _Statistics()

    def watch_drift(self, watched_macs: Callable[[], float], alarms: Callable[[], float]) -> None:
        """Read two more series from the runtime whenever they are asked for."""
        spent = Gauge("mexit_watch_macs", "Multiply-adds spent on the drift watch so far", registry=self._registry)
        spent.set_function(watched_macs)
        raised = Gauge("mexit_drift_alarms", "Policies whose data has changed", registry=self._registry)
        raised.set_function(alarms)

    def watch_rate_limiter(self, state: Callable[[], RateLimiterState], waiting: Callable[[], int]) -> None:
        """Add the rate limiter's series, read whenever they are asked for; `waiting` requests have no tokens yet."""
        self._registry.register(_RateLimiterSeries(state, waiting))

    def started(self, route: str) -> None:
        """A request reached a route."""
        self._in_flight.labels(route).inc()

    def finished(self, route: str, seconds: float) -> None:
        """Its response is out, or its client gone."""
        self._in_flight.labels(route).dec()
        self._durations.labels(route).observe(seconds)

    def failed(self, status: int) -> None:
        """A response with an error status."""
        self._errors.labels(str(status)).inc()

    def predicted(self, predictions: Sequence[Prediction]) -> None:
        """Answers of one request; counted where they were computed, so a client that left changes nothing."""
        if not predictions:
            return
        budget = predictions[0].budget
        label = budget if budget in self._budgets else CUSTOM
        for k, count in Tally(prediction.exit for prediction in predictions).items():
            self._predictions.labels(self._model, str(k), label).inc(count)
        self._macs.labels(self._model).inc(sum(prediction.macs for prediction in predictions))
        self._saved.labels(self._model).inc(sum(prediction.saved_macs for prediction in predictions))

    def succeeded(self, rows: int, spans: Timings) -> None:
        """An inference request was answered; for the statistics."""
        self._statistics.succeeded(rows, spans)

    def refused(self, nanoseconds: int) -> None:
        """An inference request ended in an error; for the statistics."""
        self._statistics.refused(nanoseconds)

    def exposition(self) -> bytes:
        """All series, in Prometheus' text format."""
        return generate_latest(self._registry)

    def statistics(self) -> dict[str, Any]:
        """Answer to `GET /v2/models/{m}/stats`."""
        return self._statistics.report(self._model)


class _RateLimiterSeries(Collector):
    """What the rate limiter counts itself, at the moment of being asked."""

    def __init__(self, state: Callable[[], RateLimiterState], waiting: Callable[[], int]) -> None:
        self._state, self._waiting = state, waiting

    def collect(self) -> Iterator[Metric]:
        state = self._state()
        refused = CounterMetricFamily(
            "mexit_rate_limiter_refused_rows", "Rows that were not let into a segment", labels=["segment"]
        )
        for k, rows in enumerate(state.refused, start=2):
            refused.add_metric([str(k)], rows)
        yield refused
        yield CounterMetricFamily(
            "mexit_rate_limiter_waits", "Calls that had to wait for tokens", value=state.waits
        )
        yield CounterMetricFamily(
            "mexit_rate_limiter_overloaded", "Calls whose tokens would have come too late", value=state.overloaded
        )
        yield GaugeMetricFamily(
            "mexit_rate_limiter_waiting", "Requests that wait for tokens", value=self._waiting()
        )
        yield GaugeMetricFamily("mexit_rate_limiter_clients", "Clients with a bucket", value=state.clients)
        if state.tokens is not None:
            yield GaugeMetricFamily("mexit_rate_limiter_tokens", "Multiply-adds to spend now", value=state.tokens)


class _Statistics:
    """Counts and nanoseconds of Triton's statistics extension."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows = self._last_ms = 0
        self._counts: Tally[str] = Tally()
        self._nanoseconds: Tally[str] = Tally()

    def succeeded(self, rows: int, spans: Timings) -> None:
        with self._lock:
            self._rows += rows
            self._last_ms = time.time_ns() // 10**6
            self._add("success", spans.total)
            self._add("queue", spans.queue)
            self._add("compute_input", spans.read)
            self._add("compute_infer", spans.infer)
            self._add("compute_output", spans.write)

    def refused(self, nanoseconds: int) -> None:
        with self._lock:
            self._add("fail", nanoseconds)

    def _add(self, name: str, nanoseconds: int) -> None:
        self._counts[name] += 1
        self._nanoseconds[name] += nanoseconds

    def report(self, model: str) -> dict[str, Any]:
        names = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
        with self._lock:
            durations = {name: {"count": self._counts[name], "ns": self._nanoseconds[name]} for name in names}
            entry = {
                "name": model,
                "version": VERSION,
                "last_inference": self._last_ms,
                "inference_count": self._rows,
                "execution_count": self._counts["success"],
                "inference_stats": durations,
                "batch_stats": [],
            }
        return {"model_stats": [entry]}
