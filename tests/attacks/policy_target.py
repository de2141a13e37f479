"""A trained network with a policy that some images pass early, shared by the tests of attacks on policies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mexit.attacks.pgd import PGDConfig, random_noise
from mexit.attacks.policy_attacks import AttackTarget
from mexit.attacks.rng import CounterRNG
from mexit.attacks.soft_policy import SoftPolicy
from mexit.core.exit_policy import Policy
from mexit.data import digits, splits
from mexit.models import model_spec
from mexit.models.scores_torch import score_exits
from mexit.train import checkpoint

IMAGES, EPS = 64, 0.1


def attack_target(workspace: Path, measure: str = "max-probability") -> AttackTarget:
    """The finished run with a policy under which 70 % of the images leave at exit 1 and half of them at exit 2."""
    model = checkpoint.load_model(workspace / "runs/digits")[0].eval()
    data = digits.load()
    index = splits.split(data).part("test")[:IMAGES]
    images, labels = data.batch(index, model_spec("digits-cnn").input), data.labels[index]
    with torch.no_grad():
        logits = model(torch.from_numpy(images))
    scores = score_exits(Policy(measure, False, (1.0, 1.0, 1.0), (None, None)), logits).scores
    thresholds = tuple(float(row.quantile(share)) for row, share in zip(scores, (0.3, 0.5), strict=False))
    policy = Policy(measure, False, (1.0, 1.0, 1.0), thresholds)
    tensors = [torch.from_numpy(array) for array in (images, labels, index)]
    return AttackTarget(model, SoftPolicy.fit(policy, logits), *tensors, PGDConfig(EPS, EPS / 4, 8))


def run_exits(target: AttackTarget, images: Tensor) -> NDArray[np.float32]:
    """Logits of every exit, (E, B, C)."""
    with torch.no_grad():
        return target.model(images).numpy()


def noisy_images(target: AttackTarget) -> Tensor:
    """The images with random noise of the attack's radius."""
    return random_noise(target.images, target.index, target.pgd, rng=CounterRNG(0, 0))
