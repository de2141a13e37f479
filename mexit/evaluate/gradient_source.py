"""The torch network that gives the gradients for attacks on a run or on the bundle exported from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mexit.attacks.pgd import Attack, craft
from mexit.attacks.rng import CounterRNG
from mexit.core.atomic_io import sha256_file
from mexit.core.bundle import Bundle
from mexit.errors import NotFound, StalePolicy
from mexit.models.multi_exit import MultiExit
from mexit.train import checkpoint
from mexit.train.config import TrainSettings

Images = NDArray[np.float32]
Labels = NDArray[np.int64]
Index = NDArray[np.int64]


@dataclass(frozen=True)
class GradientSource:
    """A trained network and the settings of its run.

    Attributes:
        model: the network, in eval mode.
        settings: they hold the radius and steps of the test attack.
    """

    model: MultiExit
    settings: TrainSettings

    @staticmethod
    def of_bundle(bundle: Bundle) -> GradientSource:
        """The run that a bundle was exported from.

        Raises:
            NotFound: the run does not exist here.
            StalePolicy: the run has other weights than the bundle.
        """
        provenance = bundle.manifest.provenance
        run, expected = provenance.get("run"), provenance.get("weights_sha256")
        if not isinstance(run, str) or not (Path(run) / checkpoint.WEIGHTS).exists():
            raise NotFound(f"the run {run} that {bundle.path} was exported from does not exist here")
        if sha256_file(Path(run) / checkpoint.WEIGHTS) != expected:
            raise StalePolicy(f"run {run} was trained again since {bundle.path} was exported: export it again")
        model, settings, _ = checkpoint.load_model(Path(run))
        return GradientSource(model, settings)

    def attack(self, target_exits: str, eps: float | None = None, steps: int | None = None) -> Attack:
        """The test attack of the run on the given exits; `eps` and `steps` replace its radius and steps."""
        return self.settings.test_attack(target_exits, eps, steps)

    def craft(self, images: Images, labels: Labels, index: Index, attack: Attack) -> Images:
        """Attack a batch: images (B, C, H, W), labels (B,) and positions in the data set (B,) to (B, C, H, W)."""
        attacked = craft(
            self.model,
            torch.from_numpy(images),
            torch.from_numpy(labels),
            attack,
            rng=CounterRNG(0, 0),
            index=torch.from_numpy(index),
        )
        return np.asarray(attacked.numpy())
