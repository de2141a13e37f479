"""A rate-limited server under real HTTP: a flood that others do not notice; who must wait, and who is refused."""

from __future__ import annotations

import http.client
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
from server_process import Server, start

from mexit import Runtime
from mexit.serving.refusals import AT_ONCE, MOST_S, PER_S, RefusalPace

INFER = "/v2/models/digits/infer"
BUDGET = "60%"
Images = NDArray[np.float32]


@pytest.fixture(scope="module")
def plain(mixed_bundle: Path) -> Runtime:
    return Runtime.open(mixed_bundle, BUDGET)


@pytest.fixture(scope="module")
def costs(plain: Runtime) -> tuple[int, ...]:
    return plain.bundle.manifest.cumulative_macs


def body(images: Images, **parameters: object) -> bytes:
    entry = {"name": "input", "shape": list(images.shape), "datatype": "FP32", "data": images.ravel().tolist()}
    return json.dumps({"inputs": [entry], "parameters": parameters}).encode()


def ask(
    server: Server, content: bytes, address: str = "127.0.0.1", path: str = INFER, **headers: str
) -> tuple[int, dict[str, str], Any]:
    """A request from one of this machine's many loopback addresses."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, 30, source_address=(address, 0))
    try:
        connection.request("POST", path, content, headers)
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), json.loads(response.read())
    finally:
        connection.close()


def outputs(answer: Any) -> dict[str, list[Any]]:
    return {entry["name"]: entry["data"] for entry in answer["outputs"]}


class Flood:
    """Clients at one address that ask for the whole network again and again, without pause."""

    def __init__(self, server: Server, content: bytes, threads: int, address: str = "127.0.0.1") -> None:
        self.statuses: list[int] = []
        self._server, self._content, self._address = server, content, address
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]

    def _run(self) -> None:
        while not self._stop.is_set():
            self.statuses.append(ask(self._server, self._content, self._address)[0])

    def __enter__(self) -> Flood:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


@pytest.mark.parametrize("batching", ["off", "continuous"])
def test_a_flood_does_not_touch_a_client_within_its_rate(
    mixed_bundle: Path, tmp_path: Path, plain: Runtime, costs: tuple[int, ...], images: Images, batching: str
) -> None:
    """24 connections send batches without pause; another client asks as if they were not there."""
    full = costs[-1]
    rates = {"rate": 200 * full, "client_rate": 50 * full, "client_burst": 40 * full, "batching": batching}
    expected = plain.answer_tensor(images)
    with start(mixed_bundle, tmp_path, budget=BUDGET, **rates) as server:
        began = time.monotonic()
        with Flood(server, body(images[:32], mexit_budget="full"), 24) as flood:
            time.sleep(0.5)
            for image, usual in zip(images[:25, None], expected, strict=False):
                status, _, answer = ask(server, body(image), "127.0.0.2")
                assert status == 200
                found = outputs(answer)
                assert (found["label"], found["exit"]) == ([usual.index], [usual.exit])
                assert found["probabilities"] == pytest.approx(usual.probabilities, abs=1e-6)
                assert answer["parameters"]["mexit_rate_limited_rows"] == 0
                time.sleep(0.1)
        seconds = time.monotonic() - began
        assert set(flood.statuses) == {200, 503}
        attacker = server.series("mexit_macs_total") - sum(found.macs for found in expected[:25])
        assert 20 * full * seconds < attacker <= 40 * full + 50 * full * seconds
        assert server.series("mexit_rate_limiter_refused_rows_total", segment="2") > 0
        assert server.series("mexit_rate_limiter_clients") == 2
        assert server.stop() == 0


@pytest.fixture(scope="module")
def frugal(
    mixed_bundle: Path, tmp_path_factory: pytest.TempPathFactory, costs: tuple[int, ...]
) -> Iterator[Server]:
    """A server that each client may ask for four full images at once, and for none again while the tests run."""
    rates = {"client_rate": costs[-1] // 1000, "client_burst": 4 * costs[-1]}
    with start(mixed_bundle, tmp_path_factory.mktemp("frugal"), budget=BUDGET, **rates) as running:
        yield running


def test_who_has_no_tokens_is_told_when_to_come_back(frugal: Server, images: Images) -> None:
    before = frugal.series("mexit_rate_limiter_overloaded_total")
    assert ask(frugal, body(images[:4], mexit_budget="full"), "127.0.0.11")[0] == 200
    began = time.monotonic()
    status, headers, answer = ask(frugal, body(images[:1]), "127.0.0.11")
    assert time.monotonic() - began < 2
    assert status == 503
    assert "no tokens to start 1 row within 5000 ms" in answer["error"]
    assert 100 < int(headers["retry-after"]) < 200  # exit 1 costs about a sixth of the network, 160 s of this rate
    assert frugal.series("mexit_rate_limiter_overloaded_total") == before + 1
    assert ask(frugal, body(images[:1]), "127.0.0.12")[0] == 200


def test_who_asks_without_pause_is_refused_at_a_pace(frugal: Server, images: Images) -> None:
    """Ten refusals at once, then each connection a second at most; somebody else's first one is not held back."""
    assert ask(frugal, body(images[:4], mexit_budget="full"), "127.0.0.51")[0] == 200
    with Flood(frugal, body(images[:1]), 24, "127.0.0.51") as flood:
        time.sleep(2)
        assert 12 <= len(flood.statuses) <= AT_ONCE + 3 * 24
        assert ask(frugal, body(images[:4], mexit_budget="full"), "127.0.0.52")[0] == 200
        began = time.monotonic()
        assert ask(frugal, body(images[:1]), "127.0.0.52")[0] == 503
        assert time.monotonic() - began < 0.5
    assert set(flood.statuses) == {503}


