"""Evaluate a run or a bundle: accuracy on the test split, per exit and per budget, clean and under attack.

A run is evaluated in torch, where budgets are named with policies selected for it. A bundle is evaluated as deployed:
the images are attacked with the gradients of the run behind it, evaluated by the exported segments, and decided by the
calibrated policies.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mexit.core.artifact_paths import BUNDLES, RUNS, newest
from mexit.core.atomic_io import sha256_bytes, sha256_file, to_json, write_bytes
from mexit.core.budget import MADE_BY
from mexit.core.exit_policy import Policy
from mexit.core.progress import Progress, Silent
from mexit.data.dataset import evenly_spaced
from mexit.errors import UsageError, requires_extra
from mexit.evaluate import plots, reports
from mexit.evaluate.config import EvaluateOptions
from mexit.evaluate.reports import merged_budgets

with requires_extra("train", "Evaluating a network"):
    from mexit.attacks.autoattack import import_pyautoattack
    from mexit.attacks.pgd import Attack
    from mexit.evaluate import sanity_checks, suites
    from mexit.evaluate.corruptions import corruption_report, run_corruptions_group
    from mexit.evaluate.details import Details, measure_details
    from mexit.evaluate.model_card import model_card
    from mexit.evaluate.report_files import remove_details, write_details
    from mexit.evaluate.results import AttackResults, budget_rows, curve_rows, exit_rows, transfer_matrix
    from mexit.evaluate.target import EvaluationTarget, Index, open_target
    from mexit.flows.run_policies import run_policies
    from mexit.models.device import describe_device, exact_float32
    from mexit.train import checkpoint
    from mexit.train.precision import set_threads

SAMPLES = 1000
REPORTS = Path("reports")
CARD = "model_card.md"
PICTURE, TRANSFER, CURVE = "evaluation.png", "transfer.png", "accuracy_against_eps.png"
CORRUPTIONS = "corruptions.png"


@dataclass(frozen=True)
class EvaluateResult:
    """The result of an evaluation.

    Attributes:
        report: what `--json` prints: exits, budgets, transfer, curve, corruptions, checks,
            flags, details, settings.
        written: paths of the JSON files, the pictures, the page and the model card.
        kept: paths of earlier reports of other attacks on the same weights.
    """

    report: Mapping[str, Any]
    written: tuple[Path, ...]
    kept: tuple[Path, ...] = ()


@exact_float32()
def evaluate_model(
    source: Path | None = None,
    *,
    data_dir: str | Path | None = None,
    samples: int | None = SAMPLES,
    eps: float | None = None,
    steps: int | None = None,
    backend: str = "auto",
    options: EvaluateOptions | None = None,
    progress: Progress | None = None,
) -> EvaluateResult:
    """Evaluate a run or a bundle on the test split, and write a report into it.

    Args:
        source: a run or a bundle; None = the newest bundle, else the newest run.
        data_dir: directory of the data sets; None = `MEXIT_DATA`.
        samples: largest number of test images, evenly spaced; None = all.
        eps: radius of the attacks, a fraction of the pixel range; None = the run's test setting.
        steps: steps of the attacks; None = the run's test setting.
        backend: engine of a bundle.
        options: which attacks, how strong, and on which device; None = the group pgd.
        progress: receives progress; None = nothing is shown.

    Raises:
        UsageError: a number is out of range, the device does not exist, or a budget has no policy.
        NotFound, StalePolicy: the run behind a bundle does not exist here or has other weights.
        MissingExtra: torch, or for some attacks `pyautoattack`, is not installed.
    """
    progress, options, start = progress or Silent(), options or EvaluateOptions(), time.monotonic()
    if options.threads is not None:
        set_threads(options.threads)
    path = source or _newest(progress)
    target = open_target(path, data_dir, backend, options.device, options.batch, options.threads)
    if target.source.superseded_by:
        progress.note(
            f"{target.path} was exported before the last training of its run, and has the weights of that time: "
            f"{target.source.superseded_by} exports the new ones"
        )
    options = _with_groups(options, target, progress)
    _check(options, target)
    target = _with_budgets(target, options, progress)
    index = target.test_index(samples)
    strong = evenly_spaced(np.arange(len(index)), options.strong_samples)
    attack = target.source.settings.test_attack("average", eps, steps)
    attack = replace(attack, pgd=replace(attack.pgd, restarts=options.restarts))
    if options.attacked:
        logits = suites.run_pgd_group(target, index, attack.pgd, progress)
    else:
        logits = suites.run_clean(target, index)
    groups = target.splits.groups_of(index)
    results = AttackResults(target.data.labels[index], strong, logits, groups=groups, exit_numbers=target.numbers)
    context = suites.AttackContext(target, options, progress, *target.load(index[strong]), index[strong], attack.pgd)
    curve, checks = _run_strong_groups(context, results)
    settings = _settings(target, options, attack, len(index), len(strong))
    details = measure_details(target, index, results) if options.report else None
    report = {
        "exits": exit_rows(results),
        "budgets": budget_rows(results, target),
        "transfer": transfer_matrix(results),
        "curve": curve,
        "corruptions": _corruptions(context, index, results),
        "checks": [check.to_json() for check in checks],
        "flags": [check.flag() for check in checks if not check.passed],
        "details": details.to_json() if details else {},
        "settings": settings | {"seconds": round(time.monotonic() - start, 1)},
    }
    return _write(target, report, details)


def _newest(progress: Progress) -> Path:
    return newest(BUNDLES if (BUNDLES / "latest").exists() else RUNS, progress)


def _with_groups(options: EvaluateOptions, target: EvaluationTarget, progress: Progress) -> EvaluateOptions:
    """The options with their default groups: clean images alone for a run that was trained on clean images."""
    resolved = options.for_run(target.source.settings.attack)
    if options.groups is None and not resolved.attacked:
        progress.note("clean images alone: the run was trained on clean images (--attacks pgd attacks it)")
    return resolved


def _check(options: EvaluateOptions, target: EvaluationTarget) -> None:
    """Reject what would otherwise fail after long work."""
    options.autoattack_exits(target.numbers)
    if "policy" in options.chosen or "autoattack" in options.chosen:
        import_pyautoattack()
    if options.transfer is not None:
        other, model = checkpoint.load_model(options.transfer)[0], target.source.model
        if (other.input_shape, other.classes) != (model.input_shape, model.classes):
            raise UsageError(
                f"--transfer {options.transfer} takes {other.input_shape} images of {other.classes} classes, this "
                f"network {model.input_shape} of {model.classes}: name a run on the same data"
            )


def _with_budgets(target: EvaluationTarget, options: EvaluateOptions, progress: Progress) -> EvaluationTarget:
    """The target with the policies of the named budgets alone; without names the target itself."""
    names = options.budgets
    if names is None:
        return target
    if target.runtime is None:
        return replace(target, budgets=run_policies(target, names, progress))
    missing = [name for name in names if name not in target.budgets]
    if missing:
        adds = dict.fromkeys(MADE_BY.get(name, "mexit calibrate --budget NAME=VALUE") for name in missing)
        raise UsageError(
            f"--budgets {','.join(missing)}: {target.path} has policies for {', '.join(target.budgets) or 'none'}; "
            f"{' or '.join(adds)} adds one"
        )
    return replace(target, budgets={name: target.budgets[name] for name in names})


def _run_strong_groups(
    context: suites.AttackContext, results: AttackResults
) -> tuple[list[dict[str, Any]], list[sanity_checks.Check]]:
    """Run every group but pgd: adds logits to `results`, returns the rows of the curve and the checks."""
    if not context.options.attacked:
        return [], []
    options, rows, checks = context.options, [], []
    if options.transfer is not None:
        suites.run_transfer(context, results, options.transfer)
    if "policy" in options.chosen:
        suites.run_policy_group(context, results)
    if "autoattack" in options.chosen:
        warnings = suites.run_autoattack_group(context, results)
        checks += sanity_checks.autoattack_checks(context, results, warnings)
    if "slowdown" in options.chosen:
        suites.run_slowdown_group(context, results)
    if "sanity" in options.chosen:
        curve = suites.accuracy_curve(context)
        rows = curve_rows(curve, context.labels, context.target, results.groups_at(results.strong_index))
        checks += sanity_checks.curve_checks(context, curve)
    basic = sanity_checks.basic_checks(context, results)
    return rows, [*basic, *sanity_checks.black_box_checks(context, results), *checks]


def _corruptions(context: suites.AttackContext, index: Index, results: AttackResults) -> dict[str, Any]:
    """The report's `corruptions` on the images at `index`, (N,); empty if the group does not run."""
    if "corruptions" not in context.options.chosen:
        return {}
    outcomes = run_corruptions_group(context.target, index, context.progress)
    return corruption_report(outcomes, results.pgd["clean"], results.labels, context.target, results.groups)


