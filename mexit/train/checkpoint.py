"""A training run on disk. Tensors are stored as safetensors, never as pickle; every file is replaced atomically.

settings.json            `TrainSettings`
splits.npz               the indices of the five splits
checkpoint.safetensors   weights, optimiser, position in the run, weights to keep: everything to resume from
weights.safetensors      the resulting weights, written when training ends
weights-epochE-stepS.safetensors   those that were exported before, or that had been the result before more epochs
log.jsonl  curves.png    metrics per epoch, and their plot
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from mexit.core.atomic_io import parse_json, read_bytes, read_json, sha256_file, to_json, write_bytes
from mexit.core.printable import shell_path
from mexit.core.schema import decode
from mexit.core.wrong_path import RUN, found_instead, similar_beside
from mexit.data.splits import Splits
from mexit.errors import Damaged, MexitError, NotFound, UsageError
from mexit.models import MultiExit
from mexit.train.config import TrainSettings

SETTINGS = "settings.json"
SPLITS = "splits.npz"
CHECKPOINT = "checkpoint.safetensors"
WEIGHTS = "weights.safetensors"
LOG = "log.jsonl"
CURVES = "curves.png"
MAX_BYTES = 8 << 30
MAX_LOG_BYTES = 1 << 30
_MAX_HEADER_BYTES = 100 << 20


@dataclass(frozen=True)
class Position:
    """The position of a run in its schedule.

    Attributes:
        epoch: next epoch, from 0.
        step: next step of that epoch, from 0.
        sums: sums over the samples of the epoch of each logged value; "n" is the number of samples.
        best: best mean attacked accuracy on the selection split; None before the end of the first epoch.
        log: size in bytes of the log up to this position.
        elapsed_s: seconds that the run has taken up to this position, in all calls together.
        steps_done: optimisation steps of a run by the clock that is at its end; 0 otherwise.
    """

    epoch: int
    step: int
    sums: dict[str, float]
    best: float | None
    log: int
    elapsed_s: float = 0.0
    steps_done: int = 0


START = Position(0, 0, {}, None, 0)


@dataclass(frozen=True)
class TrainState:
    """The content of a checkpoint besides the network and its optimiser.

    Attributes:
        position: position in the schedule.
        kept: the weights that would be the result if training ended here.
        method: state of the training method.
        average: moving average of the weights; empty without one.
    """

    position: Position
    kept: Mapping[str, Tensor]
    method: Mapping[str, Tensor]
    average: Mapping[str, Tensor]


# Names of the parts of `TrainState` in the file.
_PREFIXES = {"kept": "kept.", "method": "objective.", "average": "average."}


def save(run: Path, model: MultiExit, optimiser: torch.optim.Optimizer, state: TrainState) -> None:
    """Write the checkpoint. Raises `MexitError` if that fails; the previous checkpoint is then intact."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        buffer = optimiser.state.get(parameter, {}).get("momentum_buffer")
        if buffer is not None:
            tensors[f"momentum.{name}"] = buffer
    for part, prefix in _PREFIXES.items():
        tensors |= {prefix + name: value for name, value in getattr(state, part).items()}
    metadata = {"progress": json.dumps(asdict(state.position))}
    write_bytes(run / CHECKPOINT, _serialise(tensors, metadata))


def restore(run: Path, model: MultiExit, optimiser: torch.optim.Optimizer) -> TrainState:
    """Load the checkpoint into `model` and `optimiser`, and return the rest.

    Raises:
        NotFound: the run has no checkpoint.
        Damaged: the checkpoint is not readable, or belongs to another network.
    """
    path = run / CHECKPOINT
    tensors, metadata = _read(path, "checkpoint")
    position = _position(metadata, path)
    _load_weights(model, _with_prefix(tensors, "model."), path)
    momenta = _with_prefix(tensors, "momentum.")
    for name, parameter in model.named_parameters():
        if name in momenta:
            optimiser.state[parameter]["momentum_buffer"] = momenta[name].to(parameter.device)
    return TrainState(position, **{part: _with_prefix(tensors, prefix) for part, prefix in _PREFIXES.items()})


def load_position(run: Path) -> Position | None:
    """The position of the run's checkpoint; None if there is none. Raises `Damaged`."""
    path = run / CHECKPOINT
    return _position(_read(path, "checkpoint")[1], path) if path.exists() else None


def is_finished(position: Position, settings: TrainSettings) -> bool:
    """Whether a run with these settings is at its end at this position."""
    if settings.minutes:
        return position.steps_done > 0 and position.elapsed_s >= 60 * settings.minutes
    return position.epoch >= settings.epochs


def _position(metadata: Mapping[str, str], path: Path) -> Position:
    try:
        stored = {"elapsed_s": 0.0, "steps_done": 0} | json.loads(metadata["progress"])  # mexit 0.1 has neither
        position = decode(stored, Position, "progress")
    except (KeyError, ValueError, Damaged) as error:
        raise Damaged(f"checkpoint {path} has no valid position in the run ({error})") from None
    assert isinstance(position, Position)
    return position


def save_weights(
    run: Path, weights: Mapping[str, Tensor], settings: TrainSettings, classes: int, file: str = WEIGHTS
) -> None:
    """Write the resulting weights of a run, by default as those of a finished one."""
    metadata = {"settings": json.dumps(settings.to_json()), "classes": str(classes)}
    write_bytes(run / file, _serialise(dict(weights), metadata))


def weights_at(position: Position) -> str:
    """Name of the file with the weights of a run that is not at its end."""
    return f"weights-epoch{position.epoch}-step{position.step}.safetensors"


