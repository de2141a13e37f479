"""Starting the server, its tokens, and its end."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from numpy.typing import NDArray
from servers import (
    INFER,
    Client,
    Server,
    hook_runtime,
    infer_body,
    launch,
    refused,
    serve_runtime,
    start,
    wait_until,
)

from mexit import Runtime
from mexit.core.progress import SAME_STOP_S
from mexit.errors import BackendError, MissingExtra, UsageError
from mexit.flows.serve import ServeOptions, serve_bundle

TOKEN = "correct horse battery staple"
GREY = np.full((1, 1, 8, 8), 0.5, np.float32)


def fail_if_started(url: str) -> NoReturn:
    pytest.fail(f"it started at {url}")


def begin_request(server: Server, headers: dict[str, str]) -> HTTPConnection:
    """A request whose head is sent and counted as in flight."""
    connection = server.connect()
    connection.putrequest("POST", INFER)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    wait_until(lambda: server.series("mexit_requests_in_flight") == 1)
    return connection


@pytest.mark.parametrize("stop_signal", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_an_idle_server(digits_bundle: Path, tmp_path: Path, stop_signal: signal.Signals) -> None:
    with start(digits_bundle, tmp_path) as server:
        idle = server.connect()
        idle.request("GET", "/v2/health/ready")
        assert idle.getresponse().read() == b'{"ready": true}'
        assert server.stop(stop_signal) == 0
        assert server.errors == ""
        idle.close()


def test_a_request_in_flight_is_answered(
    mixed_bundle: Path, tmp_path: Path, runtime: Runtime, images: NDArray[np.float32]
) -> None:
    """After the signal the server is not ready, refuses new requests, and answers the one in flight."""
    with start(mixed_bundle, tmp_path) as server:
        in_flight = begin_request(server, {"Inference-Header-Content-Length": "0", "Content-Length": "256"})
        content = images[:1].tobytes()
        in_flight.send(content[:100])
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: bool(server.json("GET", "/v2/health/ready") == (503, {"ready": False})))
        assert server.json("GET", "/v2/models/digits/ready") == (503, {"name": "digits", "ready": False})
        assert server.json("GET", "/v2/health/live") == (200, {"live": True})
        status, headers, body = server.ask("POST", INFER, infer_body(GREY))
        assert (status, headers["retry-after"]) == (503, "1")
        assert json.loads(body) == {"error": "the server is stopping"}
        in_flight.send(content[100:])
        response = in_flight.getresponse()
        json_bytes = int(response.headers["Inference-Header-Content-Length"])
        answer = response.read()
        assert response.status == 200
        in_flight.close()
        assert server.process.wait(20) == 0
        assert server.errors == ""
    probabilities = np.frombuffer(answer[json_bytes : json_bytes + 40], "<f4")
    np.testing.assert_array_equal(probabilities, runtime(images[:1])[0].probabilities.astype(np.float32))


def test_a_second_signal_ends_the_process(digits_bundle: Path, tmp_path: Path) -> None:
    with start(digits_bundle, tmp_path) as server:
        unfinished = begin_request(server, {"Content-Length": "1000"})
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: bool(server.json("GET", "/v2/health/ready")[0] == 503))
        assert server.process.poll() is None, "the first signal must wait for the request"
        time.sleep(SAME_STOP_S)
        assert server.stop(signal.SIGTERM) == -signal.SIGTERM
        unfinished.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_that_comes_twice_is_one_request_to_stop(digits_bundle: Path, tmp_path: Path, workers: int) -> None:
    """`timeout` signals the server and then its process group."""
    with start(digits_bundle, tmp_path, workers=workers) as server:
        content = infer_body(GREY)
        in_flight = begin_request(server, {"Content-Length": str(len(content))})
        for _ in range(2):
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: bool(server.json("GET", "/v2/health/ready")[0] == 503))
        in_flight.send(content)
        assert in_flight.getresponse().status == 200
        in_flight.close()
        assert server.process.wait(20) == 0
        assert server.errors == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_during_the_start_ends_it(digits_bundle: Path, tmp_path: Path, workers: int, number: int) -> None:
    """With code 0; the socket, the workers and the folder that they share are gone."""
    path, folder, log = tmp_path / "s", tmp_path / "temporary", tmp_path / "log"
    folder.mkdir()
    options = {"workers": workers, "host": f"unix:{path}"}
    with launch(digits_bundle, log, environment={"TMPDIR": str(folder)}, **options) as process:
        wait_until(path.exists)
        if workers:
            wait_until(lambda: any(folder.iterdir()))
        process.send_signal(number)
        assert process.wait(20) == 0, log.read_text()
        assert process.stdout is not None
        assert process.stdout.read() == ""
    assert log.read_text() == ""
    assert not path.exists()
    assert not list(folder.iterdir())


@pytest.mark.slow
def test_an_unfinished_request_does_not_keep_the_server(digits_bundle: Path, tmp_path: Path) -> None:
    """Its end is waited for only `drain_s` and `close_s`, not the 60 s that a body may take."""
    with start(digits_bundle, tmp_path, limits={"drain_s": 0.3, "close_s": 1}) as server:
        unfinished = begin_request(server, {"Content-Length": "1000"})
        assert server.stop(within_s=30) == 0
        unfinished.close()


@pytest.mark.parametrize("batching", ["off", "continuous"])
def test_a_signal_under_load(mixed_bundle: Path, tmp_path: Path, images: NDArray[np.float32], batching: str) -> None:
    """Large requests in flight are answered; later ones get 503 or no connection."""
    with start(mixed_bundle, tmp_path, batching=batching) as server, ThreadPoolExecutor(4) as clients:
        content = infer_body(np.concatenate([images] * 17))
        answers = [clients.submit(server.json, "POST", INFER, content) for _ in range(4)]
        wait_until(lambda: server.series("mexit_requests_in_flight") >= 2)
        assert server.stop() == 0
        statuses = []
        for answer in answers:
            try:
                statuses.append(answer.result()[0])
            except OSError:  # the server had closed its socket
                statuses.append(503)
        assert set(statuses) <= {200, 503}
        assert 200 in statuses


def fail(images: NDArray[np.float32]) -> None:
    """Fail with a message that names files, as engines do."""
    if images[0, 0, 0, 0] == 1.0:
        raise ValueError("secret of /etc/passwd")
    raise BackendError("onnxruntime failed in /etc/passwd")


@pytest.fixture(scope="module")
def failing(digits_bundle: Path) -> Iterator[Client]:
    """A server with a token, whose engine always fails."""
    with serve_runtime(hook_runtime(digits_bundle, fail), tokens=(TOKEN,)) as running:
        yield running


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v2"),
        ("GET", "/v2/models/digits"),
        ("POST", INFER),
        ("POST", "/v1/classify"),
        ("POST", "/v2/repository/index"),
        ("GET", "/metrics"),
        ("GET", "/no/such/route"),
        ("GET", "/v2/health/live/"),
    ],
)
@pytest.mark.parametrize(
    "value",
    [
        None,
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        f"Basic {TOKEN}",
        TOKEN,
    ],
)
def test_no_route_without_the_token(failing: Client, method: str, path: str, value: str | None) -> None:
    status, headers, body = failing.ask(method, path, None, {} if value is None else {"Authorization": value})
    assert (status, headers["www-authenticate"]) == (401, "Bearer")
    assert json.loads(body) == {"error": "send the header: Authorization: Bearer TOKEN"}


@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_every_route_with_the_token(failing: Client, scheme: str) -> None:
    headers = {"Authorization": f"{scheme} {TOKEN}"}
    assert failing.json("GET", "/v2", headers=headers)[0] == 200
    assert failing.json("GET", "/v2/models/digits", headers=headers)[0] == 200
    assert failing.ask("GET", "/metrics", headers=headers)[0] == 200


def test_health_needs_no_token(failing: Client) -> None:
    assert failing.json("GET", "/v2/health/live") == (200, {"live": True})
    assert failing.json("GET", "/v2/health/ready") == (200, {"ready": True})


@pytest.mark.parametrize(("pixel", "message"), [(1.0, "secret of"), (0.5, "onnxruntime failed")], ids=["bug", "engine"])
def test_internal_errors_are_logged_and_not_sent(
    failing: Client, caplog: pytest.LogCaptureFixture, pixel: float, message: str
) -> None:
    body = infer_body(np.full((1, 1, 8, 8), pixel, np.float32))
    status, _, answer = failing.ask("POST", INFER, body, {"Authorization": f"Bearer {TOKEN}"})
    assert status == 500
    assert json.loads(answer) == {"error": "internal error: the server's log has the details"}
    assert "Traceback" in caplog.text
    assert message in caplog.text


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
def test_a_public_host_needs_a_token(digits_bundle: Path, tmp_path: Path, host: str) -> None:
    message = refused(digits_bundle, tmp_path, host=host)
    assert message.startswith("mexit.errors.UsageError: ")
    if host:
        assert f"host {host} can be reached from other machines" in message
        assert "--token TOKEN" in message
        assert "--host 127.0.0.1" in message


def test_loopback_by_default(server: Server) -> None:
    """The kernel's table shows one listening socket of the port, on 127.0.0.1."""
    listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines() if " 0A " in line]
    assert [address for address in listening if address.endswith(f":{server.port:04X}")] == [
        f"0100007F:{server.port:04X}"
    ]


