"""How the server starts, who it lets in, and how it ends."""

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
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from numpy.typing import NDArray
from server_process import Server, refused, start

from mexit import Runtime
from mexit.errors import MissingExtra, UsageError
from mexit.flows.serve import serve
from mexit.serving import uvicorn_server

INFER = "/v2/models/digits/infer"
TOKEN = "correct horse battery staple"
# The engine fails as engines do: with a message that names files.
BROKEN = """
from mexit.errors import BackendError
from mexit.runtime import Runtime
def fail(self, tensor, **options):
    if tensor[0, 0, 0, 0] == 1.0:
        raise ValueError("secret of /etc/passwd")
    raise BackendError("onnxruntime failed in /etc/passwd")
Runtime.begin = fail
"""


def started(url: str) -> NoReturn:
    pytest.fail(f"it started at {url}")


HERE: dict[str, Any] = {"budget": "low", "host": "127.0.0.1", "port": 0, "token": None, "ready": started}


def request(pixel: float = 0.5) -> dict[str, object]:
    entry = {"name": "input", "shape": [1, 1, 8, 8], "datatype": "FP32", "data": [pixel] * 64}
    return {"inputs": [entry]}


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_idle_server_cleanly(digits_bundle: Path, tmp_path: Path, sent: signal.Signals) -> None:
    with start(digits_bundle, tmp_path) as server:
        idle = server.connect()
        idle.request("GET", "/v2/health/ready")
        assert idle.getresponse().read() == b'{"ready": true}'
        began = time.monotonic()
        assert server.stop(sent) == 0
        assert time.monotonic() - began < 5
        assert server.errors == ""
        idle.close()


def test_a_request_in_flight_is_finished(
    mixed_bundle: Path, tmp_path: Path, runtime: Runtime, images: NDArray[np.float32]
) -> None:
    """Told to stop, the server is not ready at once, begins nothing new, and answers what it began."""
    with start(mixed_bundle, tmp_path) as server:
        in_flight = server.connect()
        in_flight.putrequest("POST", INFER)
        in_flight.putheader("Inference-Header-Content-Length", "0")
        in_flight.putheader("Content-Length", "256")
        in_flight.endheaders()
        content = images[:1].tobytes()
        in_flight.send(content[:100])
        while server.series("mexit_requests_in_flight") != 1:
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert server.json("GET", "/v2/health/ready") == (503, {"ready": False})
        assert server.json("GET", "/v2/models/digits/ready") == (503, {"name": "digits", "ready": False})
        assert server.json("GET", "/v2/health/live") == (200, {"live": True})
        status, headers, body = server.ask("POST", INFER, json.dumps(request()))
        assert (status, headers["retry-after"]) == (503, "1")
        assert json.loads(body) == {"error": "the server is stopping"}
        in_flight.send(content[100:])
        response = in_flight.getresponse()
        split = int(response.headers["Inference-Header-Content-Length"])
        answer = response.read()
        assert response.status == 200
        in_flight.close()
        assert server.process.wait(10) == 0
        assert server.errors == ""
    expected = runtime(images[:1])[0]
    probabilities = np.frombuffer(answer[split : split + 40], "<f4")
    np.testing.assert_array_equal(probabilities, expected.probabilities.astype(np.float32))


def test_a_second_signal_forces_the_end(digits_bundle: Path, tmp_path: Path) -> None:
    with start(digits_bundle, tmp_path) as server:
        endless = server.connect()
        endless.putrequest("POST", INFER)
        endless.putheader("Content-Length", "1000")
        endless.endheaders()
        while server.series("mexit_requests_in_flight") != 1:
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert server.process.poll() is None, "the first signal must wait for the request"
        assert server.stop(signal.SIGTERM, within_s=3) == -signal.SIGTERM
        endless.close()


def test_a_request_that_never_ends_does_not_stop_the_end(digits_bundle: Path, tmp_path: Path) -> None:
    prelude = (
        "import functools\n"
        "from mexit.serving import limits, listen\n"
        "limits.Limits = functools.partial(limits.Limits, drain_s=0.3)\n"
        "listen._SENDING_S = 1\n"
    )
    with start(digits_bundle, tmp_path, prelude=prelude) as server:
        endless = server.connect()
        endless.putrequest("POST", INFER)
        endless.putheader("Content-Length", "1000")
        endless.endheaders()
        while server.series("mexit_requests_in_flight") != 1:
            time.sleep(0.01)
        assert server.stop(within_s=10) == 0
        endless.close()


