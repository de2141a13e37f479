"""`policies.json`: thresholds per budget for each engine that was calibrated, with what they promise.

It lies beside the immutable part of a bundle and is replaced as a whole. It belongs to one model (the sha256
of `bundle.json`); another model's file is refused, and an engine without an entry is not calibrated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mexit.core.atomic_io import sha256_bytes, to_json
from mexit.core.budget import Budget, exact_macs, format_macs
from mexit.core.policy import Policy
from mexit.core.schema import check_format, decode
from mexit.core.scores import MEASURES
from mexit.errors import BudgetInfeasible, Damaged, NotCalibrated, StalePolicy

FORMAT = "mexit-policies"
VERSION = 1
PARITY = "fp32"  # the precision, and the variant, in which engines agree up to rounding


@dataclass(frozen=True)
class Outcome:
    """What a policy does on one trace.

    Attributes:
        n: samples.
        mean_macs: mean cost.
        accuracy: share answered right, in [0, 1]; None without labels.
        exits: how many left at each exit, (E,).
    """

    n: int
    mean_macs: float
    accuracy: float | None
    exits: tuple[int, ...]


@dataclass(frozen=True)
class FrontierPoint:
    """One budget and its thresholds.

    Attributes:
        budget_macs: bound on the expected cost.
        thresholds: (E-1,), None = never leave here.
        calibration: on the data that chose the thresholds.
        held_out: on the certification split, which chose nothing: the promise.
        attacked: the same samples under the attack of the entry's evidence; None where none was made.
    """

    budget_macs: float
    thresholds: tuple[float | None, ...]
    calibration: Outcome
    held_out: Outcome | None
    attacked: Outcome | None


@dataclass(frozen=True)
class TraceRef:
    """A stored trace: its file in the bundle, and what it was made on."""

    file: str
    sha256: str
    split: str
    condition: str
    n: int


@dataclass(frozen=True)
class PolicyEntry:
    """Everything calibrated for one engine.

    Attributes:
        engine, precision, variant: what ran the segments.
        trace: the calibration trace, which chose the thresholds.
        evidence: the traces behind `held_out` and `attacked`.
        measure, ensemble, temperatures: of the policy; see `core.policy.Policy`.
        frontier: by rising budget.
        named: budget name to index in `frontier`.
        certificates, drift: statistical guarantees and drift watch; empty until they are made.
    """

    engine: str
    precision: str
    variant: str
    trace: TraceRef
    evidence: tuple[TraceRef, ...]
    measure: str
    ensemble: bool
    temperatures: tuple[float, ...]
    frontier: tuple[FrontierPoint, ...]
    named: Mapping[str, int]
    certificates: tuple[Any, ...]
    drift: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise Damaged(f"policies.json: unknown measure '{self.measure}'")
        if not self.frontier:
            raise Damaged("policies.json: an entry without frontier")
        budgets = [point.budget_macs for point in self.frontier]
        if budgets != sorted(budgets):
            raise Damaged("policies.json: the frontier must rise in budget")
        exits = len(self.temperatures)
        if any(len(point.thresholds) != exits - 1 for point in self.frontier):
            raise Damaged(
                f"policies.json: {exits} temperatures need {exits - 1} thresholds at every frontier point"
            )
        if not all(value > 0 for value in self.temperatures):
            raise Damaged(f"policies.json: temperatures must be positive, found {self.temperatures}")
        if any(not 0 <= index < len(self.frontier) for index in self.named.values()):
            raise Damaged("policies.json: a named budget points outside the frontier")

    @property
    def names(self) -> Mapping[str, float]:
        """Every named budget in MACs."""
        return {name: self.frontier[index].budget_macs for name, index in self.named.items()}

    def policy(self, point: FrontierPoint) -> Policy:
        """The policy of one frontier point."""
        return Policy(self.measure, self.ensemble, self.temperatures, point.thresholds)

    def point(self, budget: Budget, cumulative_macs: Sequence[int]) -> FrontierPoint:
        """The largest frontier point not above the budget. Raises `BudgetInfeasible`."""
        return self.frontier[self.frontier_index(budget, cumulative_macs)]

    def frontier_index(self, budget: Budget, cumulative_macs: Sequence[int]) -> int:
        """The index of `point` in the frontier. Raises `BudgetInfeasible`."""
        if budget.kind == "named" and budget.text in self.named:
            return self.named[budget.text]
        macs = budget.macs(cumulative_macs)
        affordable = [i for i, point in enumerate(self.frontier) if point.budget_macs <= macs * (1 + 1e-9)]
        if not affordable:
            nearest = self.frontier[0].budget_macs
            raise BudgetInfeasible(
                f"budget '{budget.text}' is {format_macs(macs)}; the smallest calibrated one is "
                f"{exact_macs(nearest)}: use that, or run mexit calibrate --budget mine={exact_macs(macs)}"
            )
        return affordable[-1]


@dataclass(frozen=True)
class Policies:
    """The whole file for one model."""

    model: str
    entries: tuple[PolicyEntry, ...]

    def entry(self, engine: str, precision: str, variant: str) -> PolicyEntry:
        """The entry of one engine. Raises `NotCalibrated` naming those that exist."""
        key = (engine, precision, variant)
        for entry in self.entries:
            if (entry.engine, entry.precision, entry.variant) == key:
                return entry
        have = ", ".join(f"{entry.engine} {entry.precision}" for entry in self.entries) or "none"
        name = engine if precision == PARITY else f"{engine}:{precision}"
        raise NotCalibrated(
            f"no thresholds for engine {engine} in {precision} (calibrated: {have}): "
            f"run mexit calibrate --backend {name}"
        )

    def usable(self, engine: str, precision: str, variant: str) -> PolicyEntry:
        """The entry of one engine, else that of another one of the same parity class.

        Engines that compute the fp32 graphs in fp32 differ by rounding alone, and stored thresholds lie midway
        between scores, so what was calibrated for one serves them all. No other precision has such a class.

        Raises:
            NotCalibrated: neither exists.
        """
        try:
            return self.entry(engine, precision, variant)
        except NotCalibrated:
            parity = [entry for entry in self.entries if (entry.precision, entry.variant) == (PARITY, PARITY)]
            if (precision, variant) != (PARITY, PARITY) or not parity:
                raise
            return parity[0]

    def with_entry(self, new: PolicyEntry) -> Policies:
        """The same with `new` in place of the entry of that engine, or added."""
        key = (new.engine, new.precision, new.variant)
        kept = [entry for entry in self.entries if (entry.engine, entry.precision, entry.variant) != key]
        return Policies(self.model, (*kept, new))

    def to_bytes(self) -> bytes:
        """The file, checksum included."""
        entries = [dataclasses.asdict(entry) for entry in self.entries]
        head = {"format": FORMAT, "version": VERSION, "model": self.model}
        return to_json({**head, "checksum": _checksum(self.model, entries), "entries": entries})

    @staticmethod
    def from_json(value: Any, model: str, path: Path) -> Policies:
        """Check and convert. Raises `Damaged`, `SchemaTooNew`, `StalePolicy`."""
        check_format(value, FORMAT, VERSION, str(path))
        if value.get("model") != model:
            raise StalePolicy(
                f"{path} belongs to model {str(value.get('model'))[:12]}, this bundle is {model[:12]}: "
                "run mexit calibrate"
            )
        entries = value.get("entries")
        if value.get("checksum") != _checksum(model, entries):
            raise Damaged(f"{path}: the checksum does not fit the content; run mexit calibrate to write it anew")
        return Policies(model, decode(entries, tuple[PolicyEntry, ...], str(path)))


def _checksum(model: str, entries: Any) -> str:
    return sha256_bytes(to_json({"model": model, "entries": entries}))
