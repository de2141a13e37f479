"""`policies.json`: the thresholds of each budget for each calibrated engine, with measured costs and accuracies.

The file lies beside the immutable part of a bundle and is replaced as a whole. It belongs to one model (the sha256 of
`bundle.json`); the file of another model is refused. An engine without an entry is not calibrated: thresholds of
another engine are never used in its place, because engines differ in their logits, and certificates hold for the engine
whose trace they were computed on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mexit.core.atomic_io import sha256_bytes, to_json
from mexit.core.budget import Budget, exact_macs, format_macs
from mexit.core.cost import MACS, MICROSECONDS, Costs
from mexit.core.exit_policy import Policy
from mexit.core.schema import check_format, decode
from mexit.core.scores import MEASURES
from mexit.errors import BudgetInfeasible, Damaged, NotCalibrated, StalePolicy

FORMAT = "mexit-policies"
VERSION = 2  # written only for entries with a reject option: a program that does not know it must not answer for them
PARITY = "fp32"  # the reference precision, and the variant that every bundle has


@dataclass(frozen=True)
class Outcome:
    """Cost and accuracy of a policy on one trace.

    Attributes:
        n: number of samples.
        mean_macs: mean cost, MACs.
        accuracy: share of correct answers, in [0, 1]; None without labels.
        exits: number of samples that left at each exit, (E,).
        macs_error, accuracy_error: standard errors of `mean_macs` and `accuracy`; None in files of mexit 0.1, and with
            a single sample or group.
        groups: number of groups (objects, films, bursts) that the samples belong to; None without groups.
        mean_us, us_error: mean time of a single image in microseconds on one device, and its standard error; None
            in `policies.json`.
    """

    n: int
    mean_macs: float
    accuracy: float | None
    exits: tuple[int, ...]
    macs_error: float | None = None
    accuracy_error: float | None = None
    groups: int | None = None
    mean_us: float | None = None
    us_error: float | None = None


@dataclass(frozen=True)
class RejectOutcome:
    """What the reject option does to one policy, on the certification split.

    Attributes:
        coverage: share of answered pictures, in [0, 1].
        error: share of wrong answers among them.
        unknown_answered: share of answered pictures of other things; None without such pictures.
        exits: the bound is certified if one of these exits, from 1, is the last one that may answer; they include the
            last exit.
    """

    coverage: float
    error: float
    unknown_answered: float | None
    exits: tuple[int, ...]


@dataclass(frozen=True)
class RejectTerms:
    """The bound that the reject option keeps at every point of a frontier.

    Attributes:
        max_error: largest share of wrong answers among the answers given.
        confidence: of the statement about one policy and one last exit.
        max_unknown: largest share of answered pictures of other things; None without such pictures.
        n, groups: pictures and groups of the certification split; `groups` is None where each picture is its own.
        n_unknown: pictures of other things that tested the thresholds, or None.
        reject_from: the data set of those pictures as typed, such as "folder:PATH"; None without such pictures, and in
            older files.
    """

    max_error: float
    confidence: float
    max_unknown: float | None
    n: int
    groups: int | None
    n_unknown: int | None
    reject_from: str | None = None

    @property
    def promise(self) -> str:
        """The bound in words."""
        unknown = (
            ""
            if self.max_unknown is None
            else f", and at most {self.max_unknown:.2%} of pictures like those of other things are answered"
        )
        return (
            f"At each budget by itself, at most {self.max_error:.2%} of the answers are wrong{unknown}, with "
            f"confidence {self.confidence:.1%}, for pictures like the certification data. An unsure picture has no "
            "answer. Nothing is promised under attack or after the data has changed."
        )


@dataclass(frozen=True)
class FrontierPoint:
    """One budget and its thresholds.

    Attributes:
        budget_macs: bound on the expected cost, MACs; with `budget_us` the expected MACs.
        thresholds: (E-1,); None means that no row leaves there. Without any the static network answers.
        calibration: on the split that the thresholds were chosen on.
        held_out: on the certification split, on which nothing was chosen; None without that split.
        attacked: on the certification split under the attack of the entry's evidence; None without an attack.
        reject: reject threshold of each exit, (E,); see `core.exit_policy.Policy`. None without a reject option.
        rejected: what it does; None without.
        budget_us: bound on the expected time of a single image on one device, microseconds; None in `policies.json`.
    """

    budget_macs: float
    thresholds: tuple[float | None, ...]
    calibration: Outcome
    held_out: Outcome | None
    attacked: Outcome | None
    reject: tuple[float | None, ...] | None = None
    rejected: RejectOutcome | None = None
    budget_us: float | None = None

    @property
    def limit(self) -> float:
        """The budget in the unit that the thresholds were selected in."""
        return self.budget_macs if self.budget_us is None else self.budget_us


@dataclass(frozen=True)
class TraceRef:
    """A stored trace: its file in the bundle, and the data that it was recorded on."""

    file: str
    sha256: str
    split: str
    condition: str
    n: int


@dataclass(frozen=True)
class PolicyEntry:
    """The calibration of one engine.

    Attributes:
        engine, precision, variant: the engine that ran the segments.
        trace: the calibration trace, on which the thresholds were chosen.
        evidence: the traces behind `held_out` and `attacked`, and those of other things, condition "unknown".
        measure, ensemble, temperatures: of every policy; see `core.exit_policy.Policy`.
        frontier: points in the order of their budgets.
        named: name of a budget to its index in `frontier`.
        certificates: statistical guarantees, each for a range of the frontier.
        drift: expected rates of disagreement for the drift watch; may be empty.
        reject: the bound that the reject option keeps; None without one.
        budgets: the user's own budgets as typed, by name; None in files of mexit 0.1.
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
    reject: RejectTerms | None = None
    budgets: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise Damaged(f"policies.json: unknown measure '{self.measure}'")
        if not self.frontier:
            raise Damaged("policies.json: an entry without frontier")
        limits = [point.limit for point in self.frontier]
        if limits != sorted(limits):
            raise Damaged("policies.json: the frontier must rise in budget")
        exits = len(self.temperatures)
        if any(len(point.thresholds) != exits - 1 for point in self.frontier):
            raise Damaged(f"policies.json: {exits} temperatures need {exits - 1} thresholds at every frontier point")
        if any(point.reject is not None and len(point.reject) != exits for point in self.frontier):
            raise Damaged(f"policies.json: {exits} temperatures need {exits} reject thresholds at every frontier point")
        if not all(value > 0 for value in self.temperatures):
            raise Damaged(f"policies.json: temperatures must be positive, found {self.temperatures}")
        if any(not 0 <= index < len(self.frontier) for index in self.named.values()):
            raise Damaged("policies.json: a named budget points outside the frontier")

    @property
    def unit(self) -> str:
        """The unit that the thresholds were selected in: "macs" or "us"."""
        return MACS if self.frontier[0].budget_us is None else MICROSECONDS

    @property
    def last_exit_alone(self) -> bool:
        """Whether the last exit answers without an ensemble where nothing leaves early; not in files of mexit 0.1."""
        return self.budgets is not None

    @property
    def names(self) -> Mapping[str, float]:
        """The named budgets, MACs."""
        return {name: self.frontier[index].budget_macs for name, index in self.named.items()}

    def policy(self, point: FrontierPoint) -> Policy:
        """The policy of one frontier point."""
        return Policy(self.measure, self.ensemble, self.temperatures, point.thresholds, point.reject)

    def by_policy(self) -> tuple[tuple[tuple[str, ...], FrontierPoint], ...]:
        """The named budgets, by rising cost: the names that share one policy, and the frontier point of the first."""
        groups: dict[Policy, tuple[list[str], FrontierPoint]] = {}
        for name, index in sorted(self.named.items(), key=lambda item: item[1]):
            point = self.frontier[index]
            groups.setdefault(self.policy(point), ([], point))[0].append(name)
        return tuple((tuple(names), point) for names, point in groups.values())

    def more_accurate_than_full(self) -> tuple[str, ...]:
        """The named budgets that are more accurate than the full network on the calibration data."""
        full = self.frontier[-1].calibration.accuracy
        if full is None:
            return ()
        accuracies = {name: self.frontier[index].calibration.accuracy for name, index in self.named.items()}
        return tuple(name for name, accuracy in accuracies.items() if accuracy is not None and accuracy > full)

    def frontier_index(self, budget: Budget, costs: Costs) -> int:
        """The index of the largest frontier point not above the budget.

        Args:
            budget: a number of MACs bounds the expected MACs, also where the thresholds were selected in time.
            costs: of leaving at each exit, in `unit`.

        Raises:
            BudgetInfeasible: no point is within the budget.
            UsageError: the budget is a time, but the thresholds were selected in MACs.
        """
        if budget.text in self.named:
            return self.named[budget.text]
        if self.unit == MICROSECONDS and budget.kind == "macs":
            macs, values = budget.value, [point.calibration.mean_macs for point in self.frontier]
        else:
            macs, values = budget.cost(costs), [point.limit for point in self.frontier]
        affordable = [i for i, value in enumerate(values) if value <= macs * (1 + 1e-9)]
        if not affordable:
            if self.unit == MICROSECONDS:
                available = ", ".join(self.named)
                raise BudgetInfeasible(
                    f"budget '{budget.text}' is below the cheapest policy that may be used, which takes "
                    f"{self.frontier[0].limit:,.0f} us: the available budgets are {available}"
                )
            nearest = exact_macs(self.frontier[0].budget_macs)
            found = f"budget '{budget.text}' is {format_macs(macs)}; the smallest"
            if self.reject is not None:
                raise BudgetInfeasible(
                    f"{found} one with at most {self.reject.max_error:.2%} wrong answers is {nearest}: use that, or "
                    "run mexit calibrate with a larger --max-error"
                )
            raise BudgetInfeasible(
                f"{found} calibrated one is {nearest}: use that, or run mexit calibrate --budget "
                f"mine={exact_macs(macs)}"
            )
        return affordable[-1]


