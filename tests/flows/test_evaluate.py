"""`mexit evaluate` on a finished run and its bundle: every group of attacks, with few samples and steps."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import refused, typed
from typer.main import get_command

from mexit.cli import app
from mexit.commands.evaluate import show_evaluation
from mexit.core.bundle import Bundle
from mexit.core.exit_policy import first_exit
from mexit.core.progress import Silent
from mexit.data.dataset import evenly_spaced
from mexit.data.splits import Splits
from mexit.errors import BudgetInfeasible, UsageError
from mexit.evaluate.config import GROUPS, EvaluateOptions, read_budgets, read_exits, read_groups
from mexit.evaluate.model_card import model_card
from mexit.evaluate.suites import to_levels
from mexit.evaluate.target import open_target
from mexit.flows.evaluate import EvaluateResult, evaluate_model
from mexit.flows.run_policies import run_policies
from mexit.models import build_model
from mexit.runtime.runtime import Runtime
from mexit.train import checkpoint
from mexit.train.config import resolve

pytestmark = pytest.mark.slow

torch.set_num_threads(1)
SAMPLES, STRONG = 24, 8


def reduced(groups: tuple[str, ...], **more: object) -> EvaluateOptions:
    return EvaluateOptions(groups, exits=(1,), strong_samples=STRONG, targets=1, queries=10, autoattack_steps=2, **more)


@pytest.fixture(scope="module")
def folder(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace of its own for this file: the reports are written into the run and the bundle."""
    return Path(shutil.copytree(workspace, tmp_path_factory.mktemp("evaluation") / "workspace"))


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, object]:
    """The report of all groups, with transfer from the same run."""
    before = Path.cwd()
    try:
        os.chdir(folder)
        options = reduced(GROUPS, transfer=Path("runs/digits"))
        return dict(evaluate_model(Path("bundles/digits"), samples=SAMPLES, steps=3, options=options).report)
    finally:
        os.chdir(before)


def conditions(row: dict[str, object]) -> dict[str, dict[str, float]]:
    return {name: entry for name, entry in row.items() if isinstance(entry, dict)}


def test_every_attack_is_reported_with_its_error_and_none_is_worse_than_the_worst_case(report, folder) -> None:
    names = {"clean", "average", "max-average", "transfer average", "transfer max-average", "route", "soft", "square",
             "square served", "rays", "autoattack", "sloth", "hinge", "worst"}  # fmt: skip
    assert set(report["budgets"]) == {"low", "medium", "high", "full"}
    full = Bundle.open(folder / "bundles/digits").manifest.costs.static
    for row in report["budgets"].values():
        assert set(conditions(row)) == names
        for name, entry in conditions(row).items():
            wide = name in ("clean", "average", "max-average")
            assert entry["n"] == (SAMPLES if wide else STRONG)
            assert entry["stderr"] == pytest.approx((entry["value"] * (1 - entry["value"]) / entry["n"]) ** 0.5)
            assert wide or row["worst"]["value"] <= entry["value"]
            if name != "worst":
                assert sum(entry["exits"]) == entry["n"]
                assert entry["saved"] == pytest.approx(1 - entry["mean_macs"] / full)
    for row in report["exits"]:
        assert set(conditions(row)) >= {"clean", "average", "max-average", "worst"}
        assert ("autoattack" in row) == (row["exit"] == 1), "only --exits 1 was asked for"


