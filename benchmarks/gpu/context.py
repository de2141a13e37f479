"""Where an item runs: its folders, its deadline, and whether this is the rehearsal."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mexit.core.atomic_io import to_json, write_bytes

ROOT = Path(__file__).parents[2]
ZOO = ROOT / "zoo" / "gpu"


@dataclass(frozen=True)
class Context:
    """Facts that all items share. The working directory is the state folder, so paths below it are relative.

    Attributes:
        data_dir: folder of the data sets.
        miniature: whether this is the rehearsal on a CPU.
        deadline_s: value of `time.monotonic` at which the item must have stopped.
        stopped: whether a signal asked to stop.
    """

    data_dir: Path
    miniature: bool
    deadline_s: float
    stopped: Callable[[], bool] = field(default=lambda: False)

    def should_stop(self) -> bool:
        """Whether the item must stop now."""
        return self.stopped() or time.monotonic() > self.deadline_s

    def folder(self, name: str) -> Path:
        """Folder of an item's small results."""
        path = Path("items") / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def run(self, name: str) -> Path:
        """The run of a training item: in the state folder, else in the zoo."""
        here = Path("runs") / name
        return here if (here / "settings.json").exists() or not (ZOO / name).exists() else ZOO / name

    def write(self, name: str, file: str, value: Any) -> None:
        """Write a JSON file of an item atomically."""
        write_bytes(self.folder(name) / file, to_json(value))
