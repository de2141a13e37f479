"""Worker processes: connections, deaths, signals, shared counters."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from servers import INFER, Server, infer_body, start, wait_until, workers_of

from mexit import Bundle, Runtime
from mexit.core.progress import SAME_STOP_S
from mexit.errors import BudgetInfeasible, MexitError, UsageError
from mexit.flows.serve import ServeOptions, serve_bundle
from mexit.serving import uvicorn_server
from mexit.serving.channel import Channel
from mexit.serving.limits import Limits
from mexit.serving.supervisor import Supervisor
from mexit.serving.worker_process import WorkerProcess

GREY = infer_body(np.full((1, 1, 8, 8), 0.5, np.float32))


def is_running(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    return False


def ask(connection: http.client.HTTPConnection) -> int:
    """The status of one request on a connection that stays open."""
    connection.request("POST", INFER, GREY)
    response = connection.getresponse()
    response.read()
    return response.status


@pytest.fixture
def two(mixed_bundle: Path, tmp_path: Path) -> Iterator[Server]:
    """A server with two workers."""
    with start(mixed_bundle, tmp_path, workers=2) as running:
        yield running


def test_connections_are_shared_and_a_killed_worker_is_replaced(
    two: Server, runtime: Runtime, images: NDArray[np.float32]
) -> None:
    """Half of the connections end with their worker; counters of the dead one stay."""
    killed, other = workers_of(two)
    connections = [two.connect() for _ in range(6)]
    assert [ask(connection) for connection in connections] == [200] * 6
    assert two.series("mexit_predictions_total") == 6
    os.kill(killed, signal.SIGKILL)
    lost = 0
    for connection in connections:
        try:
            assert ask(connection) == 200
        except (http.client.HTTPException, OSError):
            lost += 1
        connection.close()
    assert lost == 3
    wait_until(lambda: killed not in workers_of(two) and len(workers_of(two)) == 2, 5.0)
    assert other in workers_of(two)
    status, _, content = two.ask("POST", INFER, images[:1].tobytes(), {"Inference-Header-Content-Length": "0"})
    assert status == 200
    assert two.series("mexit_predictions_total") == 6 + 3 + 1
    statistics = two.json("GET", "/v2/models/digits/stats")[1]["model_stats"][0]
    assert (statistics["inference_count"], statistics["inference_stats"]["success"]["count"]) == (10, 10)
    assert two.series("mexit_requests_in_flight") == 0
    assert content[-8:] == np.array([runtime(images[:1])[0].macs], "<i8").tobytes()
    assert two.stop() == 0
    assert two.errors == f"worker process {killed} ended with code -9\n"


def test_a_request_in_flight_is_answered_and_health_is_not_ready(two: Server) -> None:
    """Both workers answer health checks until the last request of either one is answered."""
    pids = workers_of(two)
    connection = two.connect()
    connection.putrequest("POST", INFER)
    connection.putheader("Content-Length", str(len(GREY)))
    connection.endheaders(GREY[:10])
    wait_until(lambda: two.series("mexit_requests_in_flight") == 1)
    two.process.send_signal(signal.SIGTERM)
    wait_until(lambda: bool(two.json("GET", "/v2/health/ready") == (503, {"ready": False})))
    time.sleep(0.3)  # the idle worker does not leave before the other
    assert [two.json("GET", "/v2/health/ready")[0] for _ in range(6)] == [503] * 6
    connection.send(GREY[10:])
    assert connection.getresponse().status == 200
    connection.close()
    assert two.process.wait(20) == 0
    assert not any(map(is_running, pids))
    assert two.errors == ""


def test_models_are_loaded_and_unloaded_in_all_workers(mixed_bundle: Path, tmp_path: Path) -> None:
    """Also in a worker that replaces a dead one, and a version that cannot be used changes nothing."""
    folder = tmp_path / "models"
    for name in ("one", "other"):
        shutil.copytree(mixed_bundle, folder / name / "1")
    with start(folder, tmp_path, workers=2) as server:

        def states(path: str = "/v2/models/one/ready") -> set[int]:
            """The statuses on connections that go to both workers."""
            connections = [server.connect() for _ in range(4)]
            statuses = set()
            for connection in connections:
                connection.request("GET", path)
                statuses.add(connection.getresponse().status)
            for connection in connections:
                connection.close()
            return statuses

        assert states() == {200}
        assert server.json("POST", "/v2/repository/models/one/unload") == (200, {})
        assert states() == {404}
        killed = workers_of(server)[0]
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: killed not in workers_of(server) and len(workers_of(server)) == 2)
        time.sleep(0.1)
        wait_until(lambda: states("/v2/models/other/versions/1/ready") == {200})
        assert states() == {404}
        shutil.copytree(mixed_bundle, folder / "one" / "2")
        assert server.json("POST", "/v2/repository/models/one/load") == (200, {})
        assert states("/v2/models/one/versions/2/ready") == {200}
        shutil.copytree(mixed_bundle, folder / "one" / "3")
        (folder / "one" / "3" / "bundle.json").write_text("{}")
        status, answer = server.json("POST", "/v2/repository/models/one/load")
        assert status >= 400, answer
        assert "version 3 of model 'one' was refused" in answer["error"]
        assert states("/v2/models/one/versions/2/ready") == {200}
        assert server.json("POST", "/v2/repository/models/none/load")[0] == 404


def test_the_rate_limit_is_one_of_all_workers(digits_bundle: Path, tmp_path: Path) -> None:
    """One burst, whichever worker spends it, and also after a worker's death."""
    costs = Bundle.open(digits_bundle).manifest.cumulative_macs
    options = {"rate": "1", "burst": str(7 * costs[-1]), "deadline_ms": 200.0, "budget": "full"}
    with start(digits_bundle, tmp_path, workers=2, **options) as server:
        connections = [server.connect() for _ in range(5)]
        assert [ask(connection) for connection in connections] == [200] * 5
        killed = workers_of(server)[0]
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: killed not in workers_of(server) and len(workers_of(server)) == 2)
        statuses = [server.ask("POST", INFER, GREY)[0] for _ in range(4)]
        assert statuses == [200, 200, 503, 503]
        assert server.series("mexit_macs_total") <= 7 * costs[-1]
        assert server.series("mexit_rate_limiter_overloaded_total") == 2
        for connection in connections:
            connection.close()


