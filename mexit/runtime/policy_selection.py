"""Selects the policy of a budget: a point of the calibrated frontier, or the static network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from mexit.core.budget import Budget
from mexit.core.bundle import Bundle
from mexit.core.cost import MACS
from mexit.core.exit_policy import Policy
from mexit.core.policies_file import PolicyEntry
from mexit.core.scores import Scorer
from mexit.errors import NotCalibrated
from mexit.runtime.backends.base import Backend
from mexit.runtime.latency_profile import Profile, index_within
from mexit.runtime.time_policies import TimePolicies


@dataclass(frozen=True)
class PolicyChoice:
    """The policy that a budget selects.

    Attributes:
        policy: scorer and thresholds.
        frontier_index: index of the frontier point; None without calibration.
        certificates: ids of the certificates that hold for the policy.
    """

    policy: Policy
    frontier_index: int | None
    certificates: tuple[str, ...] = ()


def entry_or_none(bundle: Bundle, backend: Backend) -> PolicyEntry | None:
    """The stored policies of an engine; None without calibration."""
    try:
        return bundle.policies().entry(backend.engine, backend.precision, backend.variant)
    except NotCalibrated:
        return None


class PolicySelector:
    """Budgets to policies, for one bundle in one engine. Choices are cached. Thread-safe.

    Attributes:
        entry: the engine's policies; None without calibration.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        entry: PolicyEntry | None,
        profile: Callable[[], Profile],
        *,
        all_heads: bool = False,
    ) -> None:
        """No budget is selected yet.

        Args:
            bundle: the opened bundle.
            backend: the loaded engine.
            entry: the engine's policies.
            profile: returns the latency profile of the engine, which budgets in milliseconds need.
            all_heads: the budget `full` evaluates every head, although no row exits early.
        """
        self.entry = self._macs_entry = entry
        self._costs = bundle.manifest.costs
        self._bundle, self._backend = bundle, backend
        self._profile, self._all_heads = profile, all_heads
        self.find = lru_cache(maxsize=256)(self._find)
        self.at = lru_cache(maxsize=256)(self._at)

    def scorer(self, classes: int) -> Scorer:
        """The scorer of all policies that let rows leave early."""
        entry = self.entry
        policy = self._all_exits() if entry is None else entry.policy(entry.frontier[-1])
        return policy.scorer(classes)

    def _find(self, budget: str | Budget) -> tuple[Budget, PolicyChoice]:
        """A budget, as typed or parsed, with the names that this bundle defines, and its choice.

        Raises:
            UsageError: it is no budget.
            NotCalibrated, BudgetInfeasible: it has no policy.
        """
        if isinstance(budget, str):
            entries = (self._macs_entry, self.entry)
            names = {name: macs for entry in entries if entry for name, macs in entry.names.items()}
            budget = Budget.parse(budget, names)
        return budget, self._select(budget)

    def use_time(self, timed: TimePolicies) -> None:
        """Select budgets in time from now on; those that exist in MACs alone stay."""
        self.entry, self._costs = timed.entry, timed.costs
        self.find.cache_clear()
        self.at.cache_clear()

    def _select(self, budget: Budget) -> PolicyChoice:
        """The choice of a budget. Raises `NotCalibrated`, `BudgetInfeasible`."""
        entry = self.entry
        if entry is None:
            return PolicyChoice(self._uncalibrated(budget), None)
        if budget.is_full:
            last = len(entry.frontier) - 1
            return self._choice(self._full(entry.policy(entry.frontier[last])), last)
        if budget.kind == "ms" and entry.unit == MACS:
            return self.at(index_within(entry.frontier, budget.value, self._profile().costs))
        own = self._macs_entry
        if own is not None and own is not entry and self._only_in_macs(budget, own, entry):
            return self._choice_in_macs(own, own.frontier_index(budget, self._bundle.manifest.costs))
        return self.at(entry.frontier_index(budget, self._costs))

    @staticmethod
    def _only_in_macs(budget: Budget, own: PolicyEntry, timed: PolicyEntry) -> bool:
        """Whether a budget has no policy in time: its certificate was lost, or none keeps its number of MACs."""
        if budget.kind != "macs" or budget.text in timed.named:
            return False
        return budget.text in own.named or all(budget.value < point.calibration.mean_macs for point in timed.frontier)

    def _at(self, index: int) -> PolicyChoice:
        """The choice of one frontier point."""
        assert self.entry is not None
        return self._choice(self.entry.policy(self.entry.frontier[index]), index)

    def _choice(self, policy: Policy, index: int) -> PolicyChoice:
        assert self.entry is not None
        return PolicyChoice(_alone(policy, self.entry), index, self._certificates(policy, index))

    def _choice_in_macs(self, entry: PolicyEntry, index: int) -> PolicyChoice:
        """The choice of a point that was selected in MACs, where other budgets are selected in time."""
        certificates = tuple(one["id"] for one in entry.certificates if one["first"] <= index <= one["last"])
        return PolicyChoice(_alone(entry.policy(entry.frontier[index]), entry), None, certificates)

    def _certificates(self, policy: Policy, index: int) -> tuple[str, ...]:
        """Certificates are about the thresholds of a frontier point, from which those of `full` may differ."""
        assert self.entry is not None
        if policy != self.entry.policy(self.entry.frontier[index]):
            return ()
        return tuple(one["id"] for one in self.entry.certificates if one["first"] <= index <= one["last"])

    def _uncalibrated(self, budget: Budget) -> Policy:
        if not budget.is_full:
            self._bundle.policies().entry(self._backend.engine, self._backend.precision, self._backend.variant)
            raise NotCalibrated(f"the budget '{budget.text}' needs thresholds; only 'full' works without")
        return self._full(self._all_exits())

    def _all_exits(self) -> Policy:
        """The policy without calibration."""
        exits = len(self._bundle.manifest.exits)
        return Policy("max-probability", False, (1.0,) * exits, (None,) * (exits - 1))

    def _full(self, policy: Policy) -> Policy:
        return policy.evaluate_all_heads() if self._all_heads else policy.without_early_exit()


def _alone(policy: Policy, entry: PolicyEntry) -> Policy:
    """A policy of the static network answers as it was calibrated, also where the segments run in its place."""
    return policy.alone if entry.last_exit_alone else policy