def test_the_pace_of_refusals() -> None:
    now_s = [100.0]
    pace = RefusalPace(lambda: now_s[0])
    assert [pace.delay_s("a") for _ in range(AT_ONCE)] == [0.0] * AT_ONCE
    assert [pace.delay_s("a") for _ in range(3)] == pytest.approx([1 / PER_S, 2 / PER_S, 3 / PER_S])
    assert pace.delay_s("b") == 0.0
    assert max(pace.delay_s("a") for _ in range(1000)) == MOST_S
    now_s[0] += MOST_S + AT_ONCE / PER_S
    assert pace.delay_s("a") == 0.0
    for client in range(10_000):
        now_s[0] += 1.0
        pace.delay_s(str(client))
    assert len(pace._due_s) <= 4096


def test_forwarded_headers_are_not_believed(frugal: Server, images: Images) -> None:
    assert ask(frugal, body(images[:4], mexit_budget="full"), "127.0.0.21")[0] == 200
    for name in ("X-Forwarded-For", "Forwarded", "X-Real-IP"):
        value = "for=127.0.0.99" if name == "Forwarded" else "127.0.0.99"
        assert ask(frugal, body(images[:1]), "127.0.0.21", **{name: value})[0] == 503


def test_rows_that_cannot_go_on_say_so(frugal: Server, images: Images, costs: tuple[int, ...]) -> None:
    """Ten rows begin and some of them go on; then the tokens are gone."""
    status, _, answer = ask(frugal, body(images[:10], mexit_budget="full", mexit_receipts=True), "127.0.0.31")
    assert status == 200
    receipts = json.loads(answer["parameters"]["mexit_receipts"])
    rate_limited = [receipt for receipt in receipts if receipt["reason"] == "rate-limit"]
    assert answer["parameters"]["mexit_rate_limited_rows"] == len(rate_limited) > 0
    assert sum(receipt["macs"] for receipt in receipts) == sum(outputs(answer)["macs"]) <= 4 * costs[-1]


def test_each_token_is_a_client(
    mixed_bundle: Path, tmp_path: Path, images: Images, costs: tuple[int, ...]
) -> None:
    rates = {"client_rate": costs[-1] // 1000, "client_burst": 4 * costs[-1], "token": "one, two"}
    with start(mixed_bundle, tmp_path, budget=BUDGET, **rates) as server:

        def status(token: str, rows: int, address: str) -> int:
            content = body(images[:rows], mexit_budget="full")
            return ask(server, content, address, Authorization=f"Bearer {token}")[0]

        assert [status("one", 4, "127.0.0.1"), status("one", 1, "127.0.0.2")] == [200, 503]
        assert [status("two", 4, "127.0.0.1"), status("two", 1, "127.0.0.1")] == [200, 503]
        assert status("one, two", 1, "127.0.0.1") == 401
        assert server.stop() == 0


def test_a_request_waits_for_its_tokens_and_leaves_the_workers_to_others(
    mixed_bundle: Path, tmp_path: Path, images: Images, costs: tuple[int, ...]
) -> None:
    """A client that has spent everything waits for half a second, several times over; another one does not."""
    rates = {"client_rate": 2 * costs[0], "client_burst": costs[-1]}
    with start(mixed_bundle, tmp_path, budget=BUDGET, **rates) as server:
        assert ask(server, body(images[:1], mexit_budget="full"))[0] == 200
        found: list[int] = []
        content = body(images[:1], mexit_max_exit=1)
        waiting = [threading.Thread(target=lambda: found.append(ask(server, content)[0])) for _ in range(4)]
        for thread in waiting:
            thread.start()
        began = time.monotonic()
        while server.series("mexit_rate_limiter_waiting") < 3:
            assert time.monotonic() - began < 10, "they wait elsewhere"
            time.sleep(0.01)
        began = time.monotonic()
        assert ask(server, content, "127.0.0.2")[0] == 200
        assert time.monotonic() - began < 0.4
        for thread in waiting:
            thread.join()
        assert time.monotonic() - began > 0.8
        assert found == [200] * 4
        assert server.series("mexit_rate_limiter_waiting") == 0
        assert server.series("mexit_rate_limiter_waits_total") >= 3
        entry = server.json("GET", "/v2/models/digits/stats")[1]["model_stats"][0]["inference_stats"]
        assert entry["queue"]["ns"] > 1.5e9
        assert server.stop() == 0


def test_receipts_come_when_asked_for(frugal: Server, plain: Runtime, test_digits: Any) -> None:
    buffer = io.BytesIO()
    Image.fromarray(test_digits[0][0]).save(buffer, "PNG")
    picture = buffer.getvalue()
    status, _, answer = ask(frugal, picture, "127.0.0.41", "/v1/classify?receipts=true")
    assert status == 200
    receipt = answer["receipt"]
    assert (receipt["exit"], receipt["macs"], receipt["model"]) == (
        answer["exit"],
        answer["macs"],
        plain.bundle.id,
    )
    assert receipt["queue_us"] > 0
    assert ask(frugal, picture, "127.0.0.41", "/v1/classify")[2]["receipt"] is None
    assert ask(frugal, picture, "127.0.0.41", "/v1/classify?receipts=1")[0] == 400
    image = plain.prepare(picture)
    assert "mexit_receipts" not in ask(frugal, body(image), "127.0.0.42")[2]["parameters"]
    status, _, answer = ask(frugal, body(image, mexit_receipts="yes"), "127.0.0.42")
    assert (status, answer["error"]) == (400, "mexit_receipts must be true or false, found 'yes'")