def shared_folder(pid: int) -> Path:
    """The folder of metrics of a worker's server."""
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    [value] = [text for text in variables if text.startswith(b"PROMETHEUS_MULTIPROC_DIR=")]
    return Path(os.fsdecode(value.partition(b"=")[2]))


def test_workers_end_with_the_supervisor(two: Server) -> None:
    """The last one removes the folder that they shared."""
    pids = workers_of(two)
    [folder] = {shared_folder(pid) for pid in pids}
    assert folder.is_dir()
    two.process.kill()
    wait_until(lambda: not any(map(is_running, pids)))
    assert not folder.exists()


def test_a_second_signal_ends_all(two: Server) -> None:
    pids = workers_of(two)
    connection = two.connect()
    connection.putrequest("POST", INFER)
    connection.putheader("Content-Length", "1000")
    connection.endheaders(b"{")
    wait_until(lambda: two.series("mexit_requests_in_flight") == 1)
    two.process.send_signal(signal.SIGTERM)
    wait_until(lambda: bool(two.json("GET", "/v2/health/ready")[0] == 503))
    time.sleep(SAME_STOP_S)
    assert two.stop() == -signal.SIGTERM
    wait_until(lambda: not any(map(is_running, pids)))
    connection.close()


def test_the_limit_of_connections(digits_bundle: Path, tmp_path: Path) -> None:
    with start(digits_bundle, tmp_path, limits={"connections": 3}, workers=2) as server:
        held = [server.connect() for _ in range(3)]
        assert [ask(connection) for connection in held] == [200] * 3
        status, headers, content = server.ask("GET", "/v2/health/live")
        assert (status, headers["content-type"], content) == (503, "text/plain; charset=utf-8", b"Service Unavailable")
        held[0].close()
        wait_until(lambda: server.ask("GET", "/v2/health/live")[0] == 200)
        assert [ask(connection) for connection in held[1:]] == [200] * 2
        for connection in held:
            connection.close()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget": "1"}, BudgetInfeasible, "the (nearest feasible|smallest calibrated) "),
        ({"batching": "continuous"}, UsageError, "which needs --workers 0"),
        ({"workers": -1}, UsageError, "at least 0, found -1"),
        ({"deadline_ms": 0}, UsageError, "the deadline must be above zero"),
    ],
)
def test_servers_that_do_not_start(
    digits_bundle: Path, options: dict[str, Any], error: type[MexitError], message: str
) -> None:
    """An error of a worker is that of the server."""
    with pytest.raises(error, match=message):
        serve_bundle(digits_bundle, ServeOptions(**{"port": 0, "workers": 1, **options}))


def test_workers_that_die_at_once_stop_the_server() -> None:
    """A worker that is ready, and then dies again and again."""
    program = (
        "import socket, sys; end = socket.socket(fileno=int(sys.argv[1])); end.recv(9999); "
        'end.sendall(b\'{"is": "ready", "states": {}, "alone": true}\\n\'); end.recv(9999); '
        'end.sendall(b\'{"is": "step", "step": "restore", "result": [], "error": null, "state": null}\\n\')'
    )
    bound = uvicorn_server.bind("127.0.0.1", 0, has_token=False)
    spawned: list[int] = []

    def spawn(index: int, *_: object) -> WorkerProcess:
        spawned.append(index)
        return WorkerProcess(index, [sys.executable, "-S", "-c", program], dict(os.environ), {})

    with bound[0], pytest.raises(MexitError, match="5 worker processes ended within 60 s"):
        Supervisor(bound, spawn, Limits(), workers=1).run()
    assert spawned == [0] * 5


def test_a_channel_passes_messages_and_sockets() -> None:
    mine, theirs = Channel.pair()
    other = Channel(theirs)
    left, right = socket.socketpair()
    assert mine.send({"a": 1})
    assert mine.send({"b": 2}, left.fileno())
    assert mine.send({"c": 3})
    left.close()
    received: list[tuple[dict[str, Any], int]] = []
    while len(received) < 3:
        received += other.receive()
    assert [message for message, _ in received] == [{"a": 1}, {"b": 2, "fd": True}, {"c": 3}]
    with socket.socket(fileno=received[1][1]) as passed:
        passed.sendall(b"x")
    assert right.recv(9) == b"x"
    assert mine.receive() == []
    other.close()
    with pytest.raises(EOFError):
        mine.receive()
    mine.close()
    right.close()
