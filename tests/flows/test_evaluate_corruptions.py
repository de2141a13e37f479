"""`mexit evaluate --attacks corruptions` on a trained run, its bundle and a run trained without attacks."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import program, typed

from mexit.attacks.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from mexit.evaluate.config import EvaluateOptions
from mexit.evaluate.target import EvaluationTarget, open_target
from mexit.flows.evaluate import evaluate_model
from mexit.flows.train import TrainOptions, train_model
from mexit.runtime.runtime import Runtime

pytestmark = pytest.mark.slow

torch.set_num_threads(1)
SAMPLES = 24
ALONE = EvaluateOptions(("corruptions",))


@pytest.fixture(scope="module")
def folder(workspace: Path, mixed_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace of its own: `runs/digits`, `bundles/digits` and `bundles/mixed`, whose budgets use every exit."""
    root = Path(shutil.copytree(workspace, tmp_path_factory.mktemp("corruptions") / "workspace"))
    shutil.copytree(mixed_bundle, root / "bundles/mixed")
    return root


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, object]:
    """The report of the bundle."""
    before = Path.cwd()
    try:
        os.chdir(folder)
        return dict(evaluate_model(Path("bundles/mixed"), samples=SAMPLES, options=ALONE).report)
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def target(folder: Path) -> EvaluationTarget:
    before = Path.cwd()
    try:
        os.chdir(folder)
        return open_target(Path("bundles/mixed"), None, "auto")
    finally:
        os.chdir(before)


def test_every_corruption_and_severity_is_reported(report) -> None:
    rows = report["corruptions"]["conditions"]
    assert [(row["corruption"], row["severity"]) for row in rows] == [
        (name, severity) for name in CORRUPTIONS for severity in SEVERITIES
    ]
    for row in rows:
        assert len(row["exits"]) == 3
        assert set(row["budgets"]) == {"low", "medium", "high", "full"}
        for entry in (*row["exits"], *row["budgets"].values()):
            assert entry["n"] == SAMPLES
            assert entry["stderr"] == pytest.approx((entry["value"] * (1 - entry["value"]) / SAMPLES) ** 0.5)
    assert [row["corruption"] for row in report["corruptions"]["per_corruption"]] == list(CORRUPTIONS)


def test_a_budget_under_corruption_equals_the_answers_of_the_runtime(report, target, folder) -> None:
    index = target.test_index(SAMPLES)
    images, labels = target.load(index)
    rows = {(row["corruption"], row["severity"]): row for row in report["corruptions"]["conditions"]}
    for name, severity in (("gaussian_noise", 5), ("motion_blur", 3)):
        corrupted = corrupt(images, index, name, severity)
        for budget in ("low", "high"):
            runtime = Runtime.open(folder / "bundles/mixed", budget)
            answers = [runtime(corrupted[row : row + 1])[0] for row in range(SAMPLES)]
            entry = rows[name, severity]["budgets"][budget]
            right = [int(one.label) == label for one, label in zip(answers, labels, strict=True)]
            assert entry["value"] == np.mean(right)
            assert entry["mean_macs"] == pytest.approx(np.mean([one.macs for one in answers]))
            assert entry["exits"] == [sum(one.exit == k for one in answers) for k in (1, 2, 3)]


def test_means_and_drops_are_those_of_the_conditions(report) -> None:
    corruptions = report["corruptions"]
    groups = [(corruptions["mean"], corruptions["conditions"])]
    groups += [
        (row, [one for one in corruptions["conditions"] if one["corruption"] == row["corruption"]])
        for row in corruptions["per_corruption"]
    ]
    clean = corruptions["clean"]
    for mean, rows in groups:
        for k, entry in enumerate(mean["exits"]):
            assert entry["value"] == pytest.approx(np.mean([row["exits"][k]["value"] for row in rows]))
            assert entry["drop"] == pytest.approx(clean["exits"][k]["value"] - entry["value"])
        for name, entry in mean["budgets"].items():
            budgets = [row["budgets"][name] for row in rows]
            for key in ("value", "mean_macs", "saved"):
                assert entry[key] == pytest.approx(np.mean([budget[key] for budget in budgets]))
            counts = np.sum([budget["exits"] for budget in budgets], axis=0)
            assert entry["exit_shares"] == pytest.approx(counts / counts.sum())
            assert entry["drop"] == pytest.approx(clean["budgets"][name]["value"] - entry["value"])
    low = corruptions["mean"]["budgets"]["low"]
    assert min(low["exit_shares"]) > 0, "this bundle uses every exit"