def set_weights_aside(run: Path, position: Position) -> None:
    """Rename the result of a finished run that trains on, so that bundles exported from it still find it.

    Raises `MexitError` if that fails.
    """
    if (run / WEIGHTS).exists():
        try:
            os.replace(run / WEIGHTS, run / weights_at(position))
        except OSError as error:
            raise MexitError(f"could not rename {run / WEIGHTS}: {error.strerror}") from None


def find_weights(run: Path, sha256: object) -> str | None:
    """Name of the file in a run that holds the weights with this hash; None without one.

    They are those of a finished run, or those that the run had when its checkpoint was exported or its end moved.
    """
    files = sorted(run.glob("weights*.safetensors"), reverse=True)
    return next((file.name for file in files if sha256_file(file) == sha256), None)


def is_superseded(run: Path, file: str) -> bool:
    """Whether a run was trained further after its weights in this file were written."""
    if file == WEIGHTS or (run / WEIGHTS).exists():
        return file != WEIGHTS
    with suppress(Damaged):  # the weights do not need the checkpoint
        position = load_position(run)
        return position is not None and weights_at(position) != file
    return False


def load_model(run: Path, file: str = WEIGHTS) -> tuple[MultiExit, TrainSettings, Splits]:
    """Load a run: its network in eval mode, its settings and its splits.

    Args:
        run: its directory.
        file: name of the file with the weights; default those of the finished run.

    Raises:
        NotFound: the run does not exist or is not finished.
        Damaged: a file of the run is damaged.
    """
    settings = load_settings(run)
    if not (run / file).exists():
        also = ", and mexit export takes its checkpoint" if (run / CHECKPOINT).exists() else ""
        raise NotFound(f"run {run} is not finished: mexit train --resume --out {shell_path(run)} continues it{also}")
    tensors, metadata = _read(run / file, "weights")
    if not metadata.get("classes", "").isdigit():
        raise Damaged(f"weights {run / file} do not name their number of classes")
    model = settings.model_spec().build(int(metadata["classes"]))
    _load_weights(model, tensors, run / file)
    return model.eval(), settings, Splits.load(run / SPLITS)


def load_settings(run: Path) -> TrainSettings:
    """Load the settings of a run, finished or not.

    Raises:
        NotFound: the run does not exist.
        UsageError: the path is a file or a bundle.
        Damaged: its settings are damaged.
    """
    if not run.exists():
        raise NotFound(f"run {run} does not exist{similar_beside(run) or ': make one with mexit train'}")
    if instead := found_instead(run, RUN):
        raise UsageError(instead)
    value = read_json(run / SETTINGS, "settings")
    try:
        return TrainSettings.from_json(value, str(run / SETTINGS))
    except UsageError as error:
        raise Damaged(f"settings {run / SETTINGS}: {error}") from None


def read_log(run: Path) -> list[dict[str, Any]]:
    """Read the epoch records of a run; an empty list if it has no log.

    Raises:
        Damaged: a line is not valid JSON.
    """
    try:
        content = read_bytes(run / LOG, "log", MAX_LOG_BYTES)
    except NotFound:
        return []
    return [parse_json(line, run / LOG, "log") for line in content.splitlines()]


def intact(run: Path) -> str:
    """The end of a message about a run that fails; empty before its first checkpoint."""
    return f"; the last checkpoint in {run} is intact" if (run / CHECKPOINT).exists() else ""


def truncate_log(run: Path, size: int) -> None:
    """Drop records that were written after the checkpoint; training writes them again."""
    path = run / LOG
    try:
        if path.exists() and path.stat().st_size > size:
            with path.open("r+b") as file:
                file.truncate(size)
    except OSError as error:
        raise MexitError(f"could not write {path}: {error.strerror}{intact(run)}") from error


def append_log(run: Path, record: dict[str, Any]) -> int:
    """Append a record and return the size of the log in bytes."""
    path = run / LOG
    try:
        with path.open("ab") as file:
            file.write((json.dumps(record) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())  # the checkpoint that follows refers to this size
            return file.tell()
    except OSError as error:
        raise MexitError(f"could not write {path}: {error.strerror}{intact(run)}") from error


def create_run(run: Path, settings: TrainSettings, splits: Splits) -> None:
    """Create the directory of a run. The settings are written last: a run with settings is complete."""
    write_bytes(run / SPLITS, splits.to_bytes())
    save_settings(run, settings)


def save_settings(run: Path, settings: TrainSettings) -> None:
    """Write the settings of a run."""
    write_bytes(run / SETTINGS, to_json(settings.to_json()))


def _serialise(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    contiguous = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    return save_tensors(contiguous, metadata)


def _read(path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    content = read_bytes(path, what, MAX_BYTES)
    try:
        size = int.from_bytes(content[:8], "little")
        if not 0 < size <= min(_MAX_HEADER_BYTES, len(content) - 8):
            raise ValueError(f"its header claims {size} bytes")
        metadata: dict[str, Any] = json.loads(content[8 : 8 + size]).get("__metadata__", {})
        return load_tensors(content), {str(key): str(value) for key, value in metadata.items()}
    except (SafetensorError, ValueError, AttributeError) as error:
        raise Damaged(f"{what} {path} is not readable: {error}") from None


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def _load_weights(model: MultiExit, weights: Mapping[str, Tensor], path: Path) -> None:
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    if expected != shapes:
        wrong = sorted(name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name))
        raise Damaged(f"{path} holds another network: {', '.join(wrong[:6])} missing, unexpected or of another shape")
    model.load_state_dict(dict(weights))
