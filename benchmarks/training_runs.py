"""Train a run or go on with an interrupted one, and name its processor, for programs that compare training methods."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from mexit.flows.bench import machine
from mexit.flows.train import TrainOptions, train_model
from mexit.models.device import resolve_device
from mexit.train import checkpoint


def train_or_resume(
    out: Path,
    data: str,
    preset: str | None,
    settings: Mapping[str, Any],
    options: TrainOptions,
    data_dir: str | Path | None = None,
) -> bool:
    """Train `out` to its end, from its last checkpoint if it has one; returns whether the run is finished.

    Args:
        out: run directory; a finished run is left as it is.
        data, preset, settings, data_dir: as for `train_model`.
        options: device and threads; `should_stop` ends training with a checkpoint.
    """
    if (out / checkpoint.WEIGHTS).exists():
        return True
    resume = (out / checkpoint.CHECKPOINT).exists()
    if not resume and out.exists():
        shutil.rmtree(out)  # killed before its first checkpoint
    return train_model(
        data, preset=preset, settings=settings, data_dir=data_dir, out=out, resume=resume, options=options
    ).finished


def machine_name(device: str) -> str:
    """The processor that a device setting ("auto", "cpu", "cuda") selects, such as "NVIDIA H100 80GB HBM3"."""
    if resolve_device(device) == "cuda":
        return torch.cuda.get_device_name()
    about = machine()
    return f"{about['cpu']}, {about['cores']} cores"


def hardware_name(machines: Collection[str]) -> str:
    """The part of a page's file name for results of these machines: a card such as "h100", else "2-core-cpu"."""
    cards = sorted({name.split()[1].lower() for name in machines if name.startswith("NVIDIA")})
    return "-".join(cards) or f"{machine()['cores']}-core-cpu"