def test_the_error_of_a_mean_is_that_of_the_mean_per_image(report, target) -> None:
    """Recomputed for exit 1 under one corruption; the drop is paired over images."""
    index = target.test_index(SAMPLES)
    images, labels = target.load(index)
    clean = target.exit_logits(images)[0].argmax(axis=-1) == labels
    answers = [target.exit_logits(corrupt(images, index, "fog", severity))[0] for severity in SEVERITIES]
    per_image = np.mean([logits.argmax(axis=-1) == labels for logits in answers], axis=0)
    row = next(row for row in report["corruptions"]["per_corruption"] if row["corruption"] == "fog")
    entry = row["exits"][0]
    assert entry["stderr"] == pytest.approx(per_image.std() / SAMPLES**0.5)
    assert entry["drop_stderr"] == pytest.approx((clean - per_image).std() / SAMPLES**0.5)
    assert entry["stderr"] > 0


def test_nothing_is_attacked(report, folder) -> None:
    assert report["transfer"] == report["curve"] == report["checks"] == report["flags"] == []
    assert set(report["exits"][0]) == {"exit", "clean"}
    assert all(set(row) == {"budget_macs", "clean"} for row in report["budgets"].values())
    assert (report["settings"]["attack"], report["settings"]["strong_n"]) == ("none", 0)
    reports = folder / "bundles/mixed/reports"
    assert not (reports / "transfer.png").exists()
    assert (reports / "corruptions.png").read_bytes().startswith(b"\x89PNG")
    card = (reports / "model_card.md").read_text()
    assert "worst case of all attacks" not in card
    assert "None: without attacks there is nothing to check." in card
    entry = report["corruptions"]["per_corruption"][4]["budgets"]["low"]
    line = next(line for line in card.splitlines() if line.startswith("| glass_blur |"))
    assert f"{100 * entry['value']:.1f} ± {100 * entry['stderr']:.1f}" in line


def test_a_run_trained_without_attacks_is_evaluated(tmp_path) -> None:
    settings = {"method": "clean", "epochs": 2}
    train_model(settings=settings, out=Path("runs/clean"), options=TrainOptions(threads=1))
    report = evaluate_model(Path("runs/clean"), samples=SAMPLES, options=ALONE).report
    assert report["budgets"] == {}
    assert all(row["budgets"] == {} for row in report["corruptions"]["conditions"])
    mean = report["corruptions"]["mean"]["exits"]
    assert [entry["n"] for entry in mean] == [SAMPLES] * 3
    assert sum(entry["drop"] for entry in mean) > 0
    assert (tmp_path / "runs/clean/reports/corruptions.png").exists()


def test_the_named_budgets_of_a_run_are_evaluated(folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    options = EvaluateOptions(("corruptions",), budgets=("low",))
    report = evaluate_model(Path("runs/digits"), samples=SAMPLES, options=options).report
    entry = report["corruptions"]["mean"]["budgets"]["low"]
    assert sum(entry["exit_shares"]) == pytest.approx(1)
    assert entry["drop"] == pytest.approx(report["budgets"]["low"]["clean"]["value"] - entry["value"])


def test_attacks_do_not_change_corruptions_nor_corruptions_the_worst_case(report, folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    both = EvaluateOptions(("pgd", "corruptions"))
    attacked = evaluate_model(Path("bundles/mixed"), samples=SAMPLES, steps=1, options=both).report
    assert attacked["corruptions"] == report["corruptions"]
    alone = evaluate_model(Path("bundles/mixed"), samples=SAMPLES, steps=1).report
    assert alone["exits"] == attacked["exits"]
    assert alone["budgets"] == attacked["budgets"]
    assert alone["corruptions"] == {}


@pytest.mark.parametrize("source", ["runs/digits", "bundles/mixed"])
def test_the_command_prints_tables_of_80_columns(folder, source) -> None:
    done = program("evaluate", source, "--attacks", "corruptions", "--samples", SAMPLES, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "worst" not in done.stdout, "no attack runs"
    tables = [line for line in done.stdout.splitlines() if not line.startswith("wrote ")]
    assert max(map(len, tables)) <= 80
    bundle = source.startswith("bundles")
    for name in CORRUPTIONS:
        assert sum(line.startswith(f"{name.replace('_', ' ')} ") for line in tables) == (2 if bundle else 1), (
            "per exit, and per budget"
        )
    assert sum(line.startswith("drop, points ") for line in tables) == 1
    assert ("exits taken, %" in done.stdout) == bundle


def test_json_holds_every_condition(folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    options = ("--attacks", "corruptions", "--samples", SAMPLES, "--json")
    printed = json.loads(typed("evaluate", "bundles/mixed", *options).stdout)
    assert len(printed["corruptions"]["conditions"]) == 75
    assert printed == json.loads((folder / "bundles/mixed/reports/evaluation.json").read_text())
