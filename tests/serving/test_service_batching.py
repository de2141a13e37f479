"""Continuous batching in the server: the same answers and counts as without."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from servers import INFER, infer_body, outputs_of, start

from mexit import Runtime

BUDGETS = ("low", "medium", "high", "full")


@pytest.mark.slow
def test_answers_of_concurrent_requests(
    mixed_bundle: Path, tmp_path: Path, runtime: Runtime, images: NDArray[np.float32]
) -> None:
    """Ten connections send 1 to 8 rows with four budgets; each row is decided by the policy of its request."""
    expected = {budget: runtime.answer_tensor(images, budget=budget) for budget in BUDGETS}
    rng = np.random.default_rng(0)
    requests = [(int(rng.integers(0, 52)), int(rng.integers(1, 9)), BUDGETS[i % 4]) for i in range(120)]
    with start(mixed_bundle, tmp_path, batching="continuous") as server:

        def ask(request: tuple[int, int, str]) -> Any:
            first, rows, budget = request
            content = infer_body(images[first : first + rows], mexit_budget=budget, mexit_receipts=True)
            return server.json("POST", INFER, content)

        with ThreadPoolExecutor(10) as clients:
            answers = list(clients.map(ask, requests))
        macs = largest_batch = 0
        for (first, rows, budget), (status, answer) in zip(requests, answers, strict=True):
            assert status == 200
            predictions, outputs = expected[budget][first : first + rows], outputs_of(answer)
            assert outputs["label"] == [prediction.index for prediction in predictions]
            assert outputs["exit"] == [prediction.exit for prediction in predictions]
            receipts = json.loads(answer["parameters"]["mexit_receipts"])
            assert [receipt["reason"] for receipt in receipts] == [prediction.reason for prediction in predictions]
            macs += sum(receipt["macs"] for receipt in receipts)
            largest_batch = max(largest_batch, *(receipt["rows"] for receipt in receipts))
        assert server.series("mexit_macs_total") == macs
        assert server.series("mexit_predictions_total") == sum(rows for _, rows, _ in requests)
        assert largest_batch > 8, "no batch held rows of several requests"
        assert server.json("POST", INFER, infer_body(np.concatenate([images] * 5)))[0] == 200
        assert server.json("POST", INFER, infer_body(images[:1], mexit_deadline_us=1))[0] == 504
        assert server.stop() == 0
        assert server.errors == ""
