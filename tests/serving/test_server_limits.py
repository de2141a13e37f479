"""What a client can make the server hold or do is bounded: bytes, time, jobs, connections."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from server_process import Server, start

INFER = "/v2/models/digits/infer"
ONE_MIB = 1 << 20
LIMIT = ONE_MIB
SMALL = f"""
import functools
from mexit.serving import limits, listen
limits.Limits = functools.partial(limits.Limits, body_bytes={LIMIT}, held_bytes={2 * LIMIT}, body_s=1.0)
listen.HEAD_S = listen.SEND_S = 0.5
bind = listen.bind
def with_small_buffers(*where, **how):
    opened = bind(*where, **how)
    opened.setsockopt(listen.socket.SOL_SOCKET, listen.socket.SO_SNDBUF, 4096)
    return opened
listen.bind = with_small_buffers
"""
# Every inference waits until the test makes a file; two requests fit.
HELD = """
import functools, time
from mexit.runtime import Runtime
from mexit.serving import limits, service
limits.Limits = functools.partial(limits.Limits, jobs=2)
service._MAX_WORKERS = 1
begin = Runtime.begin
def slowly(self, tensor, **options):
    Path({started!r}).touch()
    while not Path({gate!r}).exists():
        time.sleep(0.005)
    return begin(self, tensor, **options)
Runtime.begin = slowly
"""


# Segment 1 of every request does; nothing is measured before.
HELD_IN_SEGMENT_1 = """
import time
from mexit.runtime.batching import BatchLatencyTable
from mexit.runtime.backends.ort import OrtBackend
BatchLatencyTable.measure = staticmethod(lambda *_: BatchLatencyTable.from_times((64,), [[1e-4] * 3]))
load = OrtBackend.__init__
def load_slowly(self, *args, **options):
    load(self, *args, **options)
    first, run = self.segments[0], self.segments[0].run
    def slowly(carried):
        Path({started!r}).touch()
        while not Path({gate!r}).exists():
            time.sleep(0.005)
        return run(carried)
    first.run = slowly
OrtBackend.__init__ = load_slowly
"""


def good(rows: int = 1) -> bytes:
    entry = {"name": "input", "shape": [rows, 1, 8, 8], "datatype": "FP32", "data": [0.5] * 64 * rows}
    return json.dumps({"inputs": [entry]}).encode()


@pytest.fixture(scope="module")
def small(digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that takes bodies of 1 MiB within a second, and heads, and lets responses wait, half of one."""
    with start(digits_bundle, tmp_path_factory.mktemp("small"), prelude=SMALL) as running:
        assert running.json("POST", INFER, good())[0] == 200
        yield running


class Held:
    """A server whose inference stands still until `release`."""

    def __init__(self, server: Server, directory: Path) -> None:
        self.server = server
        self._gate, self._started = directory / "gate", directory / "started"

    def release(self) -> None:
        self._gate.touch()

    def wait_until_working(self) -> None:
        wait_until(self._started.exists)


@pytest.fixture
def held(digits_bundle: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Held]:
    """A parameter may bring another prelude or options of the server."""
    options = {"prelude": HELD, **getattr(request, "param", {})}
    options["prelude"] = options["prelude"].format(gate=str(tmp_path / "gate"), started=str(tmp_path / "started"))
    with start(digits_bundle, tmp_path, **options) as running:
        yield Held(running, tmp_path)


def wait_until(condition: Any, within_s: float = 10.0) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)


def error_of(answer: tuple[int, dict[str, str], bytes]) -> tuple[int, str]:
    return answer[0], json.loads(answer[2])["error"]


def test_announced_size_over_64_mib_is_refused_unread(server: Server) -> None:
    """Nothing of the body is ever sent, and the answer is there."""
    connection = server.connect()
    connection.putrequest("POST", INFER)
    connection.putheader("Content-Length", str((64 << 20) + 1))
    connection.endheaders()
    response = connection.getresponse()
    assert response.status == 413
    assert json.loads(response.read())["error"] == "a request body has at most 67108864 bytes, found 67108865"
    connection.close()


@pytest.mark.parametrize("chunked", [False, True], ids=["announced", "chunked"])
def test_a_large_body_takes_no_memory(small: Server, chunked: bool) -> None:
    before = small.peak_bytes()
    connection = small.connect()
    blocks = (b"x" * ONE_MIB for _ in range(60))
    headers = {} if chunked else {"Content-Length": str(60 * ONE_MIB)}
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):  # hung up on while it is still sending
        connection.request("POST", INFER, blocks, headers, encode_chunked=chunked)
        response = connection.getresponse()
        assert (response.status, "at most 1048576 bytes" in response.read().decode()) == (413, True)
    connection.close()
    assert small.peak_bytes() - before < 16 * ONE_MIB


