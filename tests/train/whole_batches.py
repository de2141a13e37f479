"""Short runs of the methods that use sums over whole batches, in one process or by `torchrun whole_batches.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mexit.data import digits, splits
from mexit.train.config import TrainSettings
from mexit.train.distributed import SINGLE_PROCESS, ProcessGroup, process_group
from mexit.train.precision import select_precision
from mexit.train.trainer import Trainer

# 188 images in batches of 61: the last batch has 5; the other shards have 30 and 31.
COMMON: dict[str, Any] = {"attack": "average", "steps": 2, "batch": 61, "precision": "fp32", "fraction": 0.2}
RUNS: dict[str, dict[str, Any]] = {
    "mcmi": {"method": "mcmi", "options": {"tune_epochs": 1}, "epochs": 2, "attack": "none", "seed": 1},
    "cmic": {"method": "cmic", "options": {"attacks": 2, "beta": 0.1}, "epochs": 1},
    "hdkd": {"method": "hdkd", "epochs": 1, "attack": "none"},
    "awp": {"method": "adversarial", "awp": 0.05, "epochs": 1},
}


def run(name: str, processes: ProcessGroup = SINGLE_PROCESS) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights before a run, and the weights and the state of the method after it."""
    torch.set_num_threads(1)
    settings = TrainSettings(**(COMMON | RUNS[name]))
    data = digits.load()
    parts = splits.split(data).thinned(data, settings.fraction, None)
    out = Path("runs") / name
    out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(out, settings, data, parts, select_precision("fp32", "cpu"), process_group=processes)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    assert trainer.train()
    learned = {f"learned {key}": value for key, value in trainer.method.state_dict().items()}
    return before, {**trainer.model.state_dict(), **learned}


if __name__ == "__main__":
    with process_group("cpu") as processes:
        for name in RUNS:
            _, tensors = run(name, processes)
            save_file(
                {key: value.contiguous() for key, value in tensors.items()}, f"{name}-{processes.rank}.safetensors"
            )
