"""Metrics of the server: Prometheus series in their own registry, and Triton's statistics.

Units are base units (seconds, MACs), and counters end in `_total`. Labels have few values whatever clients send:
a budget that is neither a named one nor the server's default is counted as `custom`.
"""

from __future__ import annotations

import collections
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
    multiprocess,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mexit.core.budget import NAMED_FRACTIONS
from mexit.runtime.prediction import UNSURE, Prediction
from mexit.runtime.rate_limiter import RateLimiter
from mexit.runtime.runtime import Runtime
from mexit.serving.profile_times import ProfileTimes

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
CUSTOM_BUDGET = "custom"
METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # variable; its folder holds the series of several processes
ROUTES = ("infer", "classify", "explain")
ERROR_STATUSES = (400, 401, 403, 404, 405, 408, 409, 413, 415, 499, 500, 501, 503, 504)
_BUCKETS_S = (
    *(1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)


@dataclass(frozen=True)
class Timings:
    """Durations of the phases of one answered request, nanoseconds.

    Attributes:
        queue: wait for a worker and for tokens of the rate limiter.
        parse: decompression and parsing.
        infer: inference.
        write: writing the response.
    """

    queue: int
    parse: int
    infer: int
    write: int

    @property
    def total(self) -> int:
        """From the arrival of the whole body to the finished response, nanoseconds."""
        return self.queue + self.parse + self.infer + self.write


class Metrics:
    """The metrics of one server. Safe to share between threads.

    Attributes:
        runtimes: runtime in service, by the name of its model.
    """

    def __init__(self, rate_limiter: RateLimiter | None) -> None:
        """Create the server's series, at zero: a rate over the first minutes needs their start.

        Args:
            rate_limiter: of the server.
        """
        registry = CollectorRegistry()
        folder = os.environ.get(METRICS_FOLDER)
        self._folder = None if folder is None else Path(folder)
        self._registry = registry if folder is None else CollectorRegistry()
        self.runtimes: dict[str, Runtime] = {}
        self._statistics: dict[tuple[str, str], TritonStatistics] = {}
        if folder is not None:
            multiprocess.MultiProcessCollector(self._registry, folder)  # type: ignore[no-untyped-call]
        self._registry.register(_DriftCollector(self.runtimes))
        if rate_limiter is not None:
            self._registry.register(_RateLimiterCollector(rate_limiter))
        self._registry.register(_ProcessesCollector(self._folder))
        self._predictions = Counter(
            "mexit_predictions_total", "Answered rows", ["model", "exit", "budget"], registry=registry
        )
        self._unsure = Counter(
            "mexit_unsure_total",
            "Answered rows that the reject option withheld",
            ["model", "budget"],
            registry=registry,
        )
        self._macs = Counter("mexit_macs_total", "Multiply-adds spent", ["model"], registry=registry)
        self._static_macs = Counter(
            "mexit_static_macs_total", "Multiply-adds that the static network would have spent", ["model"],
            registry=registry,
        )  # fmt: skip
        self._saved_macs = Counter(
            "mexit_saved_macs_total", "Multiply-adds that rows cheaper than the static network saved", ["model"],
            registry=registry,
        )  # fmt: skip
        self._profile_s = Counter(
            "mexit_profile_seconds_total", "Time of the answered rows by the latency profile", ["model"],
            registry=registry,
        )  # fmt: skip
        self._static_profile_s = Counter(
            "mexit_static_profile_seconds_total", "Time of the static network for the same rows", ["model"],
            registry=registry,
        )  # fmt: skip
        self._durations = Histogram(
            "mexit_request_duration_seconds", "From the head of a request to its response", ["model", "route"],
            registry=registry, buckets=_BUCKETS_S,
        )  # fmt: skip
        self._in_flight = Gauge(
            "mexit_requests_in_flight",
            "Requests in flight",
            ["model", "route"],
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._waiting: Gauge | None = None
        if rate_limiter is not None:
            self._waiting = Gauge(
                "mexit_rate_limiter_waiting", "Requests that wait for tokens", registry=registry,
                multiprocess_mode="livesum",
            )  # fmt: skip
        self._errors = Counter("mexit_errors_total", "Responses by error status", ["status"], registry=registry)
        for status in ERROR_STATUSES:
            self._errors.labels(str(status))

    def model(self, name: str, version: str, runtime: Runtime) -> ModelMetrics:
        """The series of a model, from zero for a new one; its statistics are those of a version."""
        statistics = self._statistics.setdefault((name, version), TritonStatistics(name, version, self._folder))
        budgets = {*NAMED_FRACTIONS, runtime.budget.text}
        for budget in (*budgets, CUSTOM_BUDGET):
            self._unsure.labels(name, budget)
            for k in runtime.bundle.manifest.numbers:
                self._predictions.labels(name, str(k), budget)
        for route in ROUTES:
            self._durations.labels(name, route)
            self._in_flight.labels(name, route)
        counters = _ModelCounters(
            self._predictions,
            self._unsure,
            self._macs.labels(name),
            self._static_macs.labels(name),
            self._saved_macs.labels(name),
            self._profile_s.labels(name),
            self._static_profile_s.labels(name),
        )
        return ModelMetrics(name, budgets, counters, statistics, ProfileTimes.of(runtime))

    @contextmanager
    def measure(self, route: str, model: str) -> Iterator[None]:
        """Count a request as in flight, and record its duration when it is answered or its client disconnected."""
        with self._in_flight.labels(model, route).track_inprogress(), self._durations.labels(model, route).time():
            yield

    def count_waiting(self, change: int) -> None:
        """Change the number of requests that wait for tokens of the rate limiter."""
        if self._waiting is not None:
            self._waiting.inc(change)

    def count_error(self, status: int) -> None:
        """Count a response with an error status."""
        self._errors.labels(str(status)).inc()

    def add_collector(self, collector: Collector) -> None:
        """Add series that are read at every scrape."""
        self._registry.register(collector)

    def samples(self) -> list[tuple[str, Mapping[str, str], float]]:
        """Name, labels and value of every series, those of all processes together."""
        families = self._registry.collect()
        return [(sample.name, sample.labels, sample.value) for family in families for sample in family.samples]

    def prometheus_text(self) -> bytes:
        """All series in Prometheus' text format."""
        return generate_latest(self._registry)


class _ModelCounters(NamedTuple):
    """Counters of rows and MACs; `predictions` and `unsure` still need their labels."""

    predictions: Counter
    unsure: Counter
    macs: Counter
    static_macs: Counter
    saved_macs: Counter
    profile_s: Counter
    static_profile_s: Counter


class ModelMetrics:
    """The metrics of one version of a model. Safe to share between threads.

    Attributes:
        statistics: counts of Triton's statistics extension.
    """

    def __init__(
        self,
        model: str,
        budgets: set[str],
        counters: _ModelCounters,
        statistics: TritonStatistics,
        times: ProfileTimes | None,
    ) -> None:
        self.statistics = statistics
        self._model, self._budgets, self._counters, self._times = model, budgets, counters, times

    def count_predictions(self, predictions: Sequence[Prediction]) -> None:
        """Count computed predictions of one request, also if its client has disconnected."""
        if not predictions:
            return
        budget = predictions[0].budget
        label = budget if budget in self._budgets else CUSTOM_BUDGET
        for k, count in collections.Counter(prediction.exit for prediction in predictions).items():
            self._counters.predictions.labels(self._model, str(k), label).inc(count)
        if unsure := sum(prediction.reason == UNSURE for prediction in predictions):
            self._counters.unsure.labels(self._model, label).inc(unsure)
        self._counters.macs.inc(sum(prediction.macs for prediction in predictions))
        static = sum(prediction.macs + prediction.saved_macs for prediction in predictions)
        self._counters.static_macs.inc(static)
        self._counters.saved_macs.inc(sum(max(0, prediction.saved_macs) for prediction in predictions))
        if self._times is not None:
            self._counters.profile_s.inc(sum(map(self._times.seconds, predictions)))
            self._counters.static_profile_s.inc(self._times.static_s * len(predictions))


class _DriftCollector(Collector):
    """Series of the drift watches, read from the runtimes at every scrape."""

    def __init__(self, runtimes: Mapping[str, Runtime]) -> None:
        self._runtimes = runtimes

    def collect(self) -> Iterator[Metric]:
        macs = GaugeMetricFamily("mexit_watch_macs", "Multiply-adds spent on the drift watch", labels=["model"])
        alarms = GaugeMetricFamily("mexit_drift_alarms", "Policies whose data has changed", labels=["model"])
        for name, runtime in list(self._runtimes.items()):
            if runtime.drift_watch is not None:
                macs.add_metric([name], runtime.stats.snapshot().watch_macs)
                alarms.add_metric([name], len(runtime.drift_watch.alarms))
        yield from (family for family in (macs, alarms) if family.samples)


class _RateLimiterCollector(Collector):
    """Series of the rate limiter, read at every scrape."""

    def __init__(self, rate_limiter: RateLimiter) -> None:
        self._rate_limiter = rate_limiter

    def collect(self) -> Iterator[Metric]:
        state, prefix = self._rate_limiter.state(), "mexit_rate_limiter_"
        help_text = "Rows without tokens for the segment, which answered with the exit before"
        refused = CounterMetricFamily(prefix + "refused_rows", help_text, labels=["segment"])
        for k, rows in enumerate(state.refused, start=2):
            refused.add_metric([str(k)], rows)
        yield refused
        yield CounterMetricFamily(prefix + "waits", "Requests that waited for tokens", value=state.waits)
        help_text = "Requests refused because their tokens would come too late"
        yield CounterMetricFamily(prefix + "overloaded", help_text, value=state.overloaded)
        yield GaugeMetricFamily(prefix + "clients", "Clients with a bucket", value=state.clients)
        if state.tokens is not None:
            yield GaugeMetricFamily(prefix + "tokens", "MACs in the bucket of all clients", value=state.tokens)


class _ProcessesCollector(Collector):
    """Memory, processor time and open files of all processes that answer requests, together."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def collect(self) -> Iterator[Metric]:
        pids = [os.getpid()] if self._folder is None else _live(self._folder)
        totals: dict[str, Metric] = {}
        for pid in pids:
            for family in ProcessCollector(pid=partial(int, pid), registry=None).collect():
                total = totals.setdefault(family.name, family)
                if total is not family:
                    oldest = family.name == "process_start_time_seconds"
                    values = total.samples[0].value, family.samples[0].value
                    total.samples[0] = total.samples[0]._replace(value=min(values) if oldest else sum(values))
        yield from totals.values()


def _live(folder: Path) -> list[int]:
    """The processes that share the folder and have not ended."""
    return [int(file.stem.rpartition("_")[2]) for file in folder.glob("gauge_livesum_*.db")]


def remove_live(folder: str, pid: int) -> None:
    """Forget the gauges of a process that has ended; its counters stay."""
    for file in Path(folder).glob(f"gauge_live*_{pid}.db"):
        file.unlink(missing_ok=True)


_PHASES = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")


class TritonStatistics:
    """Counts and nanoseconds of Triton's statistics extension, for a version of a model. Thread-safe.

    Each process counts in a file of its own; all files together are the statistics.
    """

    def __init__(self, model: str, version: str, folder: Path | None = None) -> None:
        """All counts start at zero.

        Args:
            model, version: of the statistics.
            folder: for the files of all processes; None: this process is the only one.
        """
        self._model, self._version = model, version
        self._lock = threading.Lock()
        self._files: Callable[[], Iterator[Path]] = lambda: iter(())
        size = 8 * (2 + 2 * len(_PHASES))
        if folder is None:
            self._counts = memoryview(bytearray(size)).cast("q")
        else:
            files = folder / "triton" / model / version
            files.mkdir(parents=True, exist_ok=True)
            own = files / f"{os.getpid()}.bin"
            own.write_bytes(bytes(size))
            with own.open("r+b") as file:
                self._counts = memoryview(mmap.mmap(file.fileno(), size)).cast("q")
            self._files = lambda: (path for path in files.glob("*.bin") if path != own)

    def record_success(self, rows: int, timings: Timings) -> None:
        """Record an answered inference request."""
        with self._lock:
            self._counts[0] += rows
            self._counts[1] = time.time_ns() // 10**6
            self._add("success", timings.total)
            self._add("queue", timings.queue)
            self._add("compute_input", timings.parse)
            self._add("compute_infer", timings.infer)
            self._add("compute_output", timings.write)

    def record_failure(self, nanoseconds: int) -> None:
        """Record an inference request that ended in an error."""
        with self._lock:
            self._add("fail", nanoseconds)

    def to_json(self) -> dict[str, Any]:
        """The entry of `model_stats` in the answer to `GET /v2/models/{m}/stats`."""
        with self._lock:
            counts = [self._counts.tolist()]
        others = [path.read_bytes() for path in self._files()]
        counts += [memoryview(content).cast("q").tolist() for content in others if len(content) == self._counts.nbytes]
        rows, _, *durations = map(sum, zip(*counts, strict=True))
        pairs = zip(durations[::2], durations[1::2], strict=True)
        stats = {name: {"count": count, "ns": ns} for name, (count, ns) in zip(_PHASES, pairs, strict=True)}
        return {
            "name": self._model,
            "version": self._version,
            "last_inference": max(count[1] for count in counts),
            "inference_count": rows,
            "execution_count": stats["success"]["count"],
            "inference_stats": stats,
            "batch_stats": [],
        }

    def _add(self, name: str, nanoseconds: int) -> None:
        index = 2 + 2 * _PHASES.index(name)
        self._counts[index] += 1
        self._counts[index + 1] += nanoseconds
