"""A run that is not finished is exported from its checkpoint; its bundle is calibrated and evaluated like any other."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refused, typed
from safetensors.torch import load_file

from mexit.core.bundle import Bundle
from mexit.data import digits, splits
from mexit.errors import MexitError
from mexit.evaluate.target import GradientSource
from mexit.flows.export import ExportOptions, export_bundle
from mexit.flows.train import TrainOptions, train_model
from mexit.train import checkpoint, stopped_run

QUICK = {"method": "clean", "epochs": 3, "batch": 200, "precision": "fp32"}  # epochs of 5 steps


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def stopped_after(steps: int, **settings: Any) -> Path:
    """A run that was stopped after this number of steps."""
    count = itertools.count(1)
    options = TrainOptions(threads=1, should_stop=lambda: next(count) == steps)
    assert not train_model(settings=QUICK | settings, out=Path("runs/x"), options=options).finished
    return Path("runs/x")


def exported(run: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The provenance of an export without calibration, and the weights that it exported."""
    result = export_bundle(run, out=Path("bundles/b"), options=ExportOptions(calibrate=False, exits="all"))
    bundle = Bundle.open(result.bundle)
    model = GradientSource.of_bundle(bundle).model
    assert max(result.differences) < 1e-4
    assert result.unfinished == bundle.manifest.provenance.get("unfinished")
    return dict(bundle.manifest.provenance), model.state_dict()


def kept_weights(run: Path) -> dict[str, torch.Tensor]:
    """The weights that an export of a run that is not finished takes."""
    stored = splits.Splits.load(run / checkpoint.SPLITS)
    name, _ = stopped_run.write_weights(run, checkpoint.load_settings(run), digits.load(), stored, "cpu")
    return checkpoint.load_model(run, name)[0].state_dict()


def test_the_checkpoint_is_exported_calibrated_and_evaluated() -> None:
    run = stopped_after(7)
    done = typed("export", run, "--exits", "all", "--json")
    assert json.loads(done.stdout)["unfinished"] == {"epochs": 1, "steps": 2}
    assert "runs/x is not finished: its weights after 1 epochs and 2 steps are exported" in " ".join(
        done.stderr.split()
    )
    assert Bundle.open("bundles/x").manifest.provenance["unfinished"] == {"epochs": 1, "steps": 2}
    assert train_model(resume=True, options=TrainOptions(threads=1)).finished, "the run goes on"
    assert typed("calibrate", "bundles/x", "--attack", "average").exit_code == 0
    arguments = ("evaluate", "bundles/x", "--samples", "20", "--attacks", "pgd", "--steps", "1")
    older = "has the weights of that time: mexit export runs/x --replace exports the new ones"
    assert older in " ".join(typed(*arguments).stderr.split())
    assert not checkpoint.is_superseded(run, checkpoint.WEIGHTS)
    with pytest.raises(MexitError, match="exists already"):
        export_bundle(run)


def test_without_averages_the_present_weights_are_exported() -> None:
    run = stopped_after(7)
    present, weights = load_file(run / checkpoint.CHECKPOINT), kept_weights(run)
    assert all(torch.equal(value, present[f"model.{name}"]) for name, value in weights.items())


def test_averaged_weights_have_recomputed_statistics() -> None:
    run = stopped_after(7, ema=0.9, recompute_norms=200)
    average, weights = load_file(run / checkpoint.CHECKPOINT), kept_weights(run)
    same = {name: torch.equal(value, average[f"average.{name}"]) for name, value in weights.items()}
    assert not any(equal for name, equal in same.items() if "running_" in name)
    assert all(equal for name, equal in same.items() if "running_" not in name)


def test_the_best_weights_are_exported_where_the_run_keeps_them() -> None:
    run = stopped_after(7, keep="best")
    kept, weights = load_file(run / checkpoint.CHECKPOINT), kept_weights(run)
    assert all(torch.equal(value, kept[f"kept.{name}"]) for name, value in weights.items())


@pytest.mark.long
def test_a_run_killed_before_its_result_was_written_is_exported_as_finished() -> None:
    settings = QUICK | {"epochs": 1, "ema": 0.9, "recompute_norms": 200}
    run = train_model(settings=settings, out=Path("runs/x"), options=TrainOptions(threads=1)).run
    result = load_file(run / checkpoint.WEIGHTS)
    (run / checkpoint.WEIGHTS).unlink()
    provenance, weights = exported(run)
    assert "unfinished" not in provenance
    assert all(torch.equal(value, result[name]) for name, value in weights.items())


def test_weights_are_superseded_once_the_run_has_trained_further() -> None:
    run = stopped_after(3)
    kept_weights(run)
    assert not checkpoint.is_superseded(run, "weights-epoch0-step3.safetensors")
    count = itertools.count(1)
    train_model(resume=True, options=TrainOptions(threads=1, should_stop=lambda: next(count) == 2))
    assert checkpoint.is_superseded(run, "weights-epoch0-step3.safetensors")
    (run / checkpoint.CHECKPOINT).write_bytes(b"\xff" * 99)
    assert not checkpoint.is_superseded(run, "weights-epoch0-step3.safetensors"), "a damaged checkpoint says nothing"


@pytest.mark.long
def test_a_bundle_of_weights_that_are_gone_says_so() -> None:
    run = stopped_after(3)
    exported(run)
    (run / "weights-epoch0-step3.safetensors").unlink()
    assert "was exported from does not exist here" in refused("evaluate", "bundles/b", code=2)
    assert train_model(resume=True, options=TrainOptions(threads=1)).finished
    assert "was trained again since bundles/b was exported" in refused("evaluate", "bundles/b", code=5)


def test_a_damaged_checkpoint_exports_nothing() -> None:
    run = stopped_after(3)
    (run / checkpoint.CHECKPOINT).write_bytes(b"\xff" * 99)
    assert "checkpoint.safetensors is not readable" in refused("export", run, code=5)
    assert not Path("bundles").exists()


@pytest.mark.parametrize("replaced", [False, True])
def test_an_export_whose_calibration_fails_leaves_no_bundle(replaced: bool, workspace: Path) -> None:
    """The calibration split is empty."""
    run = Path(shutil.copytree(workspace / "runs/digits", "runs/digits"))
    stored = splits.Splits.load(run / checkpoint.SPLITS)
    parts = {**stored.parts, "calibration": stored.parts["calibration"][:0]}
    broken = splits.Splits(stored.data_set, stored.data_sha256, parts)
    (run / checkpoint.SPLITS).write_bytes(broken.to_bytes())
    if replaced:
        shutil.copytree(workspace / "bundles/digits", "bundles/digits")
    before = {path: path.read_bytes() for path in Path("bundles").rglob("*") if path.is_file()}
    flags = ["--replace"] if replaced else []
    result = typed("export", run, *flags)
    assert result.exit_code != 0
    assert "no bundle was written, --no-calibrate exports without thresholds" in " ".join(result.stderr.split())
    assert {path: path.read_bytes() for path in Path("bundles").rglob("*") if path.is_file()} == before
