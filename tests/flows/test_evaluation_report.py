"""`mexit evaluate` describes the answers of a run or bundle to the test split, unless --no-report is given."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from mexit.cli import app
from mexit.core.bundle import Bundle
from mexit.evaluate.config import EvaluateOptions
from mexit.evaluate.target import open_target
from mexit.flows.calibrate import CalibrateOptions, calibrate_bundle
from mexit.flows.evaluate import evaluate_model

torch.set_num_threads(1)
RUN, BUNDLE = Path("runs/digits"), Path("bundles/digits")
FILES = ("confusion.png", "classes.png", "reliability.png", "contact_sheet.png", "report.html")
CLEAN = EvaluateOptions(groups=())


@pytest.fixture(scope="module")
def copied(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(workspace, tmp_path_factory.mktemp("report") / "workspace"))


@pytest.fixture(autouse=True)
def folder(copied: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(copied)
    return copied


@pytest.mark.slow
def test_a_bundle_is_described_by_the_answers_of_its_default_budget() -> None:
    policies = (BUNDLE / "policies.json").read_bytes()
    result = evaluate_model(BUNDLE, samples=None, options=CLEAN)
    details, reports = result.report["details"], BUNDLE / "reports"
    assert {path.name for path in result.written} >= set(FILES)
    assert all((reports / name).stat().st_size > 1000 for name in FILES)
    assert json.loads((reports / "evaluation.json").read_text())["details"] == details
    assert details["answers"] == "budget low"
    low = result.report["budgets"]["low"]["clean"]
    errors = sum(n for _, _, n in details["confusion"])
    assert errors == low["n"] - round(low["value"] * low["n"])
    for name, row in result.report["budgets"].items():
        total = sum(one["n"] * one["accuracy_of"][name] for one in details["classes"])
        assert total == pytest.approx(row["clean"]["value"] * row["clean"]["n"])
    assert (BUNDLE / "policies.json").read_bytes() == policies, "the test images select nothing"
    test = set(open_target(RUN, None, "auto").splits.part("test").tolist())
    shown = {int(row["file"].removeprefix("image ")) for row in details["most_wrong"] + details["least_certain"]}
    assert shown <= test
    page = (reports / "report.html").read_text()
    assert f"{100 * low['value']:.1f} %" in page
    assert "budget low" in page


@pytest.mark.slow
def test_a_run_is_described_by_its_last_exit_with_temperatures_of_the_calibration_split() -> None:
    report = evaluate_model(RUN, samples=200, options=CLEAN).report
    details = report["details"]
    assert details["answers"] == "exit 3"
    assert sum(row["n"] for row in details["classes"]) == 200
    last = report["exits"][-1]["clean"]["value"]
    assert sum(row["n"] * row["accuracy_of"]["exit 3"] for row in details["classes"]) == pytest.approx(200 * last)
    assert [row["exit"] for row in details["reliability"]] == [1, 2, 3]
    assert np.mean([row["ece"] for row in details["reliability"]]) < 0.2
    chosen = evaluate_model(RUN, samples=50, options=EvaluateOptions(groups=(), budgets=("high",))).report["details"]
    assert chosen["answers"] == "budget high"


@pytest.mark.slow
def test_the_reject_option_is_reported_beside_the_accuracy(reject_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(reject_bundle, tmp_path / "digits"))
    report = evaluate_model(bundle, samples=200, options=CLEAN).report
    low, details = report["budgets"]["low"]["clean"], report["details"]
    assert low["answered"] < 1
    assert low["answered"] == pytest.approx(1 - details["no_answer"] / 200)
    wrong = sum(n for _, _, n in details["confusion"])
    assert low["answered_correctly"] == pytest.approx(1 - wrong / (200 - details["no_answer"]))
    for page in ("model_card.md", "report.html"):
        assert f"answers {low['answered']:.1%} of the clean images" in (bundle / "reports" / page).read_text()


def test_no_report_writes_neither_pictures_nor_page(tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(BUNDLE, tmp_path / "digits"))
    (bundle / "reports").mkdir(exist_ok=True)
    (bundle / "reports" / "report.html").write_text("of an earlier evaluation")
    command = ["evaluate", str(bundle), "--samples", "30", "--attacks", "clean", "--no-report", "--json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["details"] == {}
    assert not {path.name for path in (bundle / "reports").iterdir()} & set(FILES)


@pytest.mark.slow
def test_full_is_the_static_network_also_where_the_other_budgets_are_ensembles(bundle_copy: Path) -> None:
    """Evaluation, the table of calibration and the answers agree."""
    options = CalibrateOptions(measure="margin", ensemble=True, attack="none")
    table = calibrate_bundle(bundle_copy, options=options).expected["budgets"][-1]
    report = evaluate_model(bundle_copy, options=CLEAN).report
    full = report["budgets"]["full"]["clean"]
    assert full["value"] == report["exits"][-1]["clean"]["value"] == table["accuracy"]["test"]["value"]
    assert full["saved"] == 0.0
    assert report["budgets"]["low"]["clean"]["saved"] == pytest.approx(
        1 - report["budgets"]["low"]["clean"]["mean_macs"] / Bundle.open(bundle_copy).manifest.costs.static
    )
