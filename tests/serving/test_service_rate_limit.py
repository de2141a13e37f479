"""A server with a rate limiter: floods, waiting for tokens, and receipts."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from servers import INFER, Client, Server, infer_body, outputs_of, start, wait_until

from mexit import Runtime

BUDGET = "60%"
Images = NDArray[np.float32]


@pytest.fixture(scope="module")
def unlimited(mixed_bundle: Path) -> Runtime:
    """The runtime with the same budget and no rate limiter."""
    return Runtime.open(mixed_bundle, BUDGET)


@pytest.fixture(scope="module")
def costs(unlimited: Runtime) -> tuple[int, ...]:
    return unlimited.bundle.manifest.cumulative_macs


def ask(
    server: Client, content: bytes, source: str = "127.0.0.1", path: str = INFER, **headers: str
) -> tuple[int, dict[str, str], Any]:
    """Send a request from one of the loopback addresses, each a client of its own."""
    status, response_headers, body = server.ask("POST", path, content, headers, source)
    return status, response_headers, json.loads(body)


class Flood:
    """Threads that send the same request from one address again and again."""

    def __init__(self, server: Client, content: bytes, threads: int, source: str = "127.0.0.1") -> None:
        self.statuses: list[int] = []
        self._request = (server, content, source)
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]

    def _run(self) -> None:
        while not self._stop.is_set():
            self.statuses.append(ask(*self._request)[0])

    def __enter__(self) -> Flood:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


@pytest.mark.slow
@pytest.mark.parametrize("batching", ["off", "continuous"])
def test_a_flood_does_not_affect_another_client(
    mixed_bundle: Path, tmp_path: Path, unlimited: Runtime, costs: tuple[int, ...], images: Images, batching: str
) -> None:
    """24 connections send batches without pause; a client within its rate gets all of its usual answers."""
    full = costs[-1]
    options = {"rate": 200 * full, "client_rate": 50 * full, "client_burst": 40 * full, "batching": batching}
    expected = unlimited.answer_tensor(images[:25])
    with start(mixed_bundle, tmp_path, budget=BUDGET, **options) as server:
        start_s = time.monotonic()
        with Flood(server, infer_body(images[:32], mexit_budget="full"), 24) as flood:
            wait_until(lambda: len(flood.statuses) > 24)
            for image, prediction in zip(images[:25, None], expected, strict=True):
                status, _, answer = ask(server, infer_body(image), "127.0.0.2")
                assert status == 200
                outputs = outputs_of(answer)
                assert (outputs["label"], outputs["exit"]) == ([prediction.index], [prediction.exit])
                assert outputs["probabilities"] == pytest.approx(prediction.probabilities, abs=1e-6)
                assert answer["parameters"]["mexit_rate_limited_rows"] == 0
                time.sleep(0.1)
        seconds = time.monotonic() - start_s
        assert set(flood.statuses) == {200, 503}
        flood_macs = server.series("mexit_macs_total") - sum(prediction.macs for prediction in expected)
        assert 40 * full < flood_macs <= 40 * full + 50 * full * seconds
        assert server.series("mexit_rate_limiter_refused_rows_total", segment="2") > 0
        assert server.series("mexit_rate_limiter_clients") == 2
        assert server.stop() == 0


@pytest.fixture(scope="module")
def frugal(mixed_bundle: Path, tmp_path_factory: pytest.TempPathFactory, costs: tuple[int, ...]) -> Iterator[Server]:
    """A server where each client has tokens for four full images, and practically no refill."""
    rates = {"client_rate": costs[-1] // 1000, "client_burst": 4 * costs[-1]}
    with start(mixed_bundle, tmp_path_factory.mktemp("frugal"), budget=BUDGET, **rates) as running:
        yield running


def test_a_client_without_tokens_gets_503(frugal: Server, images: Images) -> None:
    before = frugal.series("mexit_rate_limiter_overloaded_total")
    assert ask(frugal, infer_body(images[:4], mexit_budget="full"), "127.0.0.11")[0] == 200
    status, headers, answer = ask(frugal, infer_body(images[:1]), "127.0.0.11")
    assert status == 503
    assert "no tokens to start 1 row within 5000 ms" in answer["error"]
    assert 100 < int(headers["retry-after"]) < 200  # exit 1 costs about a sixth of the network, 160 s at this rate
    assert frugal.series("mexit_rate_limiter_overloaded_total") == before + 1
    assert frugal.series("mexit_rate_limiter_waiting") == 0
    assert ask(frugal, infer_body(images[:1]), "127.0.0.12")[0] == 200


def test_forwarded_headers_are_ignored(frugal: Server, images: Images) -> None:
    assert ask(frugal, infer_body(images[:4], mexit_budget="full"), "127.0.0.21")[0] == 200
    for name in ("X-Forwarded-For", "Forwarded", "X-Real-IP"):
        value = "for=127.0.0.99" if name == "Forwarded" else "127.0.0.99"
        assert ask(frugal, infer_body(images[:1]), "127.0.0.21", **{name: value})[0] == 503


def test_rows_stopped_by_the_rate_limiter(frugal: Server, images: Images, costs: tuple[int, ...]) -> None:
    """Ten rows begin, and some of them go on until the tokens are spent."""
    status, _, answer = ask(frugal, infer_body(images[:10], mexit_budget="full", mexit_receipts=True), "127.0.0.31")
    assert status == 200
    receipts = json.loads(answer["parameters"]["mexit_receipts"])
    limited = [receipt for receipt in receipts if receipt["reason"] == "rate-limit"]
    assert answer["parameters"]["mexit_rate_limited_rows"] == len(limited) > 0
    assert sum(receipt["macs"] for receipt in receipts) == sum(outputs_of(answer)["macs"]) <= 4 * costs[-1]


def test_each_token_is_a_client(mixed_bundle: Path, tmp_path: Path, images: Images, costs: tuple[int, ...]) -> None:
    options = {"client_rate": costs[-1] // 1000, "client_burst": 4 * costs[-1], "token": "one, two"}
    with start(mixed_bundle, tmp_path, budget=BUDGET, **options) as server:

        def status(token: str, rows: int, source: str) -> int:
            content = infer_body(images[:rows], mexit_budget="full")
            return ask(server, content, source, Authorization=f"Bearer {token}")[0]

        assert [status("one", 4, "127.0.0.1"), status("one", 1, "127.0.0.2")] == [200, 503]
        assert [status("two", 4, "127.0.0.1"), status("two", 1, "127.0.0.1")] == [200, 503]
        assert status("one, two", 1, "127.0.0.1") == 401
        assert server.stop() == 0


@pytest.mark.slow
def test_requests_that_wait_for_tokens_hold_no_worker(
    mixed_bundle: Path, tmp_path: Path, images: Images, costs: tuple[int, ...]
) -> None:
    """Four requests of one client wait for tokens; another client is answered meanwhile, with one worker."""
    options = {"client_rate": 2 * costs[0], "client_burst": costs[-1], "limits": {"workers": 1}}
    with start(mixed_bundle, tmp_path, budget=BUDGET, **options) as server:
        assert ask(server, infer_body(images[:1], mexit_budget="full"))[0] == 200
        statuses: list[int] = []
        content = infer_body(images[:1], mexit_max_exit=1)
        waiting = [threading.Thread(target=lambda: statuses.append(ask(server, content)[0])) for _ in range(4)]
        for thread in waiting:
            thread.start()
        wait_until(lambda: server.series("mexit_rate_limiter_waiting") >= 3)
        assert ask(server, content, "127.0.0.2")[0] == 200
        for thread in waiting:
            thread.join()
        assert statuses == [200] * 4
        assert server.series("mexit_rate_limiter_waiting") == 0
        assert server.series("mexit_rate_limiter_waits_total") >= 3
        statistics = server.json("GET", "/v2/models/digits/stats")[1]["model_stats"][0]["inference_stats"]
        assert statistics["queue"]["ns"] > 1.5e9  # the refill alone takes this long
        assert server.stop() == 0


def test_receipts_on_request(frugal: Server, unlimited: Runtime, test_digits: Any) -> None:
    buffer = io.BytesIO()
    Image.fromarray(test_digits[0][0]).save(buffer, "PNG")
    png = buffer.getvalue()
    status, _, answer = ask(frugal, png, "127.0.0.41", "/v1/classify?receipts=true")
    assert status == 200
    receipt, model = answer["receipt"], unlimited.bundle.id
    assert (receipt["exit"], receipt["macs"], receipt["model"]) == (answer["exit"], answer["macs"], model)
    assert receipt["queue_us"] > 0
    assert ask(frugal, png, "127.0.0.41", "/v1/classify")[2]["receipt"] is None
    assert ask(frugal, png, "127.0.0.41", "/v1/classify?receipts=1")[0] == 400
    image = unlimited.prepare(png)
    assert "mexit_receipts" not in ask(frugal, infer_body(image), "127.0.0.42")[2]["parameters"]
    status, _, answer = ask(frugal, infer_body(image, mexit_receipts="yes"), "127.0.0.42")
    assert (status, answer["error"]) == (400, "mexit_receipts must be true or false, found 'yes'")
