"""`clean`: cross-entropy of every exit on the images as they are, summed over exits (MSDNet, ICLR 2018)."""

from __future__ import annotations

from torch import Tensor

from mexit.train.attacks.objective import exit_losses
from mexit.train.objectives.base import Outputs


class Clean:
    """Minimises sum_k CE(f_k(x), y)."""

    needs_attack = False

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """See `base.Objective`."""
        return {"clean": exit_losses(outputs.clean, outputs.labels).mean(dim=1).sum()}
