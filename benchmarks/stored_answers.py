"""Store which samples a run classified correctly, and measures of the run, beside the result pages."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mexit.core.atomic_io import write_bytes

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Answers:
    """The correctness of one run under several conditions, in one npz file of packed bits, and its measures.

    Attributes:
        path: the file; each `add` replaces it atomically, so an interrupted benchmark can continue.
    """

    path: Path

    @staticmethod
    def of(benchmark: str, run: str) -> Answers:
        """The stored answers of a run in a benchmark; there may be none yet."""
        return Answers(RESULTS / benchmark / f"{run}.npz")

    def has(self, condition: str) -> bool:
        """Whether a condition or a measure is stored."""
        return condition in self._read()

    def get(self, condition: str) -> NDArray[np.bool_]:
        """Whether each exit (or target) classified each sample correctly, (E, N)."""
        arrays = self._read()
        bits = np.unpackbits(arrays[condition], axis=1).astype(bool)
        correct: NDArray[np.bool_] = bits[:, : int(arrays[f"{condition} n"])]
        return correct

    def count(self, condition: str) -> int:
        """Number of samples for which a condition is stored."""
        arrays = self._read()
        return int(arrays[f"{condition} n"]) if condition in arrays else 0

    def add(self, answers: dict[str, NDArray[np.bool_]]) -> None:
        """Store conditions, each (E, N)."""
        arrays = dict(self._read())
        for condition, correct in answers.items():
            arrays[condition] = np.packbits(correct, axis=1)
            arrays[f"{condition} n"] = np.array(correct.shape[1])
        self._write(arrays)

    def extend(self, answers: dict[str, NDArray[np.bool_]]) -> None:
        """Append further samples to conditions, each (E, N), in one write."""
        self.add(
            {
                condition: np.concatenate([self.get(condition), correct], axis=1) if self.has(condition) else correct
                for condition, correct in answers.items()
            }
        )

    def note(self, name: str) -> str:
        """A stored text, such as the processor that a run was trained on; "" if there is none."""
        return str(self._read().get(name, ""))

    def add_note(self, name: str, text: str) -> None:
        """Store a text."""
        self._write({**self._read(), name: np.array(text)})

    def numbers(self, measure: str) -> NDArray[np.float64]:
        """A measure of every exit, (E,)."""
        return self._read()[measure]

    def add_numbers(self, measure: str, values: NDArray[np.float64]) -> None:
        """Store a measure, (E,)."""
        self._write({**self._read(), measure: values})

    def _write(self, arrays: dict[str, NDArray[Any]]) -> None:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        write_bytes(self.path, buffer.getvalue())

    def _read(self) -> dict[str, NDArray[Any]]:
        if not self.path.exists():
            return {}
        with np.load(self.path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