def _settings(
    target: EvaluationTarget, options: EvaluateOptions, attack: Attack, n: int, strong_n: int
) -> dict[str, Any]:
    """The report's `settings`."""
    return {
        "source": str(target.path),
        "model_sha256": _model_sha256(target),
        "engine": target.engine,
        "data": target.data.name,
        "data_sha256": target.data.sha256,
        "split": "test",
        "n": n,
        "strong_n": strong_n if options.strong_groups else 0,
        "of": len(target.splits.part("test")),
        "attack": attack.describe() if options.attacked else "none",
        "eps": attack.pgd.eps,
        "step": attack.pgd.step_size,
        "steps": attack.pgd.steps,
        "restarts": attack.pgd.restarts,
        "attacks": list(dict.fromkeys((*(("pgd",) if options.attacked else ()), *options.chosen))),
        "exits": ",".join(map(str, options.exits)) if options.exits else "all",
        "targets": options.targets,
        "queries": options.queries,
        "autoattack_steps": options.autoattack_steps,
        "transfer_from": None if options.transfer is None else str(options.transfer),
        "budgets": list(target.budgets),
        "same_policy": _same_policy(target),
        "policies_sha256": _policies_sha256(target),
        "budgets_named": options.budgets is not None,
        "batch": target.batch,
        "seed": 0,
        "precision": "fp32",
        "device": describe_device(target.source.device),
    }