@dataclass(frozen=True)
class Policies:
    """The content of the file."""

    model: str
    entries: tuple[PolicyEntry, ...]

    def entry(self, engine: str, precision: str, variant: str) -> PolicyEntry:
        """The entry of one engine. Raises `NotCalibrated`, which names the engines that have one."""
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

    def with_entry(self, new: PolicyEntry) -> Policies:
        """A copy with `new` in place of the entry of that engine, if there is one."""
        key = (new.engine, new.precision, new.variant)
        kept = [entry for entry in self.entries if (entry.engine, entry.precision, entry.variant) != key]
        return Policies(self.model, (*kept, new))

    def to_bytes(self) -> bytes:
        """The content of the file, with its checksum."""
        entries = [entry_to_json(entry) for entry in self.entries]
        version = VERSION if any(entry.reject for entry in self.entries) else 1
        head = {"format": FORMAT, "version": version, "model": self.model}
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
            raise Damaged(f"{path}: the checksum does not match the content; run mexit calibrate to write it again")
        return Policies(model, decode(entries, tuple[PolicyEntry, ...], str(path)))


def entry_to_json(entry: PolicyEntry) -> dict[str, Any]:
    """An entry as JSON values, without the times where there are none."""
    value: dict[str, Any] = dataclasses.asdict(entry)
    for point in value["frontier"]:
        for part in (point, *(point[name] for name in ("calibration", "held_out", "attacked") if point[name])):
            for name in ("budget_us", "mean_us", "us_error"):
                if part.get(name, 0) is None:
                    del part[name]
    return value


def _checksum(model: str, entries: Any) -> str:
    return sha256_bytes(to_json({"model": model, "entries": entries}))
