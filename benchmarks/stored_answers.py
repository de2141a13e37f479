"""Which samples were answered rightly, kept beside the result pages so that later runs pair with them."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mexit.core.files import write_bytes

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Answers:
    """One run's answers under many conditions, as one npz file of packed bits.

    Attributes:
        path: the file; each `add` replaces it atomically, so an interrupted benchmark goes on where it was.
    """

    path: Path

    @staticmethod
    def of(benchmark: str, run: str) -> Answers:
        """The answers of a run in a benchmark, perhaps none yet."""
        return Answers(RESULTS / benchmark / f"{run}.npz")

    @staticmethod
    def all_of(benchmark: str) -> dict[str, Answers]:
        """Every run of a benchmark that has answers, by name."""
        return {path.stem: Answers(path) for path in sorted((RESULTS / benchmark).glob("*.npz"))}

    def has(self, condition: str) -> bool:
        """Whether the run was judged under a condition."""
        return condition in self._read()

    def get(self, condition: str) -> NDArray[np.bool_]:
        """Which exit (or target) was right on which sample, (E, N)."""
        arrays = self._read()
        bits = np.unpackbits(arrays[condition], axis=1).astype(bool)
        right: NDArray[np.bool_] = bits[:, : int(arrays[f"{condition} n"])]
        return right

    def add(self, found: dict[str, NDArray[np.bool_]]) -> None:
        """Store conditions, each (E, N)."""
        arrays = dict(self._read())
        for condition, right in found.items():
            arrays[condition] = np.packbits(right, axis=1)
            arrays[f"{condition} n"] = np.array(right.shape[1])
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        write_bytes(self.path, buffer.getvalue())

    def _read(self) -> dict[str, NDArray[np.uint8]]:
        if not self.path.exists():
            return {}
        with np.load(self.path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
