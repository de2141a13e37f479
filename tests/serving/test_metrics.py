"""The server's metrics agree with the requests, and their number stays small whatever clients send."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from servers import INFER, Server, hook_runtime, infer_body, serve_runtime, start, wait_until

from mexit import Runtime

Images = NDArray[np.float32]


def ask(server: Server, images: Images, budget: str) -> int:
    return int(server.json("POST", INFER, infer_body(images, mexit_budget=budget))[0])


def test_predictions_and_macs(server: Server, runtime: Runtime, images: Images) -> None:
    """Differences of counters, because other tests use the same server."""

    def counts(budget: str) -> list[float]:
        exits = [
            server.series("mexit_predictions_total", exit=str(k), budget=budget, model="digits") for k in (1, 2, 3)
        ]
        return [*exits, *(server.series(f"mexit_{kind}macs_total") for kind in ("", "static_", "saved_"))]

    for budget, label in (("low", "low"), ("full", "full"), ("60%", "custom")):
        before = counts(label)
        assert ask(server, images, budget) == 200
        expected = runtime(images, budget=budget)
        exits = [sum(prediction.exit == k for prediction in expected) for k in (1, 2, 3)]
        costs = [
            sum(prediction.macs for prediction in expected),
            int(runtime.costs.static) * len(images),
            sum(max(0, prediction.saved_macs) for prediction in expected),
        ]
        assert np.subtract(counts(label), before).tolist() == [*exits, *costs]


def test_series_begin_at_zero(digits_bundle: Path) -> None:
    """Before the first request, so that `rate` and `increase` see the first events."""
    with serve_runtime(hook_runtime(digits_bundle, lambda _: None)) as fresh:
        text = fresh.ask("GET", "/metrics")[2].decode()
    for budget in ("low", "medium", "high", "full", "custom"):
        for k in (1, 2, 3):
            assert f'mexit_predictions_total{{budget="{budget}",exit="{k}",model="digits"}} 0.0' in text
    for series in (
        *(f'mexit_{kind}macs_total{{model="digits"}}' for kind in ("", "static_", "saved_")),
        *(f'mexit_errors_total{{status="{status}"}}' for status in (400, 404, 413, 499, 500, 503, 504)),
        *(f'mexit_requests_in_flight{{model="digits",route="{route}"}}' for route in ("infer", "classify")),
        *(f'mexit_request_duration_seconds_count{{model="digits",route="{route}"}}' for route in ("infer", "classify")),
    ):
        assert f"{series} 0.0" in text, series


def test_every_response_is_counted_once_by_route(server: Server, images: Images) -> None:
    def counts() -> list[float]:
        name = "mexit_request_duration_seconds_count"
        return [
            server.series(name, route="infer"),
            server.series(name, route="classify"),
            server.series("mexit_errors_total", status="400"),
            server.series("mexit_errors_total", status="404"),
        ]

    before = counts()
    ask(server, images[:1], "low")
    ask(server, images[:1], "no budget")
    server.ask("POST", "/v1/classify", b"no image")
    server.ask("GET", "/nowhere")
    assert np.subtract(counts(), before).tolist() == [2, 1, 2, 1]
    assert server.series("mexit_requests_in_flight") == 0


def test_buckets_reach_down_to_100_microseconds(server: Server, images: Images) -> None:
    ask(server, images[:1], "low")
    text = server.ask("GET", "/metrics")[2].decode()
    assert 'mexit_request_duration_seconds_bucket{le="0.0001",model="digits",route="infer"}' in text
    assert server.ask("GET", "/metrics")[1]["content-type"].startswith("text/plain; version=0.0.4")


def test_clients_cannot_create_series(server: Server, images: Images) -> None:
    ask(server, images[:1], "70%")
    server.ask("GET", "/v9")

    def names() -> set[str]:
        lines = server.ask("GET", "/metrics")[2].decode().splitlines()
        return {line.rpartition(" ")[0] for line in lines if line.startswith("mexit_")}

    before = names()
    for i in range(50):
        assert ask(server, images[:1], f"{70 + i / 100}%") == 200
        server.ask("GET", f"/v2/models/m{i}")
        server.ask(f"VERB{i}", f"/route{i}")
    assert len(names()) <= len(before) + 4  # new ones may be exits of `custom` and statuses


def test_statistics_of_the_protocol(server: Server, images: Images) -> None:
    def counts() -> dict[str, int]:
        entry = server.json("GET", "/v2/models/digits/versions/1/stats")[1]["model_stats"][0]
        counts = {name: value["count"] for name, value in entry["inference_stats"].items()}
        assert entry["inference_stats"]["success"]["ns"] == sum(
            entry["inference_stats"][name]["ns"]
            for name in ("queue", "compute_input", "compute_infer", "compute_output")
        )
        return {**counts, "rows": entry["inference_count"], "executions": entry["execution_count"]}

    before = counts()
    ask(server, images[:7], "low")
    ask(server, images[:1], "no budget")
    after = counts()
    growth = {name: after[name] - before[name] for name in after}
    parts = dict.fromkeys(("queue", "compute_input", "compute_infer", "compute_output"), 1)
    assert growth == {"success": 1, "fail": 1, "rows": 7, "executions": 1, **parts}


@pytest.mark.parametrize("form", ["json", "raw"])
def test_no_delayed_acknowledgement(server: Server, images: Images, form: str) -> None:
    """With Nagle's algorithm, head and body in two sends take 40 ms; without, the median is about 1 ms."""
    body = infer_body(images[:1]) if form == "json" else images[:1].tobytes()
    headers = {} if form == "json" else {"Inference-Header-Content-Length": "0"}
    connection = server.connect()
    seconds = np.zeros((3, 70))
    for index in np.ndindex(seconds.shape):
        start_s = time.perf_counter()
        connection.request("POST", INFER, body, headers)
        assert connection.getresponse().read()
        seconds[index] = time.perf_counter() - start_s
    connection.close()
    assert np.median(seconds, axis=1).min() < 30e-3


@pytest.mark.slow
def test_drift_watch_series(digits_bundle: Path, images: Images, tmp_path: Path) -> None:
    """Images whose early answers differ from the full network's raise the alarm."""
    runtime = Runtime.open(digits_bundle, "40%")
    noisy = np.clip(np.random.default_rng(0).normal(0.5, 0.6, (4000, *images.shape[1:])), 0, 1).astype(np.float32)
    answers = zip(runtime(noisy), runtime(noisy, budget="full"), strict=True)
    changed = noisy[[early.exit < 3 and early.index != full.index for early, full in answers]][:64]
    assert len(changed) >= 8
    with start(digits_bundle, tmp_path, budget="40%", watch_drift=1.0) as own:
        own.json("POST", INFER, infer_body(images[:32]))
        wait_until(lambda: own.series("mexit_watch_macs") > 0)  # the check runs after the answer
        assert own.series("mexit_drift_alarms") == 0
        for _ in range(1000):
            own.json("POST", INFER, infer_body(changed))
            if own.series("mexit_drift_alarms"):
                break
        assert own.series("mexit_drift_alarms") == 1
        assert "the data has changed" in own.errors
        assert own.stop() == 0
