"""Calibration on pictures without labels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import program
from PIL import Image

from mexit import Bundle, Runtime, UsageError
from mexit.core.exit_policy import first_exit
from mexit.core.scores import Scorer
from mexit.data import digits, splits
from mexit.data.preprocess import prepare
from mexit.errors import BadInput
from mexit.flows.calibrate import CalibrateOptions, calibrate_bundle
from mexit.runtime.reference import run_all_exits

COUNT = 701


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training digits, enlarged, without labels."""
    folder = tmp_path_factory.mktemp("pictures")
    data = digits.load()
    for number, place in enumerate(splits.split(data).part("train")[:COUNT]):
        image = np.asarray(data.images.at(np.array([place]))[0])
        Image.fromarray(image.repeat(3, 0).repeat(3, 1)).save(folder / f"{number:03}.png")
    return folder


def test_thresholds_are_selected_on_one_half_and_measured_on_the_other(bundle_copy: Path, pictures: Path) -> None:
    result = calibrate_bundle(bundle_copy, data=f"folder:{pictures}")
    entry = result.entry
    assert (result.expected["test"], result.expected["budgets"][0]["accuracy"]) == (None, None)
    assert "has neither labels nor test images" in result.expected["missing"]
    bundle = Bundle.open(bundle_copy)
    calibration, certification = (bundle.load_trace(ref) for ref in (entry.trace, *entry.evidence))
    assert sorted([*calibration.index, *certification.index]) == list(range(COUNT))
    for trace, kind in ((calibration, "calibration"), (certification, "held_out")):
        assert trace.labels is None
        scorer = Scorer(entry.measure, entry.ensemble, entry.temperatures, 10)
        scores, _ = scorer.answer(trace.logits)
        for point in entry.frontier:
            outcome = getattr(point, kind)
            exits = np.bincount(first_exit(scores, point.thresholds), minlength=4)[1:]
            assert (outcome.exits, outcome.n, outcome.accuracy) == (tuple(exits), len(trace.index), None)
    assert all(point.calibration.mean_macs <= point.budget_macs * (1 + 1e-9) for point in entry.frontier)
    assert (entry.measure, entry.ensemble, entry.temperatures) == ("max-probability", False, (1.0, 1.0, 1.0))


def test_each_trace_row_has_the_logits_of_its_picture(bundle_copy: Path, pictures: Path) -> None:
    entry = calibrate_bundle(bundle_copy, data=f"folder:{pictures}").entry
    runtime = Runtime.open(bundle_copy, "low")
    assert runtime.calibrated
    trace = runtime.bundle.load_trace(entry.trace)
    for row in (0, 17, len(trace.index) - 1):
        content = (pictures / f"{trace.index[row]:03}.png").read_bytes()
        logits = run_all_exits(runtime.backend, prepare(content, runtime.bundle.manifest.input)[None])
        np.testing.assert_array_equal(logits[:, 0], trace.logits[:, row])


def test_disagreement_can_be_certified_without_labels(bundle_copy: Path, pictures: Path) -> None:
    data = f"folder:{pictures}"
    options = CalibrateOptions(max_risk=0.2, confidence=0.9, loss="disagreement")
    result = calibrate_bundle(bundle_copy, options=options, data=data)
    (certificate,) = result.entry.certificates
    assert certificate["loss"] == "disagreement"
    assert certificate["n"] == {"clean": COUNT // 2}
    assert Runtime.open(bundle_copy, "certified").calibrated


@pytest.mark.parametrize("loss", ["early-error", "accuracy-gap"])
def test_a_loss_that_needs_labels_is_refused(bundle_copy: Path, pictures: Path, loss: str) -> None:
    before = (bundle_copy / "policies.json").read_bytes()
    with pytest.raises(UsageError, match=f"has no labels, which the loss {loss} needs: add --loss disagreement"):
        calibrate_bundle(bundle_copy, options=CalibrateOptions(max_risk=0.2, loss=loss), data=f"folder:{pictures}")
    assert (bundle_copy / "policies.json").read_bytes() == before


def test_too_few_pictures_are_refused(bundle_copy: Path, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "few").mkdir()
    for number in range(30):
        content = (pictures / f"{number:03}.png").read_bytes()
        (tmp_path / "few" / f"{number}.png").write_bytes(content)
    with pytest.raises(BadInput, match="15 samples are too few"):
        calibrate_bundle(bundle_copy, data=f"folder:{tmp_path / 'few'}")


@pytest.mark.long
def test_the_command_names_what_is_missing_without_labels(bundle_copy: Path, pictures: Path) -> None:
    done = program("calibrate", bundle_copy, "--data", f"folder:{pictures}")
    assert done.returncode == 0, done.stderr
    messages = " ".join(done.stderr.split())
    assert f"has no labels: of its {COUNT} pictures half calibrate and half certify" in messages
    assert "nothing is promised under attack" in messages
    assert "Warning" not in messages
    assert "No artists" not in messages
    report = json.loads((bundle_copy / "reports" / "calibration.json").read_text())
    assert (report["scores"], report["reliability"]) == ([], [])
    assert (bundle_copy / "reports" / "calibration.png").read_bytes().startswith(b"\x89PNG")
