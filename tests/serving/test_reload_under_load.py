"""Reloads and killed workers while clients send requests: each is answered by one version (segments and thresholds).

Only the requests of a killed worker may fail.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import model_versions
import numpy as np
import pytest
from numpy.typing import NDArray
from servers import Server, client_ports, infer_body, outputs_of, serving_workers, start, wait_until, workers_of

from mexit import Runtime

Images = NDArray[np.float32]
CLIENTS = 4
INFER, LOAD = "/v2/models/digits/infer", "/v2/repository/models/digits/load"
Rows = tuple[list[int], list[int], list[float]]


@dataclass(frozen=True)
class Answer:
    """An answer: when its request began and when it ended, by `time.monotonic`, its version, and its outputs."""

    begin_s: float
    end_s: float
    version: int
    rows: Rows


@dataclass
class Load:
    """What clients saw: their answers, and the local ports of connections that failed."""

    answers: list[Answer] = field(default_factory=list)
    failed_ports: list[int] = field(default_factory=list)


def rows(path: Path, images: Images) -> Rows:
    """Exits, MACs and probabilities of a bundle's answers."""
    answers = Runtime.open(path, "medium")(images)
    probabilities = np.array([one.probabilities for one in answers]).astype(np.float32)
    return [one.exit for one in answers], [one.macs for one in answers], probabilities.ravel().tolist()


@contextmanager
def load(server: Server, images: Images) -> Iterator[Load]:
    """Clients that send requests, each on its connection, during the `with` block."""
    body, stop, seen = infer_body(images), threading.Event(), Load()

    def ask(connection: http.client.HTTPConnection) -> None:
        if connection.sock is None:
            connection.connect()
        port, begin_s = connection.sock.getsockname()[1], time.monotonic()
        try:
            connection.request("POST", INFER, body)
            response = connection.getresponse()
            value = json.loads(response.read())
        except (http.client.HTTPException, OSError):
            seen.failed_ports.append(port)
            connection.close()
            return
        assert response.status == 200, value
        outputs = outputs_of(value)
        probabilities = np.array(outputs["probabilities"], np.float32).tolist()
        found = outputs["exit"], outputs["macs"], probabilities
        seen.answers.append(Answer(begin_s, time.monotonic(), int(value["model_version"]), found))

    def run() -> None:
        connection = server.connect()
        while not stop.is_set():
            ask(connection)
        connection.close()

    with ThreadPoolExecutor(CLIENTS) as clients:
        pending = [clients.submit(run) for _ in range(CLIENTS)]
        try:
            wait_until(lambda: len(seen.answers) > 2 * CLIENTS)
            yield seen
            enough = len(seen.answers) + 2 * CLIENTS
            wait_until(lambda: len(seen.answers) > enough or not all(one.running() for one in pending))
        finally:
            stop.set()
        for one in pending:
            one.result()


@dataclass(frozen=True)
class Change:
    """A load: when it was requested and when it was answered, and the version in service then."""

    begin_s: float
    end_s: float
    version: int


def reload(server: Server, folder: Path, bundles: tuple[Path, Path], number: int) -> bool:
    """Load version `number`, which is damaged if it is a multiple of three; returns whether it is in service."""
    make: Callable[[Path, Path], Path] = model_versions.copy if number % 3 else model_versions.damaged
    make(bundles[number % 2], folder / "digits" / str(number))
    status, value = server.json("POST", LOAD)
    assert status == (200 if number % 3 else 500), value
    if not number % 3:
        shutil.rmtree(folder / "digits" / str(number))
    return status == 200


def kill_a_worker(server: Server) -> set[int]:
    """Kill a worker; returns the ports of its clients."""
    pid = workers_of(server)[0]
    os.kill(pid, signal.SIGSTOP)
    ports = client_ports(server, pid)
    os.kill(pid, signal.SIGKILL)
    return ports


def check(answers: list[Answer], changes: list[Change], expected: tuple[Rows, Rows]) -> None:
    """Every answer is of one version, which was in service while the request was answered."""
    for answer in answers:
        assert answer.rows == expected[answer.version % 2], (
            f"version {answer.version} answered as no version alone does"
        )
        oldest = max(change.version for change in changes if change.end_s < answer.begin_s)
        newest = max(change.version for change in changes if change.begin_s < answer.end_s)
        assert oldest <= answer.version <= newest


@pytest.fixture(scope="module")
def bundles(mixed_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The bundles of even and of odd versions."""
    return mixed_bundle, model_versions.changed(mixed_bundle, tmp_path_factory.mktemp("odd") / "digits")


@pytest.mark.parametrize(
    ("reloads", "options", "kill_at"),
    [
        (6, {}, ()),
        (6, {"workers": 2}, (4,)),
        pytest.param(9, {"batching": "continuous"}, (), marks=pytest.mark.slow),
        pytest.param(200, {}, (), marks=pytest.mark.long),
        pytest.param(200, {"batching": "continuous"}, (), marks=pytest.mark.long),
        pytest.param(200, {"workers": 2}, (), marks=pytest.mark.long),
        pytest.param(200, {"workers": 2}, (20, 70, 120, 170), marks=pytest.mark.long),
    ],
)
def test_every_answer_is_of_one_version(
    bundles: tuple[Path, Path],
    tmp_path: Path,
    images: Images,
    reloads: int,
    options: dict[str, object],
    kill_at: tuple[int, ...],
) -> None:
    """`kill_at`: before the loads of these versions a worker is killed."""
    expected = rows(bundles[0], images[:16]), rows(bundles[1], images[:16])
    assert expected[0][0] != expected[1][0], "the versions must answer at other exits"
    folder = tmp_path / "models"
    model_versions.copy(bundles[1], folder / "digits" / "1")
    changes, ports = [Change(0, 0, 1)], set[int]()
    with start(folder, tmp_path, **options) as server:
        with load(server, images[:16]) as seen:
            for number in range(2, reloads + 2):
                if number in kill_at:
                    ports |= kill_a_worker(server)
                begin_s = time.monotonic()
                if reload(server, folder, bundles, number):
                    changes.append(Change(begin_s, time.monotonic(), number))
        if kill_at:
            wait_until(lambda: len(serving_workers(server)) == 2)
        counted = server.series("mexit_predictions_total", model="digits")
        assert server.series("mexit_errors_total") == server.series("mexit_errors_total", status="500")
        assert server.stop() == 0
    check(seen.answers, changes, expected)
    assert {answer.version for answer in seen.answers} >= {1, changes[-1].version}
    assert len({answer.version for answer in seen.answers}) > reloads // 3
    assert set(seen.failed_ports) <= ports
    assert len(seen.failed_ports) <= len(ports)
    assert 0 <= counted - 16 * len(seen.answers) <= 16 * len(ports)
    assert all(before.version < after.version for before, after in pairwise(changes))


@pytest.mark.parametrize(
    ("kills", "within_s"), [(1, 120.0), pytest.param(4, 5.0, marks=pytest.mark.long)], ids=["once", "four times"]
)
def test_a_killed_worker_under_load(
    mixed_bundle: Path, tmp_path: Path, images: Images, kills: int, within_s: float
) -> None:
    """Only its requests fail, and a new worker answers soon."""
    with start(mixed_bundle, tmp_path, workers=2) as server:
        for _ in range(kills):
            with load(server, images[:16]) as seen:
                ports = kill_a_worker(server)
                wait_until(lambda: len(serving_workers(server)) == 2, within_s)
            assert sorted(seen.failed_ports) == sorted(ports)
        assert server.stop() == 0