def test_all_interfaces_with_a_token(digits_bundle: Path, tmp_path: Path) -> None:
    with start(digits_bundle, tmp_path, host="0.0.0.0", token=TOKEN) as server:
        assert server.json("GET", "/v2/health/live") == (200, {"live": True})
        assert server.ask("GET", "/v2")[0] == 401
        assert server.stop() == 0


def test_a_port_in_use(server: Server, digits_bundle: Path, tmp_path: Path) -> None:
    message = refused(digits_bundle, tmp_path, port=server.port)
    assert message == (
        f"mexit.errors.UsageError: port {server.port} is in use: "
        "choose another with --port, or --port 0 for any free one"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"port": 65536}, "port 65536 does not exist"),
        ({"port": -1}, "port -1 does not exist"),
        ({"host": "no.such.host.invalid"}, "no address of this machine"),
        ({"host": "192.0.2.1", "token": TOKEN}, "host 192.0.2.1 is no address of this machine"),
        ({"token": "  "}, "the token is empty"),
        ({"deadline_ms": 0}, "the deadline must be above zero"),
        ({"budget": "cheap"}, "is not a budget"),
        ({"backend": "magic"}, "unknown backend"),
        ({"name": "a/b"}, "'a/b' cannot be a model's name"),
        ({"name": ""}, "'' cannot be a model's name"),
        ({"batching": "always"}, "unknown batching 'always': choose from off, continuous"),
    ],
)
def test_invalid_options(digits_bundle: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        serve_bundle(digits_bundle, ServeOptions(**{"port": 0, **options}), ready=fail_if_started)


@pytest.mark.parametrize(
    ("module", "package"),
    [("httptools", "httptools"), ("uvicorn", "uvicorn"), ("prometheus_client", "prometheus-client")],
)
def test_a_missing_package(digits_bundle: Path, monkeypatch: pytest.MonkeyPatch, module: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=rf"'{package}': pip install 'mexit\[serve\]'"):
        serve_bundle(digits_bundle, ServeOptions(port=0), ready=fail_if_started)


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        (
            "mexit.flows.serve",
            {"anyio", "uvicorn", "prometheus_client", "torch", "onnx", "PIL", "onnxruntime"},
        ),
        ("mexit.serving.http, mexit.serving.uvicorn_server", {"torch", "onnx", "typer", "rich"}),
    ],
)
def test_imports_are_light(modules: str, heavy: set[str]) -> None:
    program = f"import sys, {modules}; assert not set({sorted(heavy)}) & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_command(digits_bundle: Path) -> None:
    """`mexit serve` prints its URL, serves, and ends with code 0."""
    command = [sys.executable, "-m", "mexit", "serve", str(digits_bundle), "--port", "0", "--budget", "low"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = re.search(r"http://127\.0\.0\.1:(\d+)", process.stdout.readline())
        assert url is not None
        with urllib.request.urlopen(f"{url[0]}/v2/models/digits") as response:
            assert json.load(response)["parameters"]["mexit_budget"] == "low"
        process.terminate()
        _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, "")


def test_a_port_is_free_after_the_end(digits_bundle: Path, tmp_path: Path) -> None:
    """Connections that remain open after a server's end do not block its port."""
    with start(digits_bundle, tmp_path) as first:
        assert first.json("GET", "/v2/health/live")[0] == 200
        port = first.port
        with socket.create_connection(("127.0.0.1", port)):
            assert first.stop() == 0
    with start(digits_bundle, tmp_path, port=port) as second:
        assert second.json("GET", "/v2/health/live")[0] == 200
