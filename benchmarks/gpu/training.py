"""Train a network of the queue and evaluate it: PGD per exit and for the policy medium, transfer, AutoAttack."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import data_parts
import torch
from context import Context
from items import AUTOATTACK, Item

from mexit.attacks.autoattack import import_pyautoattack
from mexit.core.atomic_io import read_json, write_bytes
from mexit.core.progress import Silent
from mexit.data.splits import Splits, split
from mexit.errors import NotFound
from mexit.evaluate.config import EvaluateOptions
from mexit.flows.evaluate import evaluate_model
from mexit.flows.train import TrainOptions, train_model
from mexit.models import model_spec
from mexit.train import checkpoint
from mexit.train.config import resolve

TEST_IMAGES, STRONG_IMAGES = 2000, 1000
BUDGET = "medium"
REPORT = "autoattack.json"


def train(item: Item, context: Context) -> bool:
    """Train the run of the item, from its checkpoint if it has one, then evaluate it. Returns whether it is done."""
    run = Path("runs") / item.name
    if not (run / checkpoint.SETTINGS).exists():
        _create(run, item, context)
    if not (run / checkpoint.WEIGHTS).exists():
        options = TrainOptions(should_stop=context.should_stop)
        result = train_model(
            item.data, out=run, resume=True, data_dir=context.data_dir, options=options, progress=LogProgress()
        )
        if not result.finished:
            return False
    if context.should_stop():
        return False
    transfer = None
    if item.transfer and (context.run(item.transfer) / checkpoint.WEIGHTS).exists():
        transfer = context.run(item.transfer)
    options = EvaluateOptions(
        ("pgd",), strong_samples=_count(context, STRONG_IMAGES), transfer=transfer, budgets=(BUDGET,)
    )
    report = _evaluate(run, context, options, _count(context, TEST_IMAGES))
    context.write(item.name, "evaluation.json", _with_mean(report))
    return True


def autoattack(item: Item, context: Context) -> bool:
    """AutoAttack on the policy medium and on every exit of the run of another item, one piece for each exit."""
    if (context.folder(item.name) / REPORT).exists():
        return True
    import_pyautoattack()
    run = Path("runs") / item.name.removeprefix(AUTOATTACK)
    _use_present_pictures(run, item, context)
    exits = model_spec(checkpoint.load_settings(run).model).exits
    pieces, longest_s = [], 0.0
    for k in range(1, exits + 1):
        path, began_s = context.folder(item.name) / f"exit-{k}.json", time.monotonic()
        if not path.exists():
            if began_s + longest_s > context.deadline_s or context.should_stop():
                return False
            # The first piece attacks the policy too.
            options = EvaluateOptions(
                ("pgd", "autoattack"), exits=(k,), budgets=(BUDGET,) if k == 1 else (), **_strength(context)
            )
            report = _evaluate(run, context, options, _count(context, STRONG_IMAGES))
            context.write(item.name, path.name, report)
            longest_s = max(longest_s, time.monotonic() - began_s)
        pieces.append(read_json(path, "piece of a report"))
    report = pieces[0]
    for k, piece in enumerate(pieces):
        # The worst case over all attacks would need those of all pieces on the same image.
        report["exits"][k] = {name: value for name, value in piece["exits"][k].items() if name != "worst"}
    report["checks"] = [check for piece in pieces for check in piece["checks"]]
    report["flags"] = sorted({flag for piece in pieces for flag in piece["flags"]})
    report["settings"] |= {"exits": "all", "seconds": round(sum(piece["settings"]["seconds"] for piece in pieces), 1)}
    del report["budgets"][BUDGET]["worst"]
    context.write(item.name, REPORT, _with_mean(report))
    for k in range(1, exits + 1):
        (context.folder(item.name) / f"exit-{k}.json").unlink()
    return True


def _create(run: Path, item: Item, context: Context) -> None:
    """Store settings and splits, as `train_model` does, but with splits of the pictures that exist."""
    data, present = data_parts.load(item.data, context.data_dir)
    if present is not None and not present.complete:
        raise NotFound(f"{item.data} is here in part only ({present.parts} of {present.of}): bring the other parts")
    settings = resolve(item.data, item.preset, item.settings)
    splits = split(data).thinned(data, settings.fraction, settings.omit_class)
    checkpoint.create_run(run, settings, data_parts.present_splits(splits, present))


def _use_present_pictures(run: Path, item: Item, context: Context) -> None:
    """Replace the splits of a run that came from the zoo, which are those of the complete data set."""
    data, present = data_parts.load(item.data, context.data_dir)
    stored = Splits.load(run / checkpoint.SPLITS)
    if present is not None and stored.data_sha256 == present.full_sha256:
        here = Splits(stored.data_set, data.sha256, stored.parts)
        write_bytes(run / checkpoint.SPLITS, data_parts.present_splits(here, present).to_bytes())


class LogProgress(Silent):
    """Prints notes, which go to the log of the item."""

    def note(self, text: str) -> None:
        """Print one line."""
        print(text, flush=True)


def _count(context: Context, count: int) -> int:
    return 4 if context.miniature else count


def _strength(context: Context) -> dict[str, Any]:
    """Strength of AutoAttack. All images make one batch on a GPU: its many small steps are bound by their number."""
    if context.miniature:
        return {"strong_samples": _count(context, STRONG_IMAGES), "autoattack_steps": 2, "queries": 5}
    return {"strong_samples": STRONG_IMAGES, "batch": STRONG_IMAGES if torch.cuda.is_available() else None}


def _evaluate(run: Path, context: Context, options: EvaluateOptions, samples: int) -> dict[str, Any]:
    """The report of `mexit evaluate` on a run."""
    result = evaluate_model(run, data_dir=context.data_dir, samples=samples, options=options, progress=LogProgress())
    return dict(result.report)


def _with_mean(report: dict[str, Any]) -> dict[str, Any]:
    """The report with the mean over exits, which NEO-KD publishes."""
    rows = report["exits"]
    names = [name for name in rows[0] if name not in ("exit", "worst") and all(name in row for row in rows)]
    return report | {"mean over exits": {name: sum(row[name]["value"] for row in rows) / len(rows) for name in names}}