@pytest.fixture(scope="module")
def guarded(digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a token, whose engine always fails."""
    with start(digits_bundle, tmp_path_factory.mktemp("guarded"), prelude=BROKEN, token=TOKEN) as running:
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
def test_no_route_without_the_token(guarded: Server, method: str, path: str, value: str | None) -> None:
    status, headers, body = guarded.ask(method, path, None, {} if value is None else {"Authorization": value})
    assert (status, headers["www-authenticate"]) == (401, "Bearer")
    assert json.loads(body) == {"error": "send the header: Authorization: Bearer TOKEN"}


@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_every_route_with_the_token(guarded: Server, scheme: str) -> None:
    headers = {"Authorization": f"{scheme} {TOKEN}"}
    assert guarded.json("GET", "/v2", headers=headers)[0] == 200
    assert guarded.json("GET", "/v2/models/digits", headers=headers)[0] == 200
    assert guarded.ask("GET", "/metrics", headers=headers)[0] == 200


def test_health_needs_no_token(guarded: Server) -> None:
    assert guarded.json("GET", "/v2/health/live") == (200, {"live": True})
    assert guarded.json("GET", "/v2/health/ready") == (200, {"ready": True})


@pytest.mark.parametrize(
    ("pixel", "text"), [(1.0, "secret of"), (0.5, "onnxruntime failed")], ids=["bug", "engine"]
)
def test_what_goes_wrong_inside_stays_inside(guarded: Server, pixel: float, text: str) -> None:
    """The client learns nothing; the log has everything."""
    status, _, body = guarded.ask("POST", INFER, json.dumps(request(pixel)), {"Authorization": f"Bearer {TOKEN}"})
    assert status == 500
    assert json.loads(body) == {"error": "internal error: the server's log has the details"}
    assert "Traceback" in guarded.errors
    assert f"{text}" in guarded.errors


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
def test_other_machines_need_a_token(digits_bundle: Path, tmp_path: Path, host: str) -> None:
    message = refused(digits_bundle, tmp_path, host=host)
    assert message.startswith("mexit.errors.UsageError: ")
    if host:
        assert f"host {host} can be reached from other machines" in message
        assert "--token TOKEN" in message
        assert "--host 127.0.0.1" in message


def test_loopback_only_by_default(server: Server) -> None:
    """Read from the kernel: the one listening socket is on 127.0.0.1."""
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
    ("options", "text"),
    [
        ({"port": 65536}, "port 65536 does not exist"),
        ({"port": -1}, "port -1 does not exist"),
        ({"host": "no.such.host.invalid"}, "no address of this machine"),
        ({"host": "192.0.2.1", "token": TOKEN}, "host 192.0.2.1 is no address of this machine"),
        ({"token": "  "}, "the token is empty"),
        ({"deadline_ms": 0}, "the deadline must be above zero"),
        ({"budget": "cheap"}, "is not a budget"),
        ({"backend": "magic"}, "unknown backend"),
    ],
)
def test_settings_that_cannot_be(digits_bundle: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        serve(digits_bundle, **{**HERE, **options})


@pytest.mark.parametrize(
    ("module", "package"),
    [("starlette", "starlette"), ("uvicorn", "uvicorn"), ("prometheus_client", "prometheus-client")],
)
def test_a_missing_package_says_what_to_install(
    digits_bundle: Path, monkeypatch: pytest.MonkeyPatch, module: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=rf"'{package}': pip install 'mexit\[serve\]'"):
        serve(digits_bundle, **HERE)


def test_the_flow_is_light_to_import() -> None:
    """Neither the web framework nor torch or onnx comes with it."""
    program = (
        "import sys, mexit.flows.serve\n"
        "heavy = {'starlette', 'uvicorn', 'prometheus_client', 'torch', 'onnx', 'PIL', 'onnxruntime'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_server_needs_neither_torch_nor_onnx() -> None:
    program = (
        "import sys, mexit.serving.http, mexit.serving.uvicorn_server\n"
        "assert not {'torch', 'onnx', 'typer', 'rich'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_without_thresholds_only_the_full_budget_works(bundle_copy: Path, tmp_path: Path) -> None:
    """The error of the runtime names the bundle's directory; the one of the server does not."""
    (bundle_copy / "policies.json").unlink()
    with start(bundle_copy, tmp_path, budget="full") as server:
        assert server.json("POST", INFER, request())[0] == 200
        status, body = server.json("POST", INFER, {**request(), "parameters": {"mexit_budget": "low"}})
        assert (status, body["error"]) == (
            409,
            "the model has no thresholds for this engine: only the budget 'full' works",
        )


def test_two_that_bind_at_once() -> None:
    """While a bundle loads, another server can bind the same port; one of the two then gets it, in words."""
    first = uvicorn_server.bind("127.0.0.1", 0, guarded=False)
    second = uvicorn_server.bind("127.0.0.1", first.getsockname()[1], guarded=False)
    with first, second:
        uvicorn_server.start_listening(first)
        with pytest.raises(UsageError, match=f"port {first.getsockname()[1]} is in use"):
            uvicorn_server.start_listening(second)


def test_the_command(digits_bundle: Path) -> None:
    """`mexit serve` as typed: says where it is, serves, and ends with 0."""
    command = [sys.executable, "-m", "mexit", "serve", str(digits_bundle), "--port", "0", "--budget", "low"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = re.search(r"http://127\.0\.0\.1:(\d+)", process.stdout.readline())
        assert said is not None
        with urllib.request.urlopen(f"{said[0]}/v2/models/digits") as response:
            assert json.load(response)["parameters"]["mexit_budget"] == "low"
        process.terminate()
        _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, "")


def test_a_port_can_be_taken_again_at_once(digits_bundle: Path, tmp_path: Path) -> None:
    """Connections that linger after a server's end do not keep its port."""
    with start(digits_bundle, tmp_path) as first:
        assert first.json("GET", "/v2/health/live")[0] == 200
        port = first.port
        with socket.create_connection(("127.0.0.1", port)):
            assert first.stop() == 0
    with start(digits_bundle, tmp_path, port=port) as second:
        assert second.json("GET", "/v2/health/live")[0] == 200
