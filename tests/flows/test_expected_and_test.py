"""Export and calibrate compare the expected with the test results, which the runtime records after every choice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mexit import Bundle, Runtime
from mexit.calibrate.expected import FILE
from mexit.commands.inspect import show_inspection
from mexit.core.atomic_io import to_json
from mexit.core.progress import Silent
from mexit.evaluate.config import EvaluateOptions
from mexit.flows.calibrate import CalibrateOptions, calibrate_bundle
from mexit.flows.evaluate import evaluate_model
from mexit.flows.inspect import inspect_bundle

pytestmark = pytest.mark.slow

CLEAN = CalibrateOptions(attack="none")


def stored(bundle: Path) -> dict:
    return json.loads((bundle / FILE).read_text())["entries"][0]


def test_the_table_of_export_has_what_the_runtime_answers(
    digits_bundle: Path, test_digits: tuple[NDArray[np.uint8], NDArray[np.int64]]
) -> None:
    images, labels = test_digits
    table = stored(digits_bundle)
    assert table["test"] == {"n": 449, "groups": None, "of": 449}
    for row in table["budgets"]:
        runtime = Runtime.open(digits_bundle, row["names"][-1])
        predictions = runtime(images[:, :, :, None].repeat(3, axis=3))
        correct = np.mean([prediction.index == label for prediction, label in zip(predictions, labels, strict=True)])
        assert row["accuracy"]["test"]["value"] == pytest.approx(correct, abs=2.5 / 449)
        assert row["cost"]["test"]["value"] == pytest.approx(
            np.mean([prediction.macs for prediction in predictions]), rel=0.02
        )
    entry = Bundle.open(digits_bundle).policies().entries[0]
    for (_, point), row in zip(entry.by_policy(), table["budgets"], strict=True):
        assert point.held_out is not None
        assert row["accuracy"]["expected"]["value"] == point.held_out.accuracy
        assert row["cost"]["expected"]["value"] == point.held_out.mean_macs


def test_the_test_split_is_recorded_last(bundle_copy: Path) -> None:
    tracked = []

    class Bars(Silent):
        def track(self, text: str, total: int):
            tracked.append(text)
            return super().track(text, total)

    result = calibrate_bundle(bundle_copy, options=CLEAN, progress=Bars())
    assert [text.split(",")[0] for text in tracked] == ["recording calibration", "recording certification",
                                                        "recording test"]  # fmt: skip
    assert bundle_copy / FILE in result.written
    assert {ref.split for ref in (result.entry.trace, *result.entry.evidence)} == {"calibration", "certification"}


def test_a_second_calibration_replaces_the_table(bundle_copy: Path) -> None:
    calibrate_bundle(bundle_copy, options=CalibrateOptions(budgets={"night": "30%"}, policy="geometric", attack="none"))
    assert any("night" in row["names"] for row in stored(bundle_copy)["budgets"])
    result = calibrate_bundle(bundle_copy, options=CLEAN)
    assert not any("night" in row["names"] for row in stored(bundle_copy)["budgets"])
    assert stored(bundle_copy) == json.loads(to_json(result.expected))
    assert len(json.loads((bundle_copy / FILE).read_text())["entries"]) == 1


def test_inspect_shows_the_table_and_what_is_missing(bundle_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = inspect_bundle(bundle_copy)
    assert result.to_json()["expected"] == [stored(bundle_copy)]
    show_inspection(result)
    shown = capsys.readouterr().out
    assert "expected and test results" in shown
    assert "449 images of the test split" in shown
    (bundle_copy / FILE).unlink()
    show_inspection(inspect_bundle(bundle_copy))
    assert "no test results are stored: mexit calibrate measures them" in capsys.readouterr().out


def test_warnings_and_shared_rows_are_shown(bundle_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads((bundle_copy / FILE).read_text())
    table = content["entries"][0]
    table["warnings"] = ["low: the test accuracy, 50.0%, lies outside the expected interval, 90.0% to 99.0%"]
    table["budgets"][0]["names"] = ["low", "night"]
    (bundle_copy / FILE).write_bytes(to_json(content))
    show_inspection(inspect_bundle(bundle_copy))
    shown = " ".join(capsys.readouterr().out.split())
    assert "lies outside the expected interval, 90.0% to 99.0%" in shown
    assert "low, night" in shown


def test_the_model_card_has_the_table(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(shutil.copytree(workspace, tmp_path / "workspace"))
    monkeypatch.chdir(root)
    evaluate_model(Path("bundles/digits"), samples=20, options=EvaluateOptions(()))
    card = Path("bundles/digits/reports/model_card.md").read_text()
    assert "## Expected and test results" in card
    low = stored(root / "bundles/digits")["budgets"][0]["accuracy"]
    assert f"| {100 * low['expected']['value']:.1f} ± " in card
    assert f"{100 * low['difference']:+.1f} ± {100 * low['half_width']:.1f} |" in card