def test_slowdown_attacks_never_reduce_the_mean_cost(report, folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    target = open_target(Path("bundles/digits"), None, "auto")
    index = evenly_spaced(target.test_index(SAMPLES), STRONG)
    logits = target.exit_logits(target.load(index)[0])
    for name, budget in target.budgets.items():
        costs = np.asarray(budget.exit_macs)
        scores = budget.policy.scorer(10).score(logits)
        clean = costs[first_exit(scores, budget.policy.thresholds) - 1].mean()
        for attack in ("sloth", "hinge"):
            assert report["budgets"][name][attack]["mean_macs"] >= clean


def test_a_failed_check_is_shown_on_the_terminal_and_in_the_model_card(report, folder, capsys) -> None:
    check = {"name": "the moon is round", "passed": False, "found": "a square", "expected": "a disc",
             "means": "look again"}  # fmt: skip
    failed = {**report, "checks": [check], "flags": ["the moon is round: a square, expected a disc"]}
    show_evaluation(EvaluateResult(failed, ()))
    shown = " ".join(capsys.readouterr().out.split())
    assert "FLAGS: 1 of 1 checks failed" in shown
    assert "look" in shown
    card = model_card(open_target(folder / "runs/digits", None, "auto"), failed)
    assert "- the moon is round: a square, expected a disc" in card
    assert "1 of 1 checks of the evaluation itself failed" in card


def test_the_training_command_of_the_card_has_only_flags_of_mexit_train(report, folder) -> None:
    given = {"craft_train_mode": False, "selection_steps": 2, "seed": 3, "norm": "l2"}
    target = open_target(folder / "runs/digits", None, "auto")
    source = replace(target.source, settings=resolve("mnist", "rdi", given))
    card = model_card(replace(target, source=source), report)
    flags = re.findall(r" (--[\w-]+)", next(line for line in card.splitlines() if line.startswith("mexit train")))
    known = get_command(app).commands["train"].params
    assert set(flags) <= {name for parameter in known for name in (*parameter.opts, *parameter.secondary_opts)}
    assert set(flags) >= {"--craft-eval-mode", "--seed", "--norm"}


def test_the_curve_and_the_checks_are_there(report) -> None:
    eps = report["settings"]["eps"]
    radii = [row["eps"] for row in report["curve"]]
    assert radii == sorted(radii)
    assert radii[0] == 0
    assert eps in radii
    assert 0.5 in radii
    assert all(len(row["exits"]) == 3 and set(row["budgets"]) == set(report["budgets"])
               for row in report["curve"])  # fmt: skip
    names = " ".join(check["name"] for check in report["checks"])
    for topic in ("pass to pass", "gradient", "noise", "larger radius", "breaks everything", "twice the steps",
                  "a black box breaks", "low, square", "full, rays", "AutoAttack is no weaker",
                  "worst case"):  # fmt: skip
        assert topic in names
    assert len(report["flags"]) == sum(not check["passed"] for check in report["checks"])


def test_card_and_pictures_are_written_into_the_bundle(report, folder) -> None:
    reports = folder / "bundles/digits/reports"
    for picture in ("evaluation.png", "transfer.png", "accuracy_against_eps.png", "corruptions.png"):
        assert (reports / picture).read_bytes().startswith(b"\x89PNG")
    assert json.loads((reports / "evaluation.json").read_text()) == report
    card = (reports / "model_card.md").read_text()
    for line in ("## Network", "## Training", "## Results", "## Flags", "## Limitations",
                 "mexit train --data digits --preset demo --method adversarial --step 0.08 --steps 2 --epochs 8",
                 "mexit export runs/digits", "| seed | `0` |"):  # fmt: skip
        assert line in card
    assert all(flag in card for flag in report["flags"])
    value = report["budgets"]["low"]["route"]["value"]
    assert f"| route | {100 * value:.1f} ±" in card


def test_a_run_is_evaluated_without_budgets(folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    report = evaluate_model(Path("runs/digits"), samples=SAMPLES, steps=2).report
    assert report["budgets"] == {}
    assert report["curve"] == []
    assert [row["exit"] for row in report["exits"]] == [1, 2, 3]
    assert all(row["worst"]["n"] == SAMPLES for row in report["exits"])
    assert all(row["worst"]["value"] <= min(row["average"]["value"], row["clean"]["value"])
               for row in report["exits"])  # fmt: skip
    card = (folder / "runs/digits/reports/model_card.md").read_text()
    assert "Not run: policy, autoattack, slowdown, sanity, corruptions (" in card


def test_the_policies_of_a_run_are_those_of_its_bundle(folder, monkeypatch) -> None:
    """Selected from the logits of torch and of ONNX Runtime, which differ by rounding."""
    monkeypatch.chdir(folder)
    target, bundle = (open_target(Path(path), None, "auto") for path in ("runs/digits", "bundles/digits"))
    assert target.costs == bundle.runtime.costs
    policies = run_policies(target, ["medium", "low", "35%"], Silent())
    for name in ("medium", "low"):
        policy, expected = policies[name].policy, bundle.budgets[name].policy
        assert (policy.measure, policy.ensemble) == (expected.measure, expected.ensemble)
        assert policy.temperatures == pytest.approx(expected.temperatures, rel=1e-3)
        assert policy.thresholds == pytest.approx(expected.thresholds, rel=1e-3, abs=1e-3)
        assert policies[name].budget_macs == bundle.budgets[name].budget_macs
        assert policies[name].exit_macs == bundle.budgets[name].exit_macs
    assert policies["35%"].budget_macs == pytest.approx(0.35 * target.costs.static)
    with pytest.raises(BudgetInfeasible):
        run_policies(target, ["1k"], Silent())


def test_a_run_is_attacked_with_the_policy_of_a_named_budget(folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    options = reduced(("pgd", "autoattack"), budgets=("medium",), transfer=Path("runs/digits"))
    report = evaluate_model(Path("runs/digits"), samples=SAMPLES, steps=2, options=options).report
    assert set(report["budgets"]) == {"medium"}
    medium = report["budgets"]["medium"]
    transferred = {"transfer average", "transfer max-average"}
    assert set(conditions(medium)) == {"clean", "average", "max-average", "autoattack", "worst"} | transferred
    assert all(medium[name]["n"] == STRONG for name in transferred | {"autoattack", "worst"})
    assert report["settings"]["budgets"] == ["medium"]
    assert "--budgets medium" in Path("runs/digits/reports/model_card.md").read_text()


def test_images_crafted_on_the_run_itself_transfer_as_direct_attacks(folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    options = EvaluateOptions(strong_samples=None, transfer=Path("runs/digits"))
    report = evaluate_model(Path("runs/digits"), samples=SAMPLES, steps=3, options=options).report
    assert report["settings"]["strong_n"] == SAMPLES
    for row in report["exits"]:
        assert row["transfer average"] == row["average"]
        assert row["transfer max-average"] == row["max-average"]


def test_only_named_budgets_of_a_bundle_are_evaluated(folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    options = EvaluateOptions(budgets=("high", "low"))
    report = evaluate_model(Path("bundles/digits"), samples=8, steps=1, options=options).report
    assert list(report["budgets"]) == ["high", "low"]
    with pytest.raises(UsageError, match="--budgets night: bundles/digits has policies for low, medium, high, full"):
        evaluate_model(Path("bundles/digits"), options=replace(options, budgets=("low", "night")))


def test_the_report_names_the_device_and_does_not_depend_on_the_batch(folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    options = EvaluateOptions(device="cpu", batch=5)
    small = evaluate_model(Path("runs/digits"), samples=SAMPLES, steps=2, options=options).report
    assert small["settings"]["device"] == "cpu"
    assert "crafted on cpu" in Path("runs/digits/reports/model_card.md").read_text()
    whole = evaluate_model(Path("runs/digits"), samples=SAMPLES, steps=2, options=replace(options, batch=None)).report
    assert small["exits"] == whole["exits"]


def test_the_threads_are_those_of_torch_and_of_the_engine(folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    assert open_target(Path("bundles/digits"), None, "ort", threads=2).runtime.threads == 2
    before, line = torch.get_num_threads(), ("evaluate", "--samples", 8, "--attacks", "clean", "--no-report")
    try:
        for number in (2, 1):
            assert typed(*line, "bundles/digits", "--threads", number).exit_code == 0
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize(
    "command", ["evaluate runs/digits", "calibrate bundles/digits", "export runs/digits --out bundles/x"]
)
def test_a_missing_cuda_device_is_a_usage_error(folder, command, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    said = refused(*command.split(), "--device", "cuda", code=2)
    assert "--device cuda: torch finds no CUDA device here; choose cpu, or install a CUDA build" in said
    assert not (folder / "bundles/x").exists()


def test_the_radii_and_the_card_of_an_l2_run(folder, monkeypatch) -> None:
    """An L2 radius may exceed 1, and an image turns grey only at 0.5 times the root of its number of pixels."""
    monkeypatch.chdir(folder)
    settings = resolve("digits", None, {"norm": "l2", "eps": 1.5, "step": 0.4})
    network = build_model("digits-cnn", 10)
    checkpoint.create_run(Path("runs/l2"), settings, Splits.load(Path("runs/digits/splits.npz")))
    checkpoint.save_weights(Path("runs/l2"), network.state_dict(), settings, 10)
    report = evaluate_model(Path("runs/l2"), samples=8, steps=1, options=reduced(("pgd", "sanity"))).report
    assert [row["eps"] for row in report["curve"]] == [0, 0.375, 0.75, 1.5, 2.25, 3, 4]
    assert "a radius of 4 breaks everything" in {check["name"] for check in report["checks"]}
    assert "changes of an L2 norm of at most 1.5" in Path("runs/l2/reports/model_card.md").read_text()


def test_the_report_agrees_with_the_answers_of_the_deployed_bundle(folder, monkeypatch) -> None:
    """Clean accuracy, exits and cost of a budget equal those of the runtime, one image at a time."""
    monkeypatch.chdir(folder)
    report = evaluate_model(Path("bundles/digits"), samples=SAMPLES, steps=1).report
    target = open_target(Path("bundles/digits"), None, "auto")
    images, labels = target.load(target.test_index(SAMPLES))
    for budget in ("low", "full"):
        answers = [Runtime.open(Path("bundles/digits"), budget)(images[row : row + 1])[0] for row in range(SAMPLES)]
        row = report["budgets"][budget]["clean"]
        assert row["value"] == np.mean([int(one.label) == label for one, label in zip(answers, labels, strict=True)])
        assert row["mean_macs"] == pytest.approx(np.mean([one.macs for one in answers]))
        assert row["exits"] == [sum(one.exit == k for one in answers) for k in (1, 2, 3)]


def test_images_sent_to_a_served_bundle_have_eight_bits() -> None:
    images = np.random.default_rng(0).random((2, 1, 4, 4)).astype(np.float32)
    sent = to_levels(images)
    assert np.abs(sent - images).max() <= 0.5 / 255 + 1e-6
    np.testing.assert_array_equal(np.round(sent * 255).astype(np.uint8).astype(np.float32) / 255, sent)


def test_groups_and_exits_as_typed() -> None:
    assert read_groups("pgd") == ("pgd",)
    assert read_groups("slowdown, policy") == ("pgd", "policy", "slowdown")
    assert read_groups("corruptions") == ("corruptions",)
    assert read_groups("corruptions,slowdown") == ("pgd", "slowdown", "corruptions")
    assert read_groups("all") == GROUPS
    assert read_groups("clean") == read_groups("none") == ()
    assert read_groups(None) is None
    assert EvaluateOptions().for_run("none") == EvaluateOptions(())
    assert EvaluateOptions().for_run("average") == EvaluateOptions().for_run("max-average") == EvaluateOptions(("pgd",))
    assert EvaluateOptions(("pgd",)).for_run("none") == EvaluateOptions(("pgd",))
    assert not EvaluateOptions(()).attacked
    assert not EvaluateOptions(("corruptions",)).attacked
    assert EvaluateOptions(("corruptions",), transfer=Path("runs/other")).attacked
    assert read_exits("3,1") == (1, 3)
    assert read_exits("all") is None
    assert read_budgets("low, 30%,low") == ("low", "30%")
    assert read_budgets(None) is None
    with pytest.raises(UsageError, match="numbers such as 1,3"):
        read_exits("first")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"groups": ("pgd", "autoattack"), "exits": (7,)}, "--exits 7: this network has exits 1 to 3"),
        ({"groups": ("pgd", "policy"), "transfer": Path("runs/other")}, "takes (1, 28, 28) images of 10 classes"),
        ({"targets": 0}, "--targets 0"),
        ({"batch": 0}, "--batch 0"),
        ({"threads": 0}, "threads must be at least 1, found 0"),
        ({"device": "tpu"}, "unknown device 'tpu': choose auto, cpu or cuda"),
        ({"strong_samples": -3}, "--strong-samples -3"),
    ],
    ids=["exit", "transfer", "targets", "batch", "threads", "device", "samples"],
)
def test_a_mistake_is_reported_before_any_work(folder, monkeypatch, values, message) -> None:
    monkeypatch.chdir(folder)
    settings = resolve("mnist", None, {})
    other = build_model("small-cnn", 10)
    checkpoint.create_run(Path("runs/other"), settings, Splits.load(Path("runs/digits/splits.npz")))
    checkpoint.save_weights(Path("runs/other"), other.state_dict(), settings, 10)

    class NoWork(Silent):
        def track(self, text: str, total: int):
            raise AssertionError(f"began {text}")

    with pytest.raises(UsageError, match=re.escape(message)):
        evaluate_model(Path("runs/digits"), options=EvaluateOptions(**values), progress=NoWork())


def test_unknown_attacks_end_with_a_usage_error(folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    said = refused("evaluate", "runs/digits", "--attacks", "magic", code=2)
    assert (
        "unknown attacks 'magic': choose from pgd, policy, autoattack, slowdown, sanity, corruptions, all, or" in said
    )
