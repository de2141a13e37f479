"""Reloads while clients send requests: each is answered, and by exactly one version (segments and thresholds)."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import model_versions
import numpy as np
import pytest
from numpy.typing import NDArray
from servers import Server, infer_body, outputs_of, start

from mexit import Runtime

Images = NDArray[np.float32]
CLIENTS = 4
LOAD = "/v2/repository/models/digits/load"
Answer = tuple[list[int], list[int], list[float]]


def rows(path: Path, images: Images) -> Answer:
    """Exits, MACs and probabilities of a bundle's answers."""
    answers = Runtime.open(path, "medium")(images)
    probabilities = np.array([one.probabilities for one in answers]).astype(np.float32)
    return [one.exit for one in answers], [one.macs for one in answers], probabilities.ravel().tolist()


def reload_under_load(server: Server, folder: Path, bundles: tuple[Path, Path], images: Images, reloads: int) -> int:
    """Load `reloads` versions, every third one damaged, while clients ask; returns the number of checked answers."""
    expected = [rows(bundle, images) for bundle in bundles]
    assert expected[0][0] != expected[1][0], "the versions must answer at other exits"
    body, stop = infer_body(images), threading.Event()

    def ask() -> list[tuple[int, Answer]]:
        connection, answers = server.connect(), []
        while not stop.is_set():
            connection.request("POST", "/v2/models/digits/infer", body)
            response = connection.getresponse()
            value = json.loads(response.read())
            assert response.status == 200, value
            outputs = outputs_of(value)
            probabilities = np.array(outputs["probabilities"], np.float32).tolist()
            answers.append((int(value["model_version"]), (outputs["exit"], outputs["macs"], probabilities)))
        connection.close()
        return answers

    with ThreadPoolExecutor(CLIENTS) as clients:
        pending = [clients.submit(ask) for _ in range(CLIENTS)]
        try:
            for number in range(2, reloads + 2):
                make: Callable[[Path, Path], Path] = model_versions.copy if number % 3 else model_versions.damaged
                make(bundles[number % 2], folder / "digits" / str(number))
                status, value = server.json("POST", LOAD)
                assert status == (200 if number % 3 else 500), value
                if not number % 3:
                    shutil.rmtree(folder / "digits" / str(number))
        finally:
            stop.set()
        answers = [answer for one in pending for answer in one.result()]
    for number, found in answers:
        assert number == 1 or number % 3, f"version {number} is damaged"
        assert found == expected[number % 2], f"version {number} answered as no version alone does"
    assert len({number for number, _ in answers}) > reloads // 3
    return len(answers)


@pytest.fixture(scope="module")
def bundles(mixed_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The bundles of even and of odd versions."""
    return mixed_bundle, model_versions.changed(mixed_bundle, tmp_path_factory.mktemp("odd") / "digits")


@pytest.mark.parametrize(
    ("reloads", "batching"),
    [
        (9, "off"),
        pytest.param(9, "continuous", marks=pytest.mark.slow),
        pytest.param(200, "off", marks=pytest.mark.long),
        pytest.param(200, "continuous", marks=pytest.mark.long),
    ],
)
def test_every_answer_is_of_one_version(
    bundles: tuple[Path, Path], tmp_path: Path, images: Images, reloads: int, batching: str
) -> None:
    folder = tmp_path / "models"
    model_versions.copy(bundles[1], folder / "digits" / "1")
    with start(folder, tmp_path, batching=batching) as server:
        checked = reload_under_load(server, folder, bundles, images[:16], reloads)
        assert checked > 2 * reloads
        assert server.series("mexit_predictions_total", model="digits") == 16 * checked
        assert server.series("mexit_errors_total") == server.series("mexit_errors_total", status="500")
        assert server.stop() == 0
