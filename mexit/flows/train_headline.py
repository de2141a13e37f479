"""The first lines of a training run: what it does, and which options change that."""

from __future__ import annotations

import textwrap

from mexit.data.registry import is_folder
from mexit.errors import requires_extra

with requires_extra("train", "Training a network"):
    from mexit.train.augment import mirrors
    from mexit.train.optimiser import NEW_HEAD_RATE
    from mexit.train.presets import FINETUNE, ROBUST_FINETUNE
    from mexit.train.trainer import Trainer

COLUMNS = 80


def headline(trainer: Trainer) -> str:
    """What the run does, in lines of at most 80 columns; for a folder with the options that change the choices."""
    settings, precision, processes = trainer.settings, trainer.precision, trainer.process_group.size
    attack = trainer.attack.describe() if trainer.attack else "no attack"
    length = f"{settings.minutes:g} minutes" if settings.minutes else f"{settings.epochs} epochs"
    arithmetic = f"{'bf16' if precision.bf16 else 'fp32'} on {precision.device}"
    arithmetic += f", {processes} processes" if processes > 1 else ""
    folder = is_folder(settings.data)
    name = trainer.data.name.rpartition("/")[2]
    flip = mirrors(settings.augment, settings.flip)
    channels, height, width = trainer.model.input_shape
    network, method, images = settings.model, f" with {settings.method}", f"{len(trainer.train_index)} images"
    pixels = f"{width} x {height} pixels, {'grey' if channels == 1 else 'RGB'}"
    changes = f", augmentation {settings.augment} {'with' if flip else 'without'} mirror images, {attack}"
    if settings.heads_only:
        network, method, changes = f"the {trainer.model.exits} heads of {network}", "", ""
        length, arithmetic = "one pass of the frozen network", f"fp32 on {precision.device}"
    elif settings.freeze:
        length = f"the heads first, then {length} of all layers"
    elif settings.preset in (FINETUNE, ROBUST_FINETUNE):
        rates = f"learning rate {settings.lr:g}, {NEW_HEAD_RATE * settings.lr:g} for the heads"
        length = f"{length} of all layers ({rates})"
    lines = [
        f"training {network} on {name}{method}: {images} of {trainer.model.classes} classes, {length}, {arithmetic}, "
        f"into {trainer.run}",
        pixels + changes,
    ]
    if settings.heads_only:
        lines.append("add --finetune 5 to train all layers after that")
    elif folder and not settings.freeze:
        lines.append("change it with --model, --size, --channels, --minutes, --flip, --robust 8/255")
    wrapper = textwrap.TextWrapper(COLUMNS, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(wrapper.fill(line) for line in lines)
