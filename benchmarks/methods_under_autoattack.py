"""AutoAttack on single exits of a run and on its policy for the budget medium, continued where it was stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from stored_answers import Answers

from mexit.attacks.autoattack import AutoAttackConfig, ExitClassifier, auto_attack
from mexit.attacks.soft_policy import DeployedPolicy, SoftPolicy
from mexit.core.progress import Silent
from mexit.evaluate.target import EvaluationTarget, open_target
from mexit.flows.run_policies import run_policies
from mexit.models.device import device_of, exact_float32

SAMPLES = 1000
CHUNK = 125  # images whose results are stored at a time on a CPU, small enough for its caches; a GPU takes all at once
BUDGET = "medium"
LAST, POLICY = "last exit", f"policy {BUDGET}"


def targets(exits: int) -> list[str]:
    """What is attacked of a network with E exits: each exit, and the deployed policy."""
    return [*(f"exit {k}" for k in range(1, exits)), LAST, POLICY]


def autoattack(
    run: Path,
    answers: Answers,
    data_dir: str | Path | None = None,
    device: str = "cpu",
    should_stop: Callable[[], bool] = lambda: False,
    config: AutoAttackConfig | None = None,
    samples: int = SAMPLES,
) -> bool:
    """Run AutoAttack on evenly spaced test images, for every target without a stored result.

    Args:
        run: finished run.
        answers: the run's answers; every `CHUNK` images, on a GPU all, are stored as "autoattack TARGET".
        data_dir: folder of the data sets; None = `MEXIT_DATA`.
        device: "auto", "cpu" or "cuda".
        should_stop: called before every chunk; True ends the function.
        config: strength; None = the standard version, with all images of a chunk in one batch.
        samples: number of images.

    Returns:
        Whether every target is attacked on all images.
    """
    opened = open_target(run, data_dir, "ort", device, None)
    model = opened.source.model
    if device_of(model).type == "cpu":  # convolutions of 16 to 64 channels take 0.7 of the time in this layout
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    test = opened.splits.part("test")
    index = test[:: max(1, len(test) // samples)][:samples]
    pixels, classes = opened.load(index)
    images, labels = torch.from_numpy(pixels).to(device_of(model)), torch.from_numpy(classes).to(device_of(model))
    chunk = CHUNK if images.device.type == "cpu" else len(images)
    config = config or AutoAttackConfig(batch=chunk)
    for target in targets(model.exits):
        condition, network = f"autoattack {target}", None
        while (done := answers.count(condition)) < len(index):
            if should_stop():
                return False
            network = network or _network(target, opened, images)
            part = slice(done, done + chunk)
            with exact_float32():
                result = auto_attack(
                    network, images[part], labels[part], opened.source.settings.eps, config=config, on_message=print
                )
            answers.extend({condition: result.robust.cpu().numpy()[None]})
    return True


def _network(target: str, opened: EvaluationTarget, images: torch.Tensor) -> ExitClassifier | DeployedPolicy:
    model = opened.source.model
    if target != POLICY:
        return ExitClassifier(model, model.exits if target == LAST else int(target.removeprefix("exit ")))
    policy = run_policies(opened, [BUDGET], Silent())[BUDGET].policy
    with torch.no_grad():
        logits = torch.cat([model(part) for part in images.split(CHUNK)], dim=1)
    return DeployedPolicy(model, SoftPolicy.fit(policy, logits))
