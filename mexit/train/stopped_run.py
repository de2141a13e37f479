"""The weights of a run that is not finished, from its checkpoint."""

from __future__ import annotations

from pathlib import Path

from mexit.core.printable import shell_path
from mexit.data.dataset import DataSet
from mexit.data.splits import Splits
from mexit.errors import NotFound
from mexit.train import checkpoint
from mexit.train.batches import TrainBatches, recompute_norms
from mexit.train.checkpoint import Position
from mexit.train.config import TrainSettings
from mexit.train.optimiser import build_optimiser
from mexit.train.precision import select_precision


def write_weights(
    run: Path, settings: TrainSettings, data: DataSet, splits: Splits, device: str = "auto"
) -> tuple[str, Position]:
    """Write the weights that the run would keep if it ended at its checkpoint.

    These are the best ones so far with `keep` "best", else the averaged weights where there is an average, with
    BatchNorm's statistics measured again where `recompute_norms` is set, else the weights of the network.

    Args:
        run: its directory.
        settings: its settings.
        data, splits: its data.
        device: device that measures the statistics: "auto", "cpu" or "cuda".

    Returns:
        Name of the written file in the run, and the position of the checkpoint.

    Raises:
        NotFound: the run has no checkpoint yet.
        Damaged: the checkpoint is not readable, or belongs to another network.
    """
    if not (run / checkpoint.CHECKPOINT).exists():
        raise NotFound(f"run {run} has no checkpoint yet: mexit train --resume --out {shell_path(run)} continues it")
    classes = len(data.classes)
    model = settings.model_spec().build(classes)
    state = checkpoint.restore(run, model, build_optimiser(model, settings))
    position, weights = state.position, state.average or model.state_dict()
    if state.kept and (settings.keep == "best" or checkpoint.is_finished(position, settings)):
        weights = state.kept
    elif settings.recompute_norms:
        precision = select_precision(settings.precision, device)
        model.load_state_dict(dict(weights))
        model = model.to(precision.device)
        batches = TrainBatches(data, splits, settings.model_spec().input, settings, model, precision)
        weights = recompute_norms(model, batches, position.epoch)
    file = checkpoint.weights_at(position)
    checkpoint.save_weights(run, weights, settings, classes, file)
    return file, position
