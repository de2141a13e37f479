"""A trace: the logits of every exit on a data set, recorded from the bundle that will be deployed.

Calibration needs nothing else. A trace file is an npz file without pickle: arrays, and the origin as a JSON text.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mexit.core.atomic_io import read_npz, to_npz
from mexit.core.schema import decode
from mexit.errors import BadInput, Damaged

MAX_TRACE_BYTES = 2 << 30
MIN_SAMPLES = 20  # that thresholds are set on

UNKNOWN = "unknown"  # the condition of pictures of other things


@dataclass(frozen=True)
class Origin:
    """The origin of a trace.

    Attributes:
        model: id of the bundle.
        variant: variant of its segments (`fp32`, ...).
        engine: the engine that ran them (`ort`, ...).
        precision: precision in which they ran.
        split: `calibration`, `certification` or `test`.
        condition: `clean`, the attack in full, or `unknown` (pictures of other things, for the reject option).
        data_sha256: sha256 of the data set.
    """

    model: str
    variant: str
    engine: str
    precision: str
    split: str
    condition: str
    data_sha256: str


@dataclass(frozen=True)
class Trace:
    """Logits and labels.

    Attributes:
        logits: (E, N, C) float32.
        labels: (N,) int64, or None if they are unknown.
        index: (N,) int64, indices of the samples in the data set; pairs a clean with an attacked trace.
        origin: the bundle, the engine and the data.
        groups: (N,) int64, group id of each sample (pictures of one object, film or burst), or None without groups.
    """

    logits: NDArray[np.float32]
    labels: NDArray[np.int64] | None
    index: NDArray[np.int64]
    origin: Origin
    groups: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        if self.logits.ndim != 3 or self.logits.dtype != np.float32:
            raise BadInput(f"a trace needs logits (E, N, C) float32, found {self.logits.shape} {self.logits.dtype}")
        exits, samples, classes = self.logits.shape
        if not exits or not samples or classes < 2:
            raise BadInput(f"a trace needs an exit, a sample and two classes, found {self.logits.shape}")
        for name, array in (("labels", self.labels), ("index", self.index), ("groups", self.groups)):
            if array is not None and (array.shape != (samples,) or array.dtype != np.int64):
                raise BadInput(
                    f"{samples} rows of logits need {samples} {name} int64, found {array.shape} {array.dtype}"
                )
        if self.labels is not None and (self.labels.min() < 0 or self.labels.max() >= classes):
            raise BadInput(f"labels must lie in 0..{classes - 1}, found {self.labels.min()}..{self.labels.max()}")

    def to_bytes(self) -> bytes:
        """The content of the npz file."""
        optional = {"labels": self.labels, "groups": self.groups}
        present = {name: array for name, array in optional.items() if array is not None}
        return to_npz(origin=asdict(self.origin), logits=self.logits, index=self.index, **present)

    @staticmethod
    def from_bytes(content: bytes, path: Path) -> Trace:
        """Parse a trace that was read from `path`. Raises `Damaged`."""
        try:
            arrays = read_npz(content, MAX_TRACE_BYTES)
            origin = decode(json.loads(arrays["origin"].tobytes()), Origin, "origin")
            return Trace(arrays["logits"], arrays.get("labels"), arrays["index"], origin, arrays.get("groups"))
        except KeyError as error:
            raise Damaged(f"trace {path} holds no {error}") from None
        except (ValueError, RecursionError, BadInput, Damaged) as error:
            raise Damaged(f"trace {path} is not readable: {error}") from None
