"""A trained network behind gates that some images pass and some do not: what policies are attacked on in tests."""

from __future__ import annotations

from pathlib import Path

import torch

from mexit.attacks.pgd import PGDConfig
from mexit.attacks.policy_attacks import AttackTarget
from mexit.attacks.soft_policy import SoftPolicy, score_exits
from mexit.core.policy import Policy
from mexit.data import digits, splits
from mexit.models import model_spec
from mexit.train import checkpoint
from mexit.train.validation import run_exits

IMAGES, EPS = 64, 0.1


def victim(workspace: Path, measure: str = "max-probability") -> AttackTarget:
    """The finished run; of ten images seven pass the first gate and five the second."""
    model = checkpoint.load_model(workspace / "runs/digits")[0]
    data = digits.load()
    index = splits.split(data).part("test")[:IMAGES]
    images, labels = data.batch(index, model_spec("digits-cnn").input), data.labels[index]
    logits = torch.from_numpy(run_exits(model, images))
    open_gates = Policy(measure, False, (1.0, 1.0, 1.0), (None, None))
    scores = score_exits(open_gates, logits).scores
    thresholds = tuple(float(row.quantile(share)) for row, share in zip(scores, (0.3, 0.5), strict=False))
    policy = Policy(measure, False, (1.0, 1.0, 1.0), thresholds)
    tensors = [torch.from_numpy(array) for array in (images, labels, index)]
    return AttackTarget(model, SoftPolicy.fit(policy, logits), *tensors, PGDConfig(EPS, EPS / 4, 8))
