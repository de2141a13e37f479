"""From a budget to a policy: which point of the calibrated frontier a request gets."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from functools import lru_cache

from mexit.core.budget import Budget
from mexit.core.bundle import Bundle
from mexit.core.policies import PolicyEntry
from mexit.core.policy import Policy
from mexit.errors import NotCalibrated
from mexit.runtime.backends.base import Backend
from mexit.runtime.latency_profile import RunToExit, exit_times_ms, index_within


@dataclass(frozen=True)
class PolicyChoice:
    """What a budget selects.

    Attributes:
        policy: decides who leaves where.
        place: in the frontier; None where nothing is calibrated.
    """

    policy: Policy
    place: int | None


class PolicySelector:
    """The plans of one bundle in one engine. Plans are remembered; times are measured when first asked for."""

    def __init__(
        self, bundle: Bundle, backend: Backend, entry: PolicyEntry | None, threads: int, rehearse: RunToExit
    ) -> None:
        """`rehearse` answers one image that leaves at a given exit; budgets in milliseconds rest on it."""
        self._bundle, self._backend, self.entry = bundle, backend, entry
        self._threads, self._rehearse = threads, rehearse
        self.plan = lru_cache(maxsize=256)(self._plan)
        self._parse = lru_cache(maxsize=256)(self._read)

    def parse(self, budget: str | Budget) -> Budget:
        """A budget as typed, the names of this bundle's own budgets included. Raises `UsageError`."""
        return budget if isinstance(budget, Budget) else self._parse(budget)

    def for_rehearsals(self) -> PolicySelector:
        """One whose every plan is the full network, every head asked; it takes as long to find as any other."""
        full = PolicyChoice(self.plan(Budget.parse("full")).policy.evaluate_all_heads(), None)
        planner = copy(self)
        planner.plan = lru_cache(maxsize=256)(lambda _: full)
        return planner

    def at(self, place: int) -> PolicyChoice:
        """The plan of one frontier point."""
        assert self.entry is not None
        return PolicyChoice(self.entry.policy(self.entry.frontier[place]), place)

    def _read(self, text: str) -> Budget:
        return Budget.parse(text, self.entry.names if self.entry else None)

    def _plan(self, budget: Budget) -> PolicyChoice:
        entry = self.entry
        if entry is None:
            return PolicyChoice(self._uncalibrated(budget), None)
        if budget.is_full:
            return PolicyChoice(entry.policy(entry.frontier[-1]).without_early_exit(), len(entry.frontier) - 1)
        if budget.kind == "ms":
            times_ms = exit_times_ms(self._bundle, self._backend, self._threads, self._rehearse)
            return self.at(index_within(entry.frontier, budget.value, times_ms))
        return self.at(entry.place(budget, self._bundle.manifest.cumulative_macs))

    def _uncalibrated(self, budget: Budget) -> Policy:
        if not budget.is_full:
            backend = self._backend
            self._bundle.policies().usable(backend.engine, backend.precision, backend.variant)
            raise NotCalibrated(f"budget '{budget.text}' needs thresholds; only 'full' works without")
        count = len(self._bundle.manifest.exits)
        return Policy("max-probability", False, (1.0,) * count, (None,) * (count - 1))
