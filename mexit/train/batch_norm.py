"""BatchNorm's statistics, measured again for weights that are an average over a run.

The average of the statistics of many networks is not the statistics of the averaged network (P. Izmailov et al.:
Averaging weights leads to wider optima, UAI 2018).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mexit.models.multi_exit import MultiExit


def recompute_statistics(model: MultiExit, batches: Iterable[Tensor]) -> None:
    """Replace the running statistics of every BatchNorm by the mean over batches.

    Args:
        model: network to change; it is in eval mode afterwards.
        batches: images (B, C, H, W); read while the old statistics are still in use. Without BatchNorm in the network
            nothing is read.
    """
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    model.eval()
    if not norms:
        return
    images = list(batches)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    with torch.no_grad():
        for batch in images:
            model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()
