"""Train a network of the queue and evaluate it: PGD per exit and for the policy medium, transfer, AutoAttack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import data_parts
from context import Context
from items import AUTOATTACK, Item

from mexit.attacks.autoattack import import_pyautoattack
from mexit.data.splits import split
from mexit.errors import NotFound
from mexit.evaluate.config import EvaluateOptions
from mexit.flows.evaluate import EvaluateResult, evaluate_model
from mexit.flows.train import TrainOptions, train_model
from mexit.train import checkpoint
from mexit.train.config import resolve

TEST_IMAGES, STRONG_IMAGES = 2000, 1000
BUDGET = "medium"


def train(item: Item, context: Context) -> bool:
    """Train the run of the item, from its checkpoint if it has one, then evaluate it. Returns whether it is done."""
    run = Path("runs") / item.name
    if not (run / checkpoint.SETTINGS).exists():
        _create(run, item, context)
    if not (run / checkpoint.WEIGHTS).exists():
        options = TrainOptions(should_stop=context.should_stop)
        if not train_model(item.data, out=run, resume=True, data_dir=context.data_dir, options=options).finished:
            return False
    if context.should_stop():
        return False
    groups, transfer = ("pgd",), None
    if item.transfer and (context.run(item.transfer) / checkpoint.WEIGHTS).exists():
        transfer = context.run(item.transfer)
    result = _evaluate(run, context, groups, transfer)
    context.write(item.name, "evaluation.json", _summary(result))
    return True


def autoattack(item: Item, context: Context) -> bool:
    """AutoAttack on every exit and on the policy medium of the run of another item."""
    import_pyautoattack()
    name = item.name.removeprefix(AUTOATTACK)
    result = _evaluate(context.run(name), context, ("pgd", "autoattack"), None)
    context.write(item.name, "autoattack.json", _summary(result))
    return True


def _create(run: Path, item: Item, context: Context) -> None:
    """Store settings and splits, as `train_model` does, but with splits of the pictures that exist."""
    data, present = data_parts.load(item.data, context.data_dir)
    if present is not None and not present.complete:
        raise NotFound(f"{item.data} is here in part only ({present.parts} of {present.of}): bring the other parts")
    settings = resolve(item.data, item.preset, item.settings)
    splits = split(data).thinned(data, settings.fraction, settings.omit_class)
    checkpoint.create_run(run, settings, data_parts.present_splits(splits, present))


def _evaluate(run: Path, context: Context, groups: tuple[str, ...], transfer: Path | None) -> EvaluateResult:
    strong, samples = (4, 8) if context.miniature else (STRONG_IMAGES, TEST_IMAGES)
    strength: dict[str, Any] = {"autoattack_steps": 2, "queries": 5} if context.miniature else {}
    options = EvaluateOptions(groups, strong_samples=strong, transfer=transfer, budgets=(BUDGET,), **strength)
    samples = strong if "autoattack" in groups else samples
    return evaluate_model(run, data_dir=context.data_dir, samples=samples, options=options)


def _summary(result: EvaluateResult) -> dict[str, Any]:
    """The report with the mean over exits, which NEO-KD publishes."""
    report = dict(result.report)
    rows = report["exits"]
    shown = [name for name in rows[0] if name not in ("exit", "worst")]
    report["mean over exits"] = {
        name: sum(row[name]["value"] for row in rows) / len(rows) for name in shown if all(name in row for row in rows)
    }
    return report
