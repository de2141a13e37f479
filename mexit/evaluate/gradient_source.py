"""Attacked images for a bundle: gradients come from the run whose weights its provenance names.

The flows alone bring the two together; neither the runtime nor calibration knows torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mexit.core.atomic_io import sha256_file
from mexit.core.bundle import Bundle
from mexit.errors import MexitError, MissingExtra, NotFound, StalePolicy, missing_extra

Images = NDArray[np.float32]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Source:
    """A network that gives gradients.

    Attributes:
        model: a `models.MultiExit`.
        settings: a `train.config.TrainSettings`.
    """

    model: Any
    settings: Any

    def attack(self, objective: str, eps: float | None, steps: int | None) -> Any:
        """A `attacks.multi_exit_attack.Attack`; None takes the run's own test setting."""
        return self.settings.test_attack(objective, eps, steps)

    def crafter(self, attack: Any) -> Callable[[Images, Labels, Labels], Images]:
        """A function from images (B, C, H, W), labels (B,) and places (B,) to attacked images."""
        import torch

        from mexit.attacks.multi_exit_attack import craft
        from mexit.attacks.rng import CounterRNG

        def crafted(images: Images, labels: Labels, index: Labels) -> Images:
            tensors = [torch.from_numpy(array) for array in (images, labels, index)]
            attacked = craft(self.model, tensors[0], tensors[1], attack, rng=CounterRNG(0, 0), index=tensors[2])
            return np.asarray(attacked.numpy())

        return crafted


def of_bundle(bundle: Bundle) -> Source:
    """The run behind a bundle.

    Raises:
        MissingExtra: torch is not installed.
        NotFound: the run is gone.
        StalePolicy: the run was trained again since.
    """
    checkpoint = _checkpoint()
    run, expected = bundle.manifest.provenance.get("run"), bundle.manifest.provenance.get("weights_sha256")
    if not isinstance(run, str) or not (Path(run) / checkpoint.WEIGHTS).exists():
        raise NotFound(f"the run {run} that {bundle.path} was exported from is not here")
    if sha256_file(Path(run) / checkpoint.WEIGHTS) != expected:
        raise StalePolicy(f"run {run} was trained again since {bundle.path} was exported: export it again")
    model, settings, _ = checkpoint.load_model(Path(run))
    return Source(model, settings)


def of_bundle_or_why_not(bundle: Bundle) -> tuple[Source | None, str]:
    """The run behind a bundle, or None and the reason; for flows that go on without attacks."""
    try:
        return of_bundle(bundle), ""
    except (MissingExtra, NotFound, StalePolicy) as error:
        return None, str(error)
    except MexitError as error:
        return None, f"the run behind {bundle.path} cannot be used: {error}"


def _checkpoint() -> Any:
    try:
        from mexit.train import checkpoint
    except ImportError as error:
        raise missing_extra(error.name or "torch", "train", "Attacking a network") from None
    return checkpoint
