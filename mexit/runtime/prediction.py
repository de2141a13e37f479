"""One answer: the same object for Python, command line, server and camera."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mexit.runtime.receipt import Receipt

REASONS = ("confident", "last", "deadline", "rate-limit", "max-exit", "reused")


@dataclass(frozen=True)
class Prediction:
    """One answer.

    Attributes:
        index: the class.
        label: its name.
        confidence: its probability.
        probabilities: of all classes, (C,) float64.
        exit: which exit answered, from 1.
        reason: why there: one of `REASONS`.
        macs: what was spent.
        saved_macs: what the full network would have cost more.
        latency_ms: from the call to the answer.
        budget: as typed.
        receipt: what it cost in detail; None unless asked for.
    """

    index: int
    label: str
    confidence: float
    probabilities: NDArray[np.float64]
    exit: int
    reason: str
    macs: int
    saved_macs: int
    latency_ms: float
    budget: str
    receipt: Receipt | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, probabilities rounded to six digits."""
        value = {name: getattr(self, name) for name in self.__dataclass_fields__}
        value["probabilities"] = [round(float(p), 6) for p in self.probabilities]
        value["confidence"] = round(self.confidence, 6)
        value["latency_ms"] = round(self.latency_ms, 3)
        value["receipt"] = None if self.receipt is None else self.receipt.to_json()
        return value
