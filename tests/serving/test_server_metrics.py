"""The server's books agree with what was sent, and stay small whatever is sent."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from numpy.typing import NDArray
from server_process import Server

from mexit import Runtime

INFER = "/v2/models/digits/infer"
Images = NDArray[np.float32]


def ask(server: Server, images: Images, budget: str) -> int:
    entry = {"name": "input", "shape": list(images.shape), "datatype": "FP32", "data": images.ravel().tolist()}
    return int(server.json("POST", INFER, {"inputs": [entry], "parameters": {"mexit_budget": budget}})[0])


def test_predictions_and_macs(server: Server, runtime: Runtime, images: Images) -> None:
    """Differences, because the server is shared with other tests."""

    def book(budget: str) -> list[float]:
        exits = [
            server.series("mexit_predictions_total", exit=str(k), budget=budget, model="digits") for k in (1, 2, 3)
        ]
        return [*exits, server.series("mexit_macs_total"), server.series("mexit_saved_macs_total")]

    for budget, label in (("low", "low"), ("full", "full"), ("60%", "custom")):
        before = book(label)
        assert ask(server, images, budget) == 200
        expected = runtime(images, budget=budget)
        exits = [sum(one.exit == k for one in expected) for k in (1, 2, 3)]
        costs = [sum(one.macs for one in expected), sum(one.saved_macs for one in expected)]
        assert np.subtract(book(label), before).tolist() == [*exits, *costs]


def test_every_answer_is_counted_once_by_route(server: Server, images: Images) -> None:
    def book() -> list[float]:
        name = "mexit_request_duration_seconds_count"
        return [
            server.series(name, route="infer"),
            server.series(name, route="classify"),
            server.series("mexit_errors_total", status="400"),
            server.series("mexit_errors_total", status="404"),
        ]

    before = book()
    ask(server, images[:1], "low")
    ask(server, images[:1], "no budget")
    server.ask("POST", "/v1/classify", b"no image")
    server.ask("GET", "/nowhere")
    assert np.subtract(book(), before).tolist() == [2, 1, 2, 1]
    assert server.series("mexit_requests_in_flight") == 0


def test_buckets_reach_down_to_100_microseconds(server: Server, images: Images) -> None:
    ask(server, images[:1], "low")
    text = server.ask("GET", "/metrics")[2].decode()
    assert 'mexit_request_duration_seconds_bucket{le="0.0001",route="infer"}' in text
    assert server.ask("GET", "/metrics")[1]["content-type"].startswith("text/plain; version=0.0.4")


def test_what_clients_send_makes_no_series(server: Server, images: Images) -> None:
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
    assert len(names()) <= len(before) + 4  # at most exits of `custom` and statuses that had not been seen


def test_statistics_of_the_protocol(server: Server, images: Images) -> None:
    def book() -> dict[str, int]:
        entry = server.json("GET", "/v2/models/digits/versions/1/stats")[1]["model_stats"][0]
        counts = {name: value["count"] for name, value in entry["inference_stats"].items()}
        assert entry["inference_stats"]["success"]["ns"] == sum(
            entry["inference_stats"][name]["ns"]
            for name in ("queue", "compute_input", "compute_infer", "compute_output")
        )
        return {**counts, "rows": entry["inference_count"], "executions": entry["execution_count"]}

    before = book()
    ask(server, images[:7], "low")
    ask(server, images[:1], "no budget")
    after = book()
    grown = {name: after[name] - before[name] for name in after}
    parts = dict.fromkeys(("queue", "compute_input", "compute_infer", "compute_output"), 1)
    assert grown == {"success": 1, "fail": 1, "rows": 7, "executions": 1, **parts}


@pytest.mark.parametrize("form", ["json", "raw"])
def test_a_small_request_waits_for_no_delayed_acknowledgement(server: Server, images: Images, form: str) -> None:
    """A head and a body in two delayed sends would take 40 ms; the best of three medians is about 1 ms."""
    entry = {"name": "input", "shape": [1, 1, 8, 8], "datatype": "FP32", "data": images[0].ravel().tolist()}
    body = json.dumps({"inputs": [entry]}).encode() if form == "json" else images[:1].tobytes()
    headers = {} if form == "json" else {"Inference-Header-Content-Length": "0"}
    connection = server.connect()
    seconds = np.zeros((3, 70))
    for place in np.ndindex(seconds.shape):
        began = time.perf_counter()
        connection.request("POST", INFER, body, headers)
        assert connection.getresponse().read()
        seconds[place] = time.perf_counter() - began
    connection.close()
    assert np.median(seconds, axis=1).min() < 20e-3
