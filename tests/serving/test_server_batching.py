"""A server that batches continuously, under real HTTP: many clients at once, answers and books as without it."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from server_process import refused, start

from mexit import Runtime

INFER = "/v2/models/digits/infer"
BUDGETS = ("low", "medium", "high", "full")
Images = NDArray[np.float32]


def body(images: Images, **parameters: object) -> bytes:
    entry = {"name": "input", "shape": list(images.shape), "datatype": "FP32", "data": images.ravel().tolist()}
    return json.dumps({"inputs": [entry], "parameters": parameters}).encode()


def outputs(answer: Any) -> dict[str, list[Any]]:
    return {entry["name"]: entry["data"] for entry in answer["outputs"]}


def test_many_clients_at_once_get_what_the_runtime_says(
    mixed_bundle: Path, tmp_path: Path, runtime: Runtime, images: Images
) -> None:
    """Ten connections, four budgets, one to eight rows; every row by the policy of its own request."""
    expected = {budget: runtime.answer_tensor(images, budget=budget) for budget in BUDGETS}
    rng = np.random.default_rng(0)
    sent = [(int(rng.integers(0, 52)), int(rng.integers(1, 9)), BUDGETS[place % 4]) for place in range(120)]
    with start(mixed_bundle, tmp_path, batching="continuous") as server:

        def ask(request: tuple[int, int, str]) -> Any:
            first, rows, budget = request
            content = body(images[first : first + rows], mexit_budget=budget, mexit_receipts=True)
            return server.json("POST", INFER, content)

        with ThreadPoolExecutor(10) as clients:
            answers = list(clients.map(ask, sent))
        macs, company = 0, 0
        for (first, rows, budget), (status, answer) in zip(sent, answers, strict=True):
            assert status == 200
            usual, found = expected[budget][first : first + rows], outputs(answer)
            assert found["label"] == [one.index for one in usual]
            assert found["exit"] == [one.exit for one in usual]
            receipts = json.loads(answer["parameters"]["mexit_receipts"])
            assert [receipt["reason"] for receipt in receipts] == [one.reason for one in usual]
            macs += sum(receipt["macs"] for receipt in receipts)
            company = max(company, *(receipt["rows"] for receipt in receipts))
        assert server.series("mexit_macs_total") == macs
        assert server.series("mexit_predictions_total") == sum(rows for _, rows, _ in sent)
        assert company > 8, "rows of different requests never travelled together"
        assert server.json("POST", INFER, body(np.concatenate([images] * 5)))[0] == 200
        assert server.json("POST", INFER, body(images[:1], mexit_deadline_us=1))[0] == 504
        assert server.stop() == 0
        assert server.errors == ""


def test_a_way_of_batching_that_there_is_none(mixed_bundle: Path, tmp_path: Path) -> None:
    message = refused(mixed_bundle, tmp_path, batching="always")
    assert message == "mexit.errors.UsageError: unknown batching 'always': choose from off, continuous"


@pytest.mark.parametrize("batching", ["off", "continuous"])
def test_a_stop_finishes_what_is_in_flight(
    mixed_bundle: Path, tmp_path: Path, images: Images, batching: str
) -> None:
    with start(mixed_bundle, tmp_path, batching=batching) as server, ThreadPoolExecutor(4) as clients:
        content = body(np.concatenate([images] * 17))
        asked = [clients.submit(server.json, "POST", INFER, content) for _ in range(4)]
        while server.series("mexit_requests_in_flight") < 2:
            pass
        assert server.stop() == 0
        found = []
        for one in asked:
            try:
                found.append(one.result()[0])
            except OSError:  # it came after the door was closed
                found.append(503)
        assert set(found) <= {200, 503}
        assert 200 in found
