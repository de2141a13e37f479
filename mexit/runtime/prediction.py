"""The answer for one image: one class for Python, the command line, the server and the camera."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

UNSURE, REUSED, RATE_LIMIT = "unsure", "reused", "rate-limit"
REASONS = ("confident", "last", "deadline", RATE_LIMIT, "max-exit", REUSED, UNSURE)
POLICY_REASONS = ("confident", "last")  # the policy alone decided; certificates hold for these answers only


@dataclass(frozen=True)
class Receipt:
    """Details of what one answer cost. The MACs of all predictions add up to those of `RuntimeStats`, exactly.

    Attributes:
        segment_us: microseconds of each segment that ran, with its decision, in order; of the static network alone if
            it ran in their place. Every row of a batch has the time of the whole batch.
        rows: size of the batch in segment 1.
        queue_us: microseconds from the arrival of the request to the start of segment 1: waiting for a worker, for
            earlier rows of the request and for tokens.
        certificates: ids of the certificates in `policies.json` that hold for this answer. None hold for an answer
            that a deadline, the rate limiter or `max_exit` caused.
        model: id of the bundle.
    """

    segment_us: tuple[float, ...]
    rows: int
    queue_us: float
    certificates: tuple[str, ...]
    model: str


@dataclass  # a frozen one takes a microsecond more to make
class Prediction:
    """One answer.

    Attributes:
        index: predicted class, from 0; None if the answer is unsure.
        label: its name, or None.
        confidence: the largest probability.
        probabilities: of all classes, (C,) float64.
        exit: number of the exit in the network, from 1.
        reason: why that exit answered, one of `REASONS`. "unsure" stands in place of the other reasons where the score
            is below the reject threshold of the policy; "reused" repeats a camera's last answer, sure or unsure, for an
            unchanged picture.
        macs: MACs of everything that ran for this row, earlier heads included.
        saved_macs: MACs that the static network would have cost on top; negative if it would have cost less.
        latency_ms: milliseconds from the call to the answer.
        budget: the budget as typed.
        receipt: details of the cost; None unless the call asked for receipts.
    """

    index: int | None
    label: str | None
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
        """The answer as JSON values: probabilities rounded to six digits, times to a microsecond."""
        value = {name: getattr(self, name) for name in self.__dataclass_fields__}
        value["probabilities"] = [round(float(p), 6) for p in self.probabilities]
        value["confidence"] = round(self.confidence, 6)
        value["latency_ms"] = round(self.latency_ms, 3)
        value["receipt"] = self.receipt_json()
        return value

    def receipt_json(self) -> dict[str, Any] | None:
        """The receipt as JSON values, with the exit and the cost of this answer; times rounded to a nanosecond."""
        if self.receipt is None:
            return None
        return {
            "exit": self.exit,
            "reason": self.reason,
            "macs": self.macs,
            "saved_macs": self.saved_macs,
            "segment_us": [round(time_us, 3) for time_us in self.receipt.segment_us],
            "rows": self.receipt.rows,
            "queue_us": round(self.receipt.queue_us, 3),
            "budget": self.budget,
            "certificates": list(self.receipt.certificates),
            "model": self.receipt.model,
        }