def _model_sha256(target: EvaluationTarget) -> str:
    """The id of a bundle, or the sha256 of the weights of a run."""
    return sha256_file(target.path / checkpoint.WEIGHTS) if target.runtime is None else target.runtime.bundle.id


def _same_policy(target: EvaluationTarget) -> list[list[str]]:
    """The names of the budgets, those with one policy together."""
    groups: dict[Policy, list[str]] = {}
    for name, budget in target.budgets.items():
        groups.setdefault(budget.policy, []).append(name)
    return list(groups.values())


def _policies_sha256(target: EvaluationTarget) -> str:
    """The sha256 of the policies by name."""
    return sha256_bytes(to_json({name: asdict(budget.policy) for name, budget in target.budgets.items()}))


def _write(target: EvaluationTarget, report: Mapping[str, Any], details: Details | None) -> EvaluateResult:
    """Write the report, its pictures (with matplotlib), the page and the model card."""
    folder = target.path / REPORTS
    saved = reports.save(folder, report)
    written = list(saved.written)
    if saved.replaced:  # these pictures are not drawn for every report
        for name in (TRANSFER, CURVE, CORRUPTIONS):
            (folder / name).unlink(missing_ok=True)
    if plots.available():
        title = f"{target.path.name}: test split"
        budgets = {name: row["budget_macs"] for name, row in report["budgets"].items()}
        merged = {names: row["budget_macs"] for names, row in merged_budgets(report)}
        written.append(folder / PICTURE)
        plots.accuracy_against_macs(_lines(target, report), merged, written[-1], title)
        if report["transfer"]:
            written.append(folder / TRANSFER)
            accuracy = [[cell["value"] for cell in row] for row in report["transfer"]]
            plots.transfer_matrix(accuracy, target.numbers, written[-1], title)
        if report["curve"]:
            written.append(folder / CURVE)
            plots.accuracy_against_eps(report["curve"], target.numbers, report["settings"]["eps"], written[-1], title)
        if report["corruptions"]:
            written.append(folder / CORRUPTIONS)
            plots.corruptions(report["corruptions"], target.numbers, budgets, written[-1], title)
    remove_details(folder)
    if details is not None:
        written += write_details(details, report, folder, target.path.name)
    written.append(folder / CARD)
    write_bytes(written[-1], model_card(target, report, saved.others).encode())
    return EvaluateResult(report, tuple(written), tuple(folder / name for name in saved.others))


def _lines(target: EvaluationTarget, report: Mapping[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """The lines (mean MACs, accuracy) of the picture of accuracy against cost."""
    costs = target.cumulative_macs
    lines: dict[str, list[tuple[float, float]]] = {}
    for name, condition in (("clean", "clean"), ("attacked", "average")):
        if condition not in report["exits"][0]:
            continue
        if report["budgets"]:
            lines[f"{name}, per budget"] = [
                (row[condition]["mean_macs"], row[condition]["value"]) for row in report["budgets"].values()
            ]
        lines[f"{name}, single exits"] = [
            (macs, row[condition]["value"]) for macs, row in zip(costs, report["exits"], strict=True)
        ]
    return lines
