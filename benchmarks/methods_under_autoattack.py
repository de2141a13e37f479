"""AutoAttack on single exits of a run and on its deployed policy, for `compare_methods.py`."""

from __future__ import annotations

from pathlib import Path

import torch
from stored_answers import Answers

from mexit.attacks.autoattack import ExitClassifier, auto_attack
from mexit.attacks.soft_policy import DeployedPolicy, SoftPolicy
from mexit.core.artifact_paths import BUNDLES
from mexit.core.bundle import POLICIES, Bundle
from mexit.data.dataset import DataSet
from mexit.flows.calibrate import calibrate_bundle
from mexit.flows.export import export_bundle
from mexit.models import MultiExit, model_spec
from mexit.train import checkpoint

SAMPLES = 1000
TARGETS = ("exit 1", "last exit", "policy medium")


def autoattack(run: Path, answers: Answers, data: DataSet) -> None:
    """Run standard AutoAttack on `SAMPLES` evenly spaced test images, for every target without a stored result."""
    model, settings, splits = checkpoint.load_model(run)
    model.to(memory_format=torch.channels_last)  # equal up to rounding, in two thirds of the time
    test = splits.part("test")
    index = test[:: max(1, len(test) // SAMPLES)][:SAMPLES]
    images = torch.from_numpy(data.batch(index, model_spec(settings.model).input))
    labels = torch.from_numpy(data.labels[index])
    for target in TARGETS:
        if not answers.has(f"autoattack {target}"):
            result = auto_attack(_network(target, model, run, images), images, labels, settings.eps, on_message=print)
            answers.add({f"autoattack {target}": result.robust.numpy()[None]})


def _network(target: str, model: MultiExit, run: Path, images: torch.Tensor) -> ExitClassifier | DeployedPolicy:
    if target != "policy medium":
        return ExitClassifier(model, 1 if target == "exit 1" else model.exits)
    out = BUNDLES / f"{run.parent.name}-{run.name}"
    if not out.exists():
        export_bundle(run, out=out)
    bundle = Bundle.open(out)
    if not (out / POLICIES).exists():
        calibrate_bundle(out)
    entry = bundle.policies().entry("ort", "fp32", "fp32")
    policy = entry.policy(entry.frontier[entry.named["medium"]])
    with torch.no_grad():
        logits = torch.cat([model(part) for part in images.split(250)], dim=1)
    return DeployedPolicy(model, SoftPolicy.fit(policy, logits))
