"""`mexit evaluate` keeps the results of other attacks, shows budgets of one policy as one, and records its command."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.main import get_command

from mexit.cli import app
from mexit.commands.evaluate import show_evaluation
from mexit.core.budget import short_macs
from mexit.core.bundle import Bundle
from mexit.core.glossary import GLOSSARY
from mexit.evaluate.config import EvaluateOptions
from mexit.flows.calibrate import CalibrateOptions, calibrate_bundle
from mexit.flows.evaluate import evaluate_model
from mexit.train import checkpoint

pytestmark = pytest.mark.slow

torch.set_num_threads(1)
RUN, BUNDLE = Path("runs/digits"), Path("bundles/digits")
CLEAN, PGD = EvaluateOptions(()), EvaluateOptions(("pgd",))


@pytest.fixture
def folder(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = Path(shutil.copytree(workspace, tmp_path / "workspace"))
    monkeypatch.chdir(root)
    return root


@pytest.mark.usefixtures("folder")
def test_results_of_other_attacks_stay_in_their_file_and_in_the_card(capsys: pytest.CaptureFixture[str]) -> None:
    attacked = evaluate_model(RUN, samples=30, steps=1, options=PGD)
    result = evaluate_model(RUN, samples=40, options=CLEAN)
    reports = RUN / "reports"
    assert json.loads((reports / "evaluation-pgd.json").read_text()) == json.loads(json.dumps(attacked.report))
    assert json.loads((reports / "evaluation.json").read_text())["settings"]["n"] == 40
    assert result.kept == (reports / "evaluation-pgd.json",)
    card = (reports / "model_card.md").read_text()
    assert "`evaluation-pgd.json`: 30 of 449 test images" in card
    worst = attacked.report["exits"][0]["worst"]
    assert f"{100 * worst['value']:.1f} ± {100 * worst['stderr']:.1f} |" in card.split("## Earlier results")[1]
    show_evaluation(result)
    assert "kept, of other attacks: evaluation-pgd.json" in capsys.readouterr().out


@pytest.mark.usefixtures("folder")
def test_results_of_other_weights_are_replaced() -> None:
    evaluate_model(RUN, samples=20, steps=1, options=PGD)
    assert (RUN / "reports/transfer.png").exists()
    model, settings, _ = checkpoint.load_model(RUN)
    torch.nn.init.zeros_(next(model.parameters()))
    checkpoint.save_weights(RUN, model.state_dict(), settings, 10)
    assert evaluate_model(RUN, samples=20, options=CLEAN).kept == ()
    left = {path.name for path in (RUN / "reports").iterdir()}
    assert "evaluation-clean.json" in left
    assert not left & {"evaluation-pgd.json", "transfer.png"}


@pytest.mark.usefixtures("folder")
def test_budgets_of_one_policy_are_one_row_and_old_thresholds_are_not_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    calibrate_bundle(BUNDLE, options=CalibrateOptions(policy="geometric", measure="margin", attack="none"))
    evaluate_model(BUNDLE, samples=20, steps=1, options=PGD)
    bundle = Bundle.open(BUNDLE)
    (entry,) = bundle.policies().entries
    same = replace(entry, named={**entry.named, "medium": entry.named["low"]})
    bundle.save_policies(replace(bundle.policies(), entries=(same,)))
    result = evaluate_model(BUNDLE, samples=20, options=CLEAN)
    assert result.report["settings"]["same_policy"] == [["low", "medium"], ["high"], ["full"]]
    assert set(result.report["budgets"]) == {"low", "medium", "high", "full"}
    show_evaluation(result)
    assert re.search(r"low, medium\s+≤", capsys.readouterr().out)
    card = (BUNDLE / "reports/model_card.md").read_text()
    assert "| low, medium (" in card
    assert "| budget |" not in card.split("## Earlier results")[1].split("## ")[0]


@pytest.mark.usefixtures("folder")
def test_the_command_of_the_card_repeats_the_evaluation() -> None:
    options = replace(CLEAN, budgets=("low", "high"), device="cpu", batch=17)
    evaluate_model(BUNDLE, samples=20, options=options)
    card = (BUNDLE / "reports/model_card.md").read_text()
    command = next(line for line in card.splitlines() if line.startswith("mexit evaluate"))
    for flag in ("--batch 17", "--budgets low,high", "--device cpu", "--backend ort", "--attacks clean"):
        assert flag in command
    known = {name for parameter in get_command(app).commands["evaluate"].params for name in parameter.opts}
    assert set(re.findall(r" (--[\w-]+)", command)) <= known


@pytest.mark.usefixtures("folder")
def test_the_card_of_a_bundle_shows_the_settings_of_its_weights() -> None:
    shutil.copy(RUN / checkpoint.WEIGHTS, RUN / "weights-before.safetensors")  # as a longer training keeps them
    _, settings, _ = checkpoint.load_model(RUN)
    longer = replace(settings, epochs=99, lr=0.0123)
    (RUN / "settings.json").write_text(json.dumps(longer.to_json()))
    assert checkpoint.load_settings(RUN).epochs == 99
    evaluate_model(BUNDLE, samples=20, options=CLEAN)
    card = (BUNDLE / "reports/model_card.md").read_text()
    assert f"| epochs | `{settings.epochs}` |" in card
    assert "0.0123" not in card
    words = card.split("## Words")[1]
    assert f"- **MACs**: {GLOSSARY['MACs']}." in words
    assert "PGD" not in words, "there was no attack"


@pytest.mark.usefixtures("folder")
def test_a_budget_whose_test_cost_is_above_it_has_no_sign_below(capsys: pytest.CaptureFixture[str]) -> None:
    result = evaluate_model(BUNDLE, samples=20, options=CLEAN)
    budgets = dict(result.report["budgets"])
    clean = budgets["low"]["clean"]
    for limit, sign in ((clean["mean_macs"] * 0.9, False), (clean["mean_macs"], True)):
        budgets["low"] = {**budgets["low"], "budget_macs": limit}
        show_evaluation(replace(result, report={**result.report, "budgets": budgets}))
        shown = " ".join(capsys.readouterr().out.split())
        assert (re.search(r"low[\w, ]* ≤", shown) is not None) == sign
        said = f"{short_macs(clean['mean_macs'])} MACs in the mean, of {short_macs(limit)} in the budget"
        assert (said in shown) != sign
