"""What one answer cost, in detail."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Receipt:
    """The receipt of one prediction. The `macs` of all receipts add up to the ledger's, exactly.

    Attributes:
        exit: which exit answered, from 1.
        reason: why there.
        macs: what ran for this row, the heads it passed included.
        saved_macs: what the full network would have cost more.
        segment_us: microseconds of each segment that ran and of its decision, (exit,). A row that travels with
            others is given the time of them all.
        rows: how many rows entered segment 1 together with this one, itself included.
        queue_us: microseconds from the arrival of the request to the start of segment 1: for a worker, for
            earlier rows of the same request, for the rate limiter.
        budget: as typed.
        certificates: ids of the certificates in `policies.json` that hold for this answer; none holds for rows
            that a deadline, the rate limiter or `max_exit` sent out early.
        model: id of the bundle.
    """

    exit: int
    reason: str
    macs: int
    saved_macs: int
    segment_us: tuple[float, ...]
    rows: int
    queue_us: float
    budget: str
    certificates: tuple[str, ...]
    model: str

    def to_json(self) -> dict[str, Any]:
        """Plain values, times rounded to a nanosecond."""
        value = asdict(self)
        value["segment_us"] = [round(time_us, 3) for time_us in self.segment_us]
        value["queue_us"] = round(self.queue_us, 3)
        value["certificates"] = list(self.certificates)
        return value
