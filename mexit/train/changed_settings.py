"""Which settings of a stopped or finished run `mexit train --resume` can change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mexit.core.pixel_range import format_fraction
from mexit.errors import UsageError
from mexit.train.checkpoint import Position, is_finished
from mexit.train.config import TrainSettings
from mexit.train.option_names import option_name

# Every schedule is a function of the fraction of the run that is done, and the checkpoint holds weights, momentum and
# averages in float32. So the length, the optimiser's numbers, the arithmetic and what is measured and kept can change.
# Data, network, method, attack and augmentation define what the run is: with others it is another run.
CHANGEABLE = (
    "epochs", "minutes", "finetune", "lr", "lr_schedule", "warmup", "decay_at", "decay_factor", "momentum", "nesterov",
    "weight_decay", "decay_norms", "precision", "keep", "validate_every", "selection_steps", "recompute_norms",
    "test_steps",
)  # fmt: skip


def change_settings(
    run: Path, stored: TrainSettings, given: Mapping[str, Any], position: Position | None
) -> TrainSettings:
    """Apply given settings to those of a run.

    Args:
        run: its directory, for messages.
        stored: its settings.
        given: fields of `TrainSettings`; None values count as not given.
        position: position of its checkpoint; None without one.

    Returns:
        The settings to continue with; `changes` records what was changed where. Without a change, `stored` itself.

    Raises:
        UsageError: a setting that cannot change, a value outside its range, or a run that is finished under the new
            settings, which a change would not affect.
    """
    changed = {name: _plain(value, getattr(stored, name)) for name, value in given.items() if value is not None}
    changed = {name: value for name, value in changed.items() if value != getattr(stored, name)}
    fixed = [name for name in changed if name not in CHANGEABLE]
    if fixed:
        own = " and ".join(f"{option_name(name)} ({_show(name, getattr(stored, name))})" for name in fixed)
        raise UsageError(
            f"--resume continues {run} with its own {own}: leave {'it' if len(fixed) == 1 else 'them'} out, or begin "
            f"another run with --out. It can change {', '.join(map(option_name, CHANGEABLE[:2]))}, the learning rate "
            "and its schedule, --precision, --keep and --validate-every"
        )
    changed |= _length(stored, given)
    if "finetune" in changed:
        changed["epochs"] = changed["finetune"]
    if not changed:
        return stored
    before = {name: getattr(stored, name) for name in changed}
    at = position or Position(0, 0, {}, None, 0)
    record = {"epoch": at.epoch, "step": at.step, "before": before}
    settings = replace(stored, **changed, steps_done=0, changes=(*stored.changes, record))
    if position is not None and is_finished(position, settings):
        options = " and ".join(map(option_name, changed))
        done = f"{position.epoch} epochs in {position.elapsed_s / 60:.2g} minutes"
        length = option_name("finetune" if settings.freeze else "epochs")
        raise UsageError(
            f"{run} has done {done}, so {options} would change nothing: add {length} {position.epoch + 1} or more, or "
            f"--minutes above {position.elapsed_s / 60:.2g}, to train on"
        )
    return settings


def describe_change(settings: TrainSettings, stored: TrainSettings) -> str:
    """The settings that differ from the stored ones, such as `--epochs 6 instead of 3`."""
    if settings.changes == stored.changes:
        return ""
    names = settings.changes[-1]["before"]
    epochs_end_it = "minutes" in names and not settings.minutes  # whether their number changed or not

    def before(name: str) -> str:
        old = "minutes" if epochs_end_it and name in ("epochs", "finetune") else name
        value = _show(old, getattr(stored, old))
        return value if old == name else f"{option_name(old)} {value}"

    return ", ".join(
        f"{option_name(name)} {_show(name, getattr(settings, name))} instead of {before(name)}"
        for name in names
        if not (epochs_end_it and name == "minutes")
    )


def _length(stored: TrainSettings, given: Mapping[str, Any]) -> dict[str, Any]:
    """The change of the length: epochs end a run by the clock, and the other way round.

    After the heads of a frozen network, `finetune` is the number of epochs.
    """
    name, other = ("finetune", "epochs") if stored.freeze else ("epochs", "finetune")
    if given.get(other) is not None:
        raise UsageError(
            f"{option_name(other)} sets the epochs of a run {'without' if stored.freeze else 'with'} --freeze: "
            f"give {option_name(name)}"
        )
    epochs, minutes = given.get(name), given.get("minutes")
    if epochs is not None and minutes is not None:
        raise UsageError(f"a run ends after --minutes or after {option_name(name)}: give one of them")
    if minutes == 0:
        raise UsageError("--minutes must be above 0")
    if epochs is not None and stored.minutes:
        return {name: epochs, "minutes": 0.0}
    return {}


def _plain(value: Any, stored: Any) -> Any:
    """The value as settings store it; options that are not given keep their stored values."""
    if isinstance(value, Mapping):
        return {**stored, **{name: list(one) if isinstance(one, tuple) else one for name, one in value.items()}}
    return tuple(value) if isinstance(value, list) else value


def _show(name: str, value: Any) -> str:
    if name in ("eps", "step"):
        return format_fraction(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_show('', one)}" for key, one in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ",".join(_show("", one) for one in value) or "none"
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)
