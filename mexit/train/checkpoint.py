"""A training run on disk. safetensors only, never pickle; every file is replaced atomically.

settings.json            `TrainSettings`
splits.npz               the five index lists
checkpoint.safetensors   weights, optimiser, place in the run, kept weights: all in one file
weights.safetensors      the result, once training is over
log.jsonl  curves.png    for people
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from mexit.core.atomic_io import read_bytes, read_json, to_json, write_bytes
from mexit.core.manifest import read_value
from mexit.data.splits import Splits
from mexit.errors import Damaged, NotFound, UsageError
from mexit.models import MultiExit, build_model
from mexit.train.config import TrainSettings

SETTINGS, SPLITS, CHECKPOINT, WEIGHTS, LOG, CURVES = (
    "settings.json",
    "splits.npz",
    "checkpoint.safetensors",
    "weights.safetensors",
    "log.jsonl",
    "curves.png",
)
MAX_BYTES = 8 << 30
_MAX_HEADER = 100 << 20


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        epoch, step: next to do, from 0.
        sums: running sums of the epoch's log values, and how many samples they cover under "n".
        best: best mean attacked accuracy on the selection split so far; None before the first epoch ended.
        log: how many bytes of the log belong to what is done.
    """

    epoch: int
    step: int
    sums: dict[str, float]
    best: float | None
    log: int


@dataclass(frozen=True)
class Place:
    """What a checkpoint holds besides the network and its optimiser.

    Attributes:
        progress: where the run stands.
        kept: the weights that would be the result now.
        objective: the method's own state.
        average: moving average of the weights; empty without one.
    """

    progress: Progress
    kept: Mapping[str, Tensor]
    objective: Mapping[str, Tensor]
    average: Mapping[str, Tensor]


def save(run: Path, model: MultiExit, optimiser: torch.optim.Optimizer, place: Place) -> None:
    """Write the checkpoint. Raises `MexitError` if that fails; the previous one is then untouched."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        buffer = optimiser.state.get(parameter, {}).get("momentum_buffer")
        if buffer is not None:
            tensors[f"momentum.{name}"] = buffer
    for prefix in ("kept", "objective", "average"):
        tensors |= {f"{prefix}.{name}": value for name, value in getattr(place, prefix).items()}
    metadata = {"progress": json.dumps(asdict(place.progress))}
    write_bytes(run / CHECKPOINT, _serialise(tensors, metadata))


def restore(run: Path, model: MultiExit, optimiser: torch.optim.Optimizer) -> Place:
    """Load the checkpoint into `model` and `optimiser`; returns the rest.

    Raises:
        NotFound: there is none.
        Damaged: not readable, or of another network.
    """
    path = run / CHECKPOINT
    tensors, metadata = _read(path, "checkpoint")
    try:
        progress = read_value(json.loads(metadata["progress"]), Progress, "progress")
    except (KeyError, ValueError, Damaged) as error:
        raise Damaged(f"checkpoint {path} does not say where the run stood ({error})") from None
    _load_weights(model, _with_prefix(tensors, "model."), path)
    momenta = _with_prefix(tensors, "momentum.")
    for name, parameter in model.named_parameters():
        if name in momenta:
            optimiser.state[parameter]["momentum_buffer"] = momenta[name].to(parameter.device)
    return Place(progress, *(_with_prefix(tensors, f"{prefix}.") for prefix in ("kept", "objective", "average")))


def save_weights(run: Path, weights: Mapping[str, Tensor], settings: TrainSettings, classes: int) -> None:
    """Write the result of a finished run."""
    metadata = {"settings": json.dumps(settings.to_json()), "classes": str(classes)}
    write_bytes(run / WEIGHTS, _serialise(dict(weights), metadata))


def load_model(run: Path) -> tuple[MultiExit, TrainSettings, Splits]:
    """A finished run: its network in eval mode, settings and splits.

    Raises:
        NotFound: no such run, or it was never finished.
        Damaged: a file is not what was written.
    """
    settings = load_settings(run)
    if not (run / WEIGHTS).exists() and (run / CHECKPOINT).exists():
        raise NotFound(f"run {run} is not finished: mexit train --resume --out {run}")
    tensors, metadata = _read(run / WEIGHTS, "weights")
    if not metadata.get("classes", "").isdigit():
        raise Damaged(f"weights {run / WEIGHTS} do not name their number of classes")
    model = build_model(settings.model, int(metadata["classes"]))
    _load_weights(model, tensors, run / WEIGHTS)
    return model.eval(), settings, Splits.load(run / SPLITS)


def load_settings(run: Path) -> TrainSettings:
    """The settings of a run, finished or not."""
    if not run.is_dir():
        raise NotFound(f"run {run} does not exist: make one with mexit train")
    value = read_json(run / SETTINGS, "settings")
    try:
        return TrainSettings.from_json(value, str(run / SETTINGS))
    except UsageError as error:
        raise Damaged(f"settings {run / SETTINGS}: {error}") from None


def begin(run: Path, settings: TrainSettings, splits: Splits) -> None:
    """Make the directory of a new run. The settings come last: with them it counts as begun."""
    write_bytes(run / SPLITS, splits.to_bytes())
    write_bytes(run / SETTINGS, to_json(settings.to_json()))


def _serialise(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    return save_tensors(plain, metadata)


def _read(path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    content = read_bytes(path, what, MAX_BYTES)
    try:
        size = int.from_bytes(content[:8], "little")
        if not 0 < size <= min(_MAX_HEADER, len(content) - 8):
            raise ValueError(f"its header claims {size} bytes")
        metadata: dict[str, Any] = json.loads(content[8 : 8 + size]).get("__metadata__", {})
        return load_tensors(content), {str(key): str(value) for key, value in metadata.items()}
    except (SafetensorError, ValueError, AttributeError) as error:
        raise Damaged(f"{what} {path} is not readable: {error}") from None


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def _load_weights(model: MultiExit, weights: Mapping[str, Tensor], path: Path) -> None:
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if expected != found:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise Damaged(
            f"{path} holds another network: {', '.join(wrong[:6])} missing, unexpected or of another shape"
        )
    model.load_state_dict(dict(weights))
