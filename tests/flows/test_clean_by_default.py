"""A run that was trained on clean images is exported, calibrated and evaluated without attacks unless asked for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from mexit.core.bundle import Bundle
from mexit.core.progress import Silent
from mexit.errors import UsageError
from mexit.evaluate.config import EvaluateOptions
from mexit.flows.calibrate import CalibrateOptions, calibrate_bundle
from mexit.flows.calibration_source import default_attack
from mexit.flows.evaluate import evaluate_model
from mexit.flows.export import ExportOptions, export_bundle
from mexit.flows.train import TrainOptions, train_model

pytestmark = pytest.mark.slow

torch.set_num_threads(1)
RUN, BUNDLE = Path("runs/clean"), Path("bundles/clean")


class Notes(Silent):
    """Collects the notes, and the labels of the progress bars."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.tracked: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def track(self, text: str, total: int):
        self.tracked.append(text)
        return super().track(text, total)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Notes]:
    """A folder with a run trained on clean images and its bundle with images; the notes of the export."""
    root, before, notes = tmp_path_factory.mktemp("clean"), Path.cwd(), Notes()
    os.chdir(root)
    try:
        train_model(settings={"method": "clean", "epochs": 2}, out=RUN, options=TrainOptions(threads=1))
        export_bundle(RUN, options=ExportOptions(calibration_images=True), progress=notes)
    finally:
        os.chdir(before)
    return root, notes


@pytest.fixture
def folder(exported: tuple[Path, Notes], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(exported[0])
    return exported[0]


def test_export_attacks_nothing_and_says_so_in_one_line(exported: tuple[Path, Notes]) -> None:
    root, notes = exported
    bundle = Bundle.open(root / BUNDLE)
    assert sorted(spec.file for spec in bundle.manifest.calibration) == [
        "calibration/calibration-clean.npz", "calibration/certification-clean.npz"
    ]  # fmt: skip
    (entry,) = bundle.policies().entries
    assert {ref.condition for ref in (entry.trace, *entry.evidence)} == {"clean"}
    assert all(point.attacked is None for point in entry.frontier)
    assert [note for note in notes.notes if "trained on clean images" in note] == [
        "nothing is promised under attack: the run was trained on clean images (--attack average measures it)"
    ]


@pytest.mark.usefixtures("folder")
def test_calibrate_attacks_on_request_alone(tmp_path: Path) -> None:
    result = calibrate_bundle(BUNDLE)
    assert "trained on clean images" in result.why_not_attacked
    assert all(point.attacked is None for point in result.entry.frontier)
    result = calibrate_bundle(BUNDLE, options=CalibrateOptions(attack="average"))
    assert result.why_not_attacked == ""
    assert all(point.attacked is not None for point in result.entry.frontier)
    assert calibrate_bundle(BUNDLE, options=CalibrateOptions(attack="none")).why_not_attacked == (
        "no attack was asked for"
    )


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("source", [RUN, BUNDLE])
def test_evaluate_is_clean_and_says_so(source: Path) -> None:
    notes = Notes()
    report = evaluate_model(source, samples=40, progress=notes).report
    assert [set(row) for row in report["exits"]] == [{"exit", "clean"}] * 3
    assert (report["settings"]["attacks"], report["settings"]["attack"], report["flags"]) == ([], "none", [])
    assert sum("clean images alone" in note for note in notes.notes) == 1
    card = (source / "reports" / "model_card.md").read_text()
    assert "Nothing was measured under attack." in card
    assert "--attacks clean" in card


@pytest.mark.usefixtures("folder")
def test_evaluate_attacks_on_request() -> None:
    notes = Notes()
    options = EvaluateOptions(("pgd",))
    report = evaluate_model(RUN, samples=20, steps=1, options=options, progress=notes).report
    assert "average" in report["exits"][0]
    assert not any("clean images alone" in note for note in notes.notes)


def test_a_run_trained_against_attacks_is_still_attacked_and_can_be_evaluated_clean(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace)
    entry = Bundle.open(Path("bundles/digits")).policies().entries[0]
    assert entry.frontier[0].attacked is not None
    notes = Notes()
    report = evaluate_model(Path("runs/digits"), samples=20, options=EvaluateOptions(()), progress=notes).report
    assert set(report["exits"][0]) == {"exit", "clean"}
    assert not any("trained on clean images" in note for note in notes.notes)


@pytest.mark.usefixtures("folder")
def test_the_policies_of_a_clean_run_are_selected_without_attacks() -> None:
    notes = Notes()
    report = evaluate_model(RUN, samples=20, options=EvaluateOptions(budgets=("low",)), progress=notes).report
    assert set(report["budgets"]["low"]) == {"budget_macs", "clean"}
    assert not any("PGD" in text for text in notes.tracked)


def test_the_default_attack_depends_on_the_training_alone() -> None:
    assert default_attack({"attack": "none"}) == "none"
    assert default_attack({"attack": "max-average"}) == default_attack({}) == default_attack(None) == "average"


@pytest.mark.parametrize("options", [CalibrateOptions, ExportOptions])
def test_an_unknown_attack_is_refused_at_once(options: type) -> None:
    with pytest.raises(UsageError, match="unknown attack 'strong': choose from none, single, average, max-average"):
        options(attack="strong")
