"""Limits of the server: bytes, time, requests and connections."""

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
from numpy.typing import NDArray
from servers import INFER, Client, Server, hook_runtime, infer_body, serve_runtime, start, wait_until

from mexit import Runtime
from mexit.serving.limits import Limits

ONE_MIB = 1 << 20
LIMIT = ONE_MIB
SMALL = {"body_bytes": LIMIT, "held_bytes": 2 * LIMIT, "body_s": 1.0, "head_s": 0.5}


def body(rows: int = 1) -> bytes:
    return infer_body(np.full((rows, 1, 8, 8), 0.5, np.float32))


def error_of(answer: tuple[int, dict[str, str], bytes]) -> tuple[int, str]:
    return answer[0], json.loads(answer[2])["error"]


@pytest.fixture(scope="module")
def small(digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with small limits for bodies and heads."""
    with start(digits_bundle, tmp_path_factory.mktemp("small"), limits=SMALL) as running:
        assert running.json("POST", INFER, body())[0] == 200
        yield running


def test_an_announced_size_over_64_mib_is_refused_unread(server: Server) -> None:
    """The answer comes although no byte of the body is sent."""
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
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):  # the server closes while the client sends
        connection.request("POST", INFER, blocks, headers, encode_chunked=chunked)
        response = connection.getresponse()
        assert (response.status, "at most 1048576 bytes" in response.read().decode()) == (413, True)
    connection.close()
    assert small.peak_bytes() - before < 16 * ONE_MIB


@pytest.mark.parametrize("path", [INFER, "/v1/classify", "/v2/repository/index"])
def test_every_route_with_a_body_bounds_it(small: Server, path: str) -> None:
    assert small.ask("POST", path, b"x" * (LIMIT + 1))[0] == 413


def test_the_limit_applies_after_decompression(small: Server) -> None:
    before = small.peak_bytes()
    bomb = gzip.compress(b"0" * 200 * ONE_MIB)
    assert len(bomb) < LIMIT
    status, message = error_of(small.ask("POST", INFER, bomb, {"Content-Encoding": "gzip"}))
    assert (status, "more after gzip decompression" in message) == (413, True)
    assert small.peak_bytes() - before < 16 * ONE_MIB


def test_json_of_too_many_values_is_refused_unparsed(server: Server) -> None:
    before = server.peak_bytes()
    status, message = error_of(server.ask("POST", INFER, b"[" + b"0," * (4 << 20) + b"0]"))
    assert (status, message) == (413, "the JSON holds more than 4194304 values: send binary tensors instead")
    assert server.peak_bytes() - before < 64 * ONE_MIB


def test_bodies_in_memory_are_bounded_together(small: Server) -> None:
    """Two bodies fit. A third one is refused while they lack their last byte, and fits afterwards."""
    pending = [small.connect() for _ in range(2)]
    for connection in pending:
        connection.putrequest("POST", "/v1/classify")
        connection.putheader("Content-Length", str(LIMIT))
        connection.endheaders()
        connection.send(b"x" * (LIMIT - 1))
    time.sleep(0.2)
    status, message = error_of(small.ask("POST", "/v1/classify", b"x" * 1000))
    assert (status, "are waiting already" in message) == (503, True)
    for connection in pending:
        connection.send(b"x")
        assert connection.getresponse().status == 400
        connection.close()
    assert small.ask("POST", "/v1/classify", b"x" * 1000)[0] == 400


def test_a_slow_body_times_out(small: Server) -> None:
    connection = small.connect()
    connection.putrequest("POST", INFER)
    connection.putheader("Content-Length", "1000")
    connection.endheaders()
    connection.send(b"{")
    response = connection.getresponse()
    assert (response.status, response.getheader("connection")) == (408, "close")
    assert "within 1 s" in json.loads(response.read())["error"]
    connection.close()


@pytest.mark.parametrize("first_bytes", [b"", b"GET /v2 HT"], ids=["silent", "slow"])
def test_connections_without_a_request_are_closed(small: Server, first_bytes: bytes) -> None:
    """Also while the client sends a byte of the head every 50 ms."""
    with socket.create_connection(("127.0.0.1", small.port), timeout=30) as connection:
        connection.sendall(first_bytes)
        with contextlib.suppress(OSError):
            for _ in range(200 if first_bytes else 0):
                time.sleep(0.05)
                connection.sendall(b"x")
            assert connection.recv(100) == b""
            return
        assert first_bytes, "the connection of a silent client ended with an error"


def test_an_unread_response_is_dropped(digits_bundle: Path) -> None:
    """The connection is closed before the client has the whole response, so the server need not keep it."""
    runtime = Runtime.open(digits_bundle, "low")
    with serve_runtime(runtime, Limits(send_s=0.5), send_buffer=4096) as server, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.settimeout(30)
        connection.connect(("127.0.0.1", server.port))
        content = body(1024)
        head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content)
        wait_until(lambda: server.series("mexit_requests_in_flight") == 0)
        time.sleep(1.5)
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    response_head, _, response_body = received.partition(b"\r\n\r\n")
    assert response_head.startswith(b"HTTP/1.1 200")
    assert len(response_body) < int(re.findall(rb"content-length: (\d+)", response_head)[0])


def test_slow_clients_do_not_stop_others(small: Server) -> None:
    """100 connections hold an unfinished head while another client gets its answers."""
    slow = [socket.create_connection(("127.0.0.1", small.port)) for _ in range(100)]
    for connection in slow:
        connection.sendall(b"POST /v1/cl")
    assert [small.json("POST", INFER, body())[0] for _ in range(20)] == [200] * 20
    for connection in slow:
        connection.close()


def test_many_tiny_chunks_take_no_memory(small: Server) -> None:
    before = small.peak_bytes()
    connection = small.connect()
    connection.request("POST", INFER, (b"1\r\n \r\n" * 1000 for _ in range(50)), {"Transfer-Encoding": "chunked"})
    connection.send(b"0\r\n\r\n")
    assert connection.getresponse().status in (400, 408)
    connection.close()
    assert small.peak_bytes() - before < 16 * ONE_MIB


class Held:
    """A server with one worker and room for two requests, whose segment 1 stands still until `release`."""

    def __init__(self, bundle: Path, batching: str) -> None:
        self._gate, self._entered = threading.Event(), threading.Event()
        self._gate.set()  # the batching scheduler measures segments when the server starts
        runtime = hook_runtime(bundle, self._hold)
        self._server = serve_runtime(runtime, Limits(workers=1, requests=2, short_s=0), batching=batching)

    def __enter__(self) -> tuple[Client, Held]:
        client = self._server.__enter__()
        self._gate.clear()
        self._entered.clear()
        return client, self

    def __exit__(self, *error: Any) -> None:
        self.release()
        self._server.__exit__(*error)

    def _hold(self, _: NDArray[np.float32]) -> None:
        self._entered.set()
        assert self._gate.wait(60)

    def wait_until_running(self) -> None:
        assert self._entered.wait(30)

    def release(self) -> None:
        self._gate.set()


def ask_in_thread(server: Client, content: bytes) -> tuple[threading.Thread, list[Any]]:
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(server.json("POST", INFER, content)))
    thread.start()
    return thread, answers


def test_a_full_queue_answers_503(digits_bundle: Path) -> None:
    """One request runs and one waits. The third is refused meanwhile, and health is answered."""
    with Held(digits_bundle, "off") as (server, held):
        first, first_answers = ask_in_thread(server, body())
        held.wait_until_running()
        second, second_answers = ask_in_thread(server, body())
        wait_until(lambda: server.series("mexit_requests_in_flight") == 2)
        status, headers, content = server.ask("POST", INFER, body())
        assert (status, headers["retry-after"]) == (503, "1")
        assert json.loads(content)["error"] == "2 requests are waiting already"
        with socket.create_connection(("127.0.0.1", server.port)) as unsent:
            unsent.sendall(f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n\r\n".encode())
            assert unsent.recv(999).startswith(b"HTTP/1.1 503 "), "refused before the body is read"
        assert server.json("GET", "/v2/health/ready") == (200, {"ready": True})
        held.release()
        first.join()
        second.join()
        assert [first_answers[0][0], second_answers[0][0]] == [200, 200]
        assert server.json("POST", INFER, body())[0] == 200
        assert server.series("mexit_errors_total", status="503") == 2


def send(server: Client) -> http.client.HTTPConnection:
    connection = server.connect()
    connection.request("POST", INFER, body(3))
    return connection


@pytest.mark.parametrize(("batching", "last_exit", "cancelled"), [("off", "3", 1), ("continuous", "1", 2)])
def test_requests_of_clients_that_disconnect(
    digits_bundle: Path, caplog: pytest.LogCaptureFixture, batching: str, last_exit: str, cancelled: int
) -> None:
    """A queued request is dropped. Of a running one, what is computed is counted: with batching the segment."""
    with Held(digits_bundle, batching) as (server, held):
        running = send(server)
        held.wait_until_running()
        queued = send(server)
        wait_until(lambda: server.series("mexit_requests_in_flight") == 2)
        running.close()
        queued.close()
        wait_until(lambda: server.series("mexit_errors_total", status="499") >= cancelled)
        held.release()
        wait_until(lambda: server.series("mexit_requests_in_flight") == 0)
        wait_until(lambda: server.series("mexit_predictions_total") == 3)
        assert server.series("mexit_predictions_total", exit=last_exit) == 3
        assert server.json("POST", INFER, body(2))[0] == 200
        assert server.series("mexit_predictions_total") == 5
        assert server.series("mexit_request_duration_seconds_count", route="infer") == 3
    assert not caplog.records


def test_a_deadline_that_passes_in_the_queue(digits_bundle: Path) -> None:
    with Held(digits_bundle, "off") as (server, held):
        first, first_answers = ask_in_thread(server, body())
        held.wait_until_running()
        request = {**json.loads(body()), "parameters": {"mexit_deadline_us": 20_000}}
        second, second_answers = ask_in_thread(server, json.dumps(request).encode())
        wait_until(lambda: server.series("mexit_requests_in_flight") == 2)
        time.sleep(0.1)
        held.release()
        first.join()
        second.join()
    assert first_answers[0][0] == 200
    [(status, answer)] = second_answers
    assert status == 504
    assert "in the queue, the deadline was 20 ms" in answer["error"]