@pytest.mark.parametrize("path", [INFER, "/v1/classify", "/v2/repository/index"])
def test_every_route_that_reads_a_body_bounds_it(small: Server, path: str) -> None:
    assert small.ask("POST", path, b"x" * (LIMIT + 1))[0] == 413


def test_the_limit_counts_what_compression_hides(small: Server) -> None:
    before = small.peak_bytes()
    bomb = gzip.compress(b"0" * 200 * ONE_MIB)
    assert len(bomb) < LIMIT
    status, text = error_of(small.ask("POST", INFER, bomb, {"Content-Encoding": "gzip"}))
    assert (status, "more after gzip is undone" in text) == (413, True)
    assert small.peak_bytes() - before < 16 * ONE_MIB


def test_json_of_too_many_values_is_refused_unparsed(server: Server) -> None:
    before = server.peak_bytes()
    status, text = error_of(server.ask("POST", INFER, b"[" + b"0," * (4 << 20) + b"0]"))
    assert (status, text) == (413, "the JSON holds more than 4194304 values: send binary tensors instead")
    assert server.peak_bytes() - before < 64 * ONE_MIB


def test_bodies_at_hand_are_bounded_together(small: Server) -> None:
    """Two bodies fit; a third one is refused while they wait for their last byte, and fits afterwards."""
    waiting = [small.connect() for _ in range(2)]
    for connection in waiting:
        connection.putrequest("POST", "/v1/classify")
        connection.putheader("Content-Length", str(LIMIT))
        connection.endheaders()
        connection.send(b"x" * (LIMIT - 1))
    time.sleep(0.2)
    status, text = error_of(small.ask("POST", "/v1/classify", b"x" * 1000))
    assert (status, "are waiting already" in text) == (503, True)
    for connection in waiting:
        connection.send(b"x")
        assert connection.getresponse().status == 400
        connection.close()
    assert small.ask("POST", "/v1/classify", b"x" * 1000)[0] == 400


def test_a_slow_body_is_given_up(small: Server) -> None:
    connection = small.connect()
    connection.putrequest("POST", INFER)
    connection.putheader("Content-Length", "1000")
    connection.endheaders()
    connection.send(b"{")
    response = connection.getresponse()
    assert (response.status, response.getheader("connection")) == (408, "close")
    assert "within 1 s" in json.loads(response.read())["error"]
    connection.close()


@pytest.mark.parametrize("start_with", [b"", b"GET /v2 HT"], ids=["silent", "dripping"])
def test_connections_without_a_request_are_closed(small: Server, start_with: bytes) -> None:
    with socket.create_connection(("127.0.0.1", small.port), timeout=10) as opened:
        began = time.monotonic()
        for byte in start_with[:1] + b"x" * 100 if start_with else b"":
            try:
                opened.sendall(bytes([byte]))
            except OSError:
                break
            time.sleep(0.05)
            if time.monotonic() - began > 2:
                break
        try:
            closed = opened.recv(100) == b""
        except ConnectionError:
            closed = True
    assert closed
    assert time.monotonic() - began < 5


def test_a_response_that_nobody_takes_is_dropped(small: Server) -> None:
    """The connection is closed before the client has all of it, so that no response is held for ever."""
    with socket.socket() as opened:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        opened.settimeout(10)
        opened.connect(("127.0.0.1", small.port))
        body = good(1024)
        head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        opened.sendall(head.encode() + body)
        time.sleep(1.5)
        content = b"".join(iter(lambda: opened.recv(65536), b""))
    head, _, taken = content.partition(b"\r\n\r\n")
    announced = int(re.findall(rb"content-length: (\d+)", head)[0])
    assert head.startswith(b"HTTP/1.1 200")
    assert len(taken) < announced


def test_slow_clients_do_not_slow_others(small: Server) -> None:
    """100 connections drip a head each while one client asks as usual."""
    dripping = [socket.create_connection(("127.0.0.1", small.port)) for _ in range(100)]
    for opened in dripping:
        opened.sendall(b"POST /v1/cl")
    seconds = []
    for _ in range(50):
        began = time.perf_counter()
        assert small.json("POST", INFER, good())[0] == 200
        seconds.append(time.perf_counter() - began)
    for opened in dripping:
        opened.close()
    assert np.median(seconds) < 0.1


