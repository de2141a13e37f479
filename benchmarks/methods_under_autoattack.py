"""AutoAttack on single exits of a run and on its deployed policy, for `compare_methods.py`."""

from __future__ import annotations

from collections.abc import Callable
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
from mexit.models.device import device_of, exact_float32, resolve_device
from mexit.train import checkpoint

SAMPLES = 1000
CHUNK = 250  # images whose results are stored at a time
LAST, POLICY = "last exit", "policy medium"


def targets(exits: int) -> list[str]:
    """What is attacked of a network with E exits: each exit, and the deployed policy."""
    return [*(f"exit {k}" for k in range(1, exits)), LAST, POLICY]


def autoattack(
    run: Path, answers: Answers, data: DataSet, device: str = "cpu", should_stop: Callable[[], bool] = lambda: False
) -> bool:
    """Run standard AutoAttack on `SAMPLES` evenly spaced test images, for every target without a stored result.

    Args:
        run: finished run.
        answers: the run's answers; every `CHUNK` images are stored as "autoattack TARGET".
        data: data set of the run.
        device: "auto", "cpu" or "cuda".
        should_stop: called before every chunk; True ends the function.

    Returns:
        Whether every target is attacked on all images.
    """
    model, settings, splits = checkpoint.load_model(run)
    model.to(resolve_device(device), memory_format=torch.channels_last)  # type: ignore[call-overload]
    test = splits.part("test")
    index = test[:: max(1, len(test) // SAMPLES)][:SAMPLES]
    images = torch.from_numpy(data.batch(index, model_spec(settings.model).input)).to(device_of(model))
    labels = torch.from_numpy(data.labels[index]).to(device_of(model))
    for target in targets(model.exits):
        condition, network = f"autoattack {target}", None
        while (done := answers.count(condition)) < len(index):
            if should_stop():
                return False
            network = network or _network(target, model, run, images)
            part = slice(done, done + CHUNK)
            with exact_float32():
                result = auto_attack(network, images[part], labels[part], settings.eps, on_message=print)
            answers.extend({condition: result.robust.cpu().numpy()[None]})
    return True


def _network(target: str, model: MultiExit, run: Path, images: torch.Tensor) -> ExitClassifier | DeployedPolicy:
    if target != POLICY:
        return ExitClassifier(model, model.exits if target == LAST else int(target.removeprefix("exit ")))
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
