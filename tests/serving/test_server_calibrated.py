"""What calibration adds to a server: budgets with names of their own, and the drift watch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from server_process import start

from mexit.flows.calibrate import calibrate_bundle

INFER = "/v2/models/digits/infer"


def request(images: np.ndarray, **parameters: object) -> dict[str, object]:
    shape = list(images.shape)
    tensor = {"name": "input", "shape": shape, "datatype": "FP32", "data": images.ravel().tolist()}
    return {"parameters": parameters, "inputs": [tensor]}


def test_a_budget_that_calibration_named_can_be_asked_for(bundle_copy: Path, images, tmp_path: Path) -> None:
    calibrate_bundle(bundle_copy, budgets={"night": "30%"}, attack="none")
    with start(bundle_copy, tmp_path, budget="night") as server:
        status, answer = server.json("POST", INFER, request(images[:4], mexit_budget="night"))
        assert (status, answer["parameters"]["mexit_budget"]) == (200, "night")
        status, answer = server.json("POST", INFER, request(images[:4], mexit_budget="day"))
        assert status == 400
        assert "'day' is not a budget" in answer["error"]
        assert server.series("mexit_predictions_total", budget="night") == 4
        assert server.stop() == 0


def test_the_drift_watch_is_in_the_metrics(digits_bundle: Path, images, tmp_path: Path) -> None:
    noise = np.clip(np.random.default_rng(0).normal(0.5, 0.6, (64, *images.shape[1:])), 0, 1).astype(np.float32)
    with start(digits_bundle, tmp_path, budget="40%", watch_drift=1.0) as server:
        server.json("POST", INFER, request(images[:32]))
        assert server.series("mexit_drift_alarms") == 0
        calm = server.series("mexit_watch_macs")
        assert calm > 0
        for _ in range(40):
            server.json("POST", INFER, request(noise))
        assert server.series("mexit_drift_alarms") == 1
        assert server.series("mexit_watch_macs") > calm
        assert "the data has changed" in server.errors
        assert server.stop() == 0
