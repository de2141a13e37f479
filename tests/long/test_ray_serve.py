"""Ray Serve on a local cluster: the answers of one process, while a replica is killed too, and new budgets."""

from __future__ import annotations

import http.client
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import MEXIT, quiet
from PIL import Image
from served_demo import BUNDLE, ROOT, digit_tensor, free_ports

from mexit import Runtime

pytestmark = pytest.mark.long
ray = pytest.importorskip("ray", exc_type=ImportError, reason="needs ray: ray-requirements.txt")

EXAMPLES = ROOT / "examples"
BUDGETS = ("low", "medium", "high", "full")
TITLE = "ray::ServeReplica"
START_S, RETRY_S = 120.0, 60.0
LARGE, KILLS = 8, 5
# No reports to Ray's makers, and no replica is killed because other programs take the memory of this machine.
RAY = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_memory_monitor_refresh_ms": "0"}
LATENCY = re.compile(rb'"latency_ms": [0-9.]+, ')
Answer = tuple[int, bytes]
Asked = tuple[str, str, bytes]


def requests() -> list[Asked]:
    """Method, path and body: tensors with all budgets, large ones, a picture, metadata, and what is refused."""
    tensors = []
    for index, image in enumerate(digit_tensor()):
        tensor = {"name": "input", "shape": [1, 1, 8, 8], "datatype": "FP32", "data": image.ravel().tolist()}
        tensors.append({"inputs": [tensor], "parameters": {"mexit_budget": BUDGETS[index % len(BUDGETS)]}})
    tensors += [{"inputs": []}, {**tensors[0], "parameters": {"mexit_budget": "much"}}]
    asked = [("POST", "/v2/models/demo/infer", json.dumps(tensor).encode()) for tensor in tensors]
    picture = io.BytesIO()
    Image.fromarray((digit_tensor()[0, 0] * 255).astype("uint8")).save(picture, "PNG")
    asked.append(("POST", "/v1/classify?budget=high", picture.getvalue()))
    data = np.tile(digit_tensor(), (32, 1, 1, 1))
    large = {"name": "input", "shape": data.shape, "datatype": "FP32", "data": data.ravel().tolist()}
    infer = {"inputs": [large], "parameters": {"mexit_budget": "full"}}
    asked += [("POST", "/v2/models/demo/infer", json.dumps(infer).encode())] * LARGE
    return [*asked, ("GET", "/v2/models/demo", b""), ("GET", "/openapi.json", b""), ("GET", "/v2/models/other", b"")]