def test_many_tiny_chunks(small: Server) -> None:
    """50,000 chunks of a byte: slow for the sender, no memory and no harm for the server."""
    before = small.peak_bytes()
    connection = small.connect()
    connection.request("POST", INFER, (b"1\r\n \r\n" * 1000 for _ in range(50)), {"Transfer-Encoding": "chunked"})
    connection.send(b"0\r\n\r\n")
    assert connection.getresponse().status in (400, 408)
    connection.close()
    assert small.peak_bytes() - before < 16 * ONE_MIB


def ask_in_background(server: Server, answers: list[int]) -> threading.Thread:
    thread = threading.Thread(target=lambda: answers.append(server.ask("POST", INFER, good())[0]))
    thread.start()
    return thread


def test_a_full_queue_is_503_at_once(held: Held) -> None:
    """One request works, one waits; the third is told when to come back, and health still answers."""
    server, answers = held.server, list[int]()
    threads = [ask_in_background(server, answers)]
    held.wait_until_working()
    threads.append(ask_in_background(server, answers))
    wait_until(lambda: server.series("mexit_requests_in_flight") == 2)
    began = time.perf_counter()
    status, headers, body = server.ask("POST", INFER, good())
    seconds = time.perf_counter() - began
    assert (status, headers["retry-after"]) == (503, "1")
    assert json.loads(body)["error"] == "2 requests are waiting already"
    assert seconds < 0.5
    assert server.json("GET", "/v2/health/ready") == (200, {"ready": True})
    held.release()
    for thread in threads:
        thread.join()
    assert answers == [200, 200]
    assert server.json("POST", INFER, good())[0] == 200
    assert server.series("mexit_errors_total", status="503") == 1


def leave(server: Server) -> http.client.HTTPConnection:
    connection = server.connect()
    connection.request("POST", INFER, good(3))
    return connection


@pytest.mark.parametrize(
    ("held", "counted"), [({"batching": "off"}, 3), ({"batching": "continuous"}, 0)], indirect=["held"]
)
def test_clients_that_leave_keep_the_books_right(held: Held, counted: int) -> None:
    """One leaves while a worker has its request, and what is computed is counted; one while it waits (dropped)."""
    server = held.server
    working = leave(server)
    held.wait_until_working()
    waiting = leave(server)
    wait_until(lambda: server.series("mexit_requests_in_flight") == 2)
    working.close()
    waiting.close()
    wait_until(lambda: server.series("mexit_errors_total", status="499") == 1)
    assert server.series("mexit_requests_in_flight") == 1
    held.release()
    wait_until(lambda: server.series("mexit_requests_in_flight") == 0)
    assert server.series("mexit_predictions_total") == counted
    assert server.json("POST", INFER, good(2))[0] == 200
    assert server.series("mexit_predictions_total") == counted + 2
    assert server.series("mexit_request_duration_seconds_count", route="infer") == 3
    assert "Traceback" not in server.errors


@pytest.mark.parametrize(
    "held", [{"prelude": HELD_IN_SEGMENT_1, "budget": "full", "batching": "continuous"}], indirect=True
)
def test_a_client_that_leaves_stops_its_request_between_segments(held: Held) -> None:
    """What ran by then is counted, and nothing runs after it."""
    server = held.server
    working = leave(server)
    held.wait_until_working()
    working.close()
    wait_until(lambda: server.series("mexit_errors_total", status="499") == 1)
    held.release()
    wait_until(lambda: server.series("mexit_predictions_total") == 3)
    assert server.series("mexit_predictions_total", exit="1") == 3
    assert server.series("mexit_requests_in_flight") == 0
    assert server.json("POST", INFER, good(2))[0] == 200
    assert server.series("mexit_predictions_total", exit="3") == 2
    assert "Traceback" not in server.errors


def test_a_deadline_that_passes_in_the_queue(held: Held) -> None:
    server, answers = held.server, list[int]()
    thread = ask_in_background(server, answers)
    held.wait_until_working()
    late: list[tuple[int, Any]] = []
    request = {**json.loads(good()), "parameters": {"mexit_deadline_us": 20_000}}
    second = threading.Thread(target=lambda: late.append(server.json("POST", INFER, request)))
    second.start()
    wait_until(lambda: server.series("mexit_requests_in_flight") == 2)
    time.sleep(0.1)
    held.release()
    thread.join()
    second.join()
    assert answers == [200]
    assert late[0][0] == 504
    assert "in the queue, the deadline was 20 ms" in late[0][1]["error"]
