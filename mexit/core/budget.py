"""A compute budget: what people type, and what it means in MACs for one network.

`low`, `medium` and `high` lie 1/4, 1/2 and 3/4 of the way from the cost of exit 1 to the cost of the last
exit, so they exist for every network; `full` never leaves early. `12M` (also `800k`, `1.2G`) is MACs, `40%`
a share of the full cost, `5ms` milliseconds on this device.

A budget bounds the *expected* cost on data like the calibration data. Under attack the mean rises.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mexit.errors import BudgetInfeasible, UsageError

NAMED_FRACTIONS = {"low": 0.25, "medium": 0.5, "high": 0.75, "full": 1.0}
MULTIPLES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
MAX_MACS = 10**18
_PATTERN = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>%|ms|[kMG]?)")
HOW_TO_WRITE = "write low, medium, high, full, MACs (800k, 12M), a share of the full cost (40%) or time (5ms)"


@dataclass(frozen=True)
class Budget:
    """A budget as typed.

    Attributes:
        text: as the user wrote it; what predictions and reports show.
        kind: "named", "macs", "share" or "ms".
        value: MACs, a share in (0, 1], milliseconds, or the named point's place between first and last exit.
    """

    text: str
    kind: str
    value: float

    @staticmethod
    def parse(text: str, names: Mapping[str, float] | None = None) -> Budget:
        """Read what a user typed.

        Args:
            text: as typed.
            names: further names of budgets, in MACs (`mexit calibrate --budget night=30%`).

        Raises:
            UsageError: no budget; says the ways to write one.
        """
        text = text.strip()
        if text in NAMED_FRACTIONS:
            return Budget(text, "named", NAMED_FRACTIONS[text])
        if names and text in names:
            return Budget(text, "macs", names[text])
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise UsageError(f"'{text}' is not a budget: {HOW_TO_WRITE}")
        number, unit = float(match["number"]), match["unit"]
        if number <= 0:
            raise UsageError(f"a budget must be above zero, found '{text}': {HOW_TO_WRITE}")
        if number * MULTIPLES.get(unit, 1) > (100 if unit == "%" else MAX_MACS):
            most = "100%" if unit == "%" else f"{MAX_MACS:.0e}"
            raise UsageError(f"a budget can be at most {most}, found '{text[:40]}': {HOW_TO_WRITE}")
        if unit == "%":
            return Budget(text, "share", number / 100)
        if unit == "ms":
            return Budget(text, "ms", number)
        return Budget(text, "macs", number * MULTIPLES[unit])

    @property
    def is_full(self) -> bool:
        """Whether it asks for the whole network on every input."""
        return self.kind == "named" and self.value == 1.0

    def macs(self, cumulative_macs: Sequence[int]) -> float:
        """The budget in MACs for a network with these cumulative costs, (E,).

        Raises:
            BudgetInfeasible: below the cost of exit 1; names the nearest feasible value.
            UsageError: a time, which only a device that measured itself can turn into MACs.
        """
        first, full = cumulative_macs[0], cumulative_macs[-1]
        if self.kind == "ms":
            raise UsageError(
                f"budget '{self.text}': this bundle has no times of this device yet; "
                f"give MACs between {format_macs(first)} and {format_macs(full)}"
            )
        if self.kind == "named":
            return first + self.value * (full - first)
        macs = self.value * full if self.kind == "share" else self.value
        if macs < first:
            raise BudgetInfeasible(
                f"budget '{self.text}' is {format_macs(macs)}, but exit 1 alone costs {format_macs(first)} "
                f"({100 * first / full:.1f}% of full): the nearest feasible budget is {exact_macs(first)}"
            )
        return macs


def format_macs(macs: float) -> str:
    """MACs for people: `9.25M MACs`."""
    return f"{short_macs(macs)} MACs"


def short_macs(macs: float) -> str:
    """MACs where the unit stands elsewhere: `9.25M`."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if macs >= size:
            return f"{macs / size:.3g}{unit}"
    return f"{macs:.0f}"


def exact_macs(macs: float) -> str:
    """MACs so that they can be typed as a budget again."""
    return f"{macs:.0f}"