def ask(port: int, asked: Asked) -> Answer:
    """Status and body, without measured times, of one request. Raises `OSError`, `http.client.HTTPException`."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(*asked)
        response = connection.getresponse()
        return response.status, LATENCY.sub(b"", response.read())
    finally:
        connection.close()


def answered(port: int, asked: Asked, retried: Counter[str]) -> Answer:
    """The answer, with retries after a closed connection and after statuses from 500, which a dead replica causes."""
    until = time.monotonic() + RETRY_S
    while True:
        try:
            status, body = ask(port, asked)
            if status < 500:
                return status, body
            failure = str(status)
        except (OSError, http.client.HTTPException) as error:
            failure = type(error).__name__
        retried[failure] += 1
        assert time.monotonic() < until, f"no answer to {asked[:2]} in {RETRY_S:g} s: {dict(retried)}"
        time.sleep(0.05)


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    """Times by which early exit pays more than on this machine, so that thresholds tell whether replicas have them."""
    runtime = Runtime.open(BUNDLE, cost="time", threads=1)
    assert runtime.timing is not None
    measured = runtime.timing.profile
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(asdict(replace(measured, exits_us=(20.0, 100.0), static_us=98.0))))
    return path


@contextmanager
def served(port: int, folder: Path, *options: object) -> Iterator[subprocess.Popen[str]]:
    """`mexit serve` of the demo, which must end with exit code 0."""
    command = [*MEXIT, "serve", BUNDLE, "--port", port, "--threads", 1, *options]
    environment = {**quiet(), "PYTHONUNBUFFERED": "1", "MEXIT_CACHE": str(folder), **RAY}
    environment.pop("RAY_ADDRESS", None)
    with subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True, env=environment) as process:
        late = threading.Timer(START_S, process.kill)
        late.start()
        try:
            assert process.stdout is not None
            while "Ctrl-C" not in (line := process.stdout.readline()):
                assert line, "the server did not start"
            late.cancel()
            yield process
        finally:
            late.cancel()
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def descendants(root: int) -> dict[int, str]:
    """The processes that a process started, directly or not, and their titles."""
    parents, titles = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            titles[int(folder.name)] = (folder / "cmdline").read_text()
        except OSError:  # it ended
            continue
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: titles.get(pid, "") for pid in found - {root}}


def replicas(root: int) -> set[int]:
    return {pid for pid, title in descendants(root).items() if title.startswith(TITLE)}


def wait_until(done: Callable[[], bool]) -> None:
    until = time.monotonic() + START_S
    while not done():
        assert time.monotonic() < until
        time.sleep(0.2)


@pytest.mark.parametrize("cost", ["time", "macs"])
def test_a_replica_is_killed_under_load(cost: str, profile: Path, tmp_path: Path) -> None:
    """Every request is answered, with retries, as one process answers it; a new replica comes, and none is left."""
    options = ["--cost", cost, *(["--profile", profile] if cost == "time" else [])]
    port, ray_port = free_ports()
    with served(port, tmp_path, *options, "--workers", 0):
        expected = [ask(port, one) for one in requests()]
    assert Counter(status for status, _ in expected) == {200: 35 + LARGE, 400: 2, 404: 1}
    exits = {json.loads(body)["outputs"][3]["data"][0] for _, body in expected[:32]}
    assert exits == {1, 3}, "the images must leave at several exits"
    bounds = ["--ray", "--min-replicas", 2, "--max-replicas", 2]
    with served(ray_port, tmp_path, *options, *bounds) as process:
        before = replicas(process.pid)
        assert len(before) == 2
        assert [ask(ray_port, one) for one in requests()] == expected
        wrong, rounds, failed = [], Counter[int](), []
        retried, stop = Counter[str](), threading.Event()

        def load(client: int) -> None:
            try:
                while not stop.is_set():
                    answers = [answered(ray_port, one, retried) for one in requests()]
                    wrong.extend([got for got, wanted in zip(answers, expected, strict=True) if got != wanted])
                    rounds[client] += 1
            except BaseException as error:
                failed.append(error)
                raise

        clients = [threading.Thread(target=load, args=(client,)) for client in range(3)]
        for client in clients:
            client.start()
        try:
            wait_until(lambda: len(rounds) == 3 or bool(failed))
            for _ in range(KILLS):
                killed = min(replicas(process.pid))
                os.kill(killed, signal.SIGKILL)
                wait_until(lambda gone=killed: len(replicas(process.pid) - {gone}) == 2 or bool(failed))
                after = rounds.copy()
                wait_until(lambda seen=after: all(rounds[one] > seen[one] for one in range(3)) or bool(failed))
                if retried or failed:
                    break
        finally:
            stop.set()
            for client in clients:
                client.join()
        assert not failed
        assert retried, f"{KILLS} kills hit no request"
        assert not wrong, f"{len(wrong)} wrong answers, the first {wrong[0]}"
        started = descendants(process.pid)
    wait_until(lambda: not [pid for pid in started if Path(f"/proc/{pid}").exists()])


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A local cluster for the program `serve`; its address."""
    for name, value in {**RAY, "MEXIT_CACHE": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    paths = [str(EXAMPLES), str(ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    port, _ = free_ports()
    local: dict[str, Any] = {"address": "local", "num_cpus": 2, "object_store_memory": 100 << 20}
    ray.init(**local, include_dashboard=True, dashboard_port=port, log_to_driver=False)
    yield f"http://127.0.0.1:{port}"
    ray.serve.shutdown()
    ray.shutdown()


def test_the_example_with_its_file_and_another_budget(cluster: str, tmp_path: Path) -> None:
    """The budget of `user_config` counts without a restart; one that does not exist leaves the deployment as it was."""
    import ray.serve  # noqa: F401

    port, _ = free_ports()
    text = (EXAMPLES / "ray_serve.yaml").read_text().replace("port: 8000", f"port: {port}")
    text = text.replace("/models/demo", str(BUNDLE)).replace("cost: time  # or macs", "cost: macs")
    text = text.replace("min_replicas: 1", "min_replicas: 2")
    file = tmp_path / "ray_serve.yaml"

    def deploy(budget: str) -> None:
        file.write_text(text.replace("budget: low", f"budget: {budget}"))
        command = [sys.executable, "-m", "ray.serve.scripts", "deploy", "-a", cluster, str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=START_S)
        assert done.returncode == 0, done.stdout + done.stderr

    def budgets() -> set[str]:
        try:
            answers = [ask(port, ("GET", "/v2/models/demo", b"")) for _ in range(8)]
        except OSError:
            return set()
        return {json.loads(body)["parameters"]["mexit_budget"] if status == 200 else "" for status, body in answers}

    deploy("low")
    wait_until(lambda: budgets() == {"low"} and len(replicas(os.getpid())) == 2)
    before = replicas(os.getpid())
    deploy("full")
    wait_until(lambda: budgets() == {"full"})
    assert replicas(os.getpid()) == before
