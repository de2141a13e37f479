"""The state of a server and of its models as JSON: `GET /v1/stats`. All counts are those of all processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mexit.core import versions
from mexit.core.budget import NAMED_FRACTIONS
from mexit.runtime.rate_limiter import RateLimiter
from mexit.runtime.token_buckets import RateLimit
from mexit.serving.repository import ModelRepository
from mexit.serving.service import Service

Json = dict[str, Any]


class _Series:
    """The series of one scrape of the metrics."""

    def __init__(self, samples: Sequence[tuple[str, Mapping[str, str], float]]) -> None:
        self._samples = samples

    def values(self, name: str, **labels: str) -> list[tuple[Mapping[str, str], float]]:
        """Labels and values of the series of a metric that have the given labels."""
        wanted = labels.items()
        return [(have, value) for found, have, value in self._samples if found == name and wanted <= have.items()]

    def total(self, name: str, **labels: str) -> float:
        """The sum of these series; 0 without one."""
        return sum(value for _, value in self.values(name, **labels))


def server_stats(repository: ModelRepository) -> Json:
    """The answer to `GET /v1/stats`; counts begin when a model is loaded for the first time."""
    server = repository.server
    series = _Series(server.metrics.samples())
    errors = {have["status"]: int(value) for have, value in series.values("mexit_errors_total")}
    started = series.values("process_start_time_seconds")
    return {
        "name": "mexit",
        "version": versions.VERSION,
        "state": "stopping" if server.stopping else "ready",
        "batching": server.batching,
        "started_s": started[0][1] if started else None,
        "memory_bytes": int(series.total("process_resident_memory_bytes")),
        "cpu_s": series.total("process_cpu_seconds_total"),
        "models": [_model(service, series) for service in repository.services],
        "repository": repository.index(),
        "rate_limiter": _rate_limiter(server.rate_limiter, series),
        "cameras": 0 if server.cameras is None else len(server.cameras.states()),
        "errors": {status: count for status, count in errors.items() if count},
    }


def _model(service: Service, series: _Series) -> Json:
    runtime, name = service.runtime, service.name
    manifest, timing = runtime.bundle.manifest, runtime.timing
    totals = {
        key: int(series.total(f"mexit_{key}_total", model=name))
        for key in ("macs", "static_macs", "saved_macs", "unsure")
    }
    return {
        "name": name,
        "version": service.version,
        "id": runtime.bundle.id,
        "engine": runtime.backend.engine,
        "precision": runtime.backend.precision,
        "threads": runtime.threads,
        "input": list(manifest.input.shape),
        "classes": len(manifest.classes),
        "budget": runtime.budget.text,
        "budgets": _budgets(service),
        "exits": _exits(service, series),
        "answers_by_budget": _by(series, "budget", name),
        "static_macs": int(manifest.costs.static),
        "static_us": None if timing is None else timing.profile.static_us,
        "totals": {
            **totals,
            "profile_s": series.total("mexit_profile_seconds_total", model=name),
            "static_profile_s": series.total("mexit_static_profile_seconds_total", model=name),
        },
        "latency": _latency(series, name),
        "in_flight": int(series.total("mexit_requests_in_flight", model=name)),
        "drift": _drift(service),
    }


def _exits(service: Service, series: _Series) -> list[Json]:
    """Cost and answers of each exit; exits of an earlier version that the present one lacks do not count."""
    manifest, timing = service.runtime.bundle.manifest, service.runtime.timing
    answers = _by(series, "exit", service.name)
    times = [None] * len(manifest.numbers) if timing is None else timing.profile.exits_us
    return [
        {"exit": number, "macs": macs, "us": us, "answers": answers.get(str(number), 0)}
        for number, macs, us in zip(manifest.numbers, manifest.cumulative_macs, times, strict=True)
    ]


def _by(series: _Series, label: str, model: str) -> dict[str, int]:
    """Answers of a model, by a label of their metric."""
    counts: dict[str, int] = {}
    for have, value in series.values("mexit_predictions_total", model=model):
        counts[have[label]] = counts.get(have[label], 0) + int(value)
    return counts


def _budgets(service: Service) -> Json:
    """The named budgets as shares of the static network's cost, and the lowest feasible share.

    They are shares of its MACs, or of its time where budgets are in time.
    """
    runtime = service.runtime
    costs = runtime.costs if runtime.timing is None else runtime.timing.costs
    lowest = costs.first / costs.static
    named = {name: lowest + way * (1 - lowest) for name, way in NAMED_FRACTIONS.items()}
    return {
        "unit": costs.unit,
        "calibrated": runtime.calibrated,
        "lowest": lowest,
        "named": named if runtime.calibrated else {"full": 1.0},
    }


def _latency(series: _Series, model: str) -> Json:
    """Durations of inference requests: upper edges of the buckets in seconds, and cumulative counts."""
    counts: dict[float, int] = {}
    for route in ("infer", "classify"):
        for have, value in series.values("mexit_request_duration_seconds_bucket", model=model, route=route):
            counts[float(have["le"])] = counts.get(float(have["le"]), 0) + int(value)
    edges = sorted(counts)
    return {"le_s": edges[:-1], "counts": [counts[edge] for edge in edges]}


def _drift(service: Service) -> Json | None:
    watch = service.runtime.drift_watch
    if watch is None:
        return None
    compared, disagreed = watch.totals
    macs = service.runtime.stats.snapshot().watch_macs
    return {"alarms": len(watch.alarms), "compared": compared, "disagreed": disagreed, "macs": macs}


def _rate_limiter(limiter: RateLimiter | None, series: _Series) -> Json | None:
    if limiter is None:
        return None
    state = limiter.state()
    return {
        "all": _limit(limiter.limits.overall),
        "client": _limit(limiter.limits.client),
        "tokens": state.tokens,
        "clients": state.clients,
        "waiting": int(series.total("mexit_rate_limiter_waiting")),
        "waits": state.waits,
        "overloaded": state.overloaded,
        "refused_rows": sum(state.refused),
    }


def _limit(limit: RateLimit | None) -> Json | None:
    return None if limit is None else {"macs_per_s": limit.rate, "burst_macs": limit.burst}
