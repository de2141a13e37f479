"""A compute budget: how it is written, and its value for one network, in MACs or in microseconds.

`low`, `medium` and `high` lie 1/4, 1/2 and 3/4 of the way from the cost of exit 1 to the cost of the static network, so
they exist for every network; `full` is the static network. `12M` (also `800k`, `1.2G`) is MACs, `40%` a share of the
static network's cost, `5ms` milliseconds on this device.

A budget bounds the *expected* cost on data like the calibration data. Under attack the mean rises.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal

from mexit.core.cost import MACS, Costs
from mexit.errors import BudgetInfeasible, UsageError

NAMED_FRACTIONS = {"low": 0.25, "medium": 0.5, "high": 0.75, "full": 1.0}
CERTIFIED, TARGET = "certified", "target"
MADE_BY = {CERTIFIED: "mexit calibrate --max-risk 0.02", TARGET: "mexit calibrate --target-drop 0.005"}
Macs = int | float | str  # a number of MACs as a user gives it
_MULTIPLES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
_MAX_MACS = 10**18
_PATTERN = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>%|ms|[kMG]?)")
HOW_TO_WRITE = (
    "write low, medium, high, full, MACs (800k, 12M), a share of the static network's cost (40%) or time (5ms)"
)


@dataclass(frozen=True)
class Budget:
    """A budget as typed.

    Attributes:
        text: as the user wrote it; predictions and reports show it.
        kind: "named", "macs", "share" or "ms".
        value: MACs, a share of the static network's cost in (0, 1], milliseconds, or for a named budget the share of
            the way from the cost of exit 1 to that of the static network, in [0, 1].
    """

    text: str
    kind: str
    value: float

    @staticmethod
    def parse(text: str, names: Mapping[str, float] | None = None) -> Budget:
        """Parse a budget that a user typed.

        Args:
            text: as typed.
            names: further names of budgets, in MACs (`mexit calibrate --budget night=30%`).

        Raises:
            UsageError: the text is not a budget; the message lists the ways to write one.
        """
        text = text.strip()
        if text in NAMED_FRACTIONS:
            return Budget(text, "named", NAMED_FRACTIONS[text])
        if names and text in names:
            return Budget(text, "macs", names[text])
        quantity = _quantity(text)
        if quantity is None and text in MADE_BY:
            raise UsageError(
                f"the budget '{text}' needs a certificate, and this engine has none: {MADE_BY[text]} makes both; or "
                f"{HOW_TO_WRITE}"
            )
        if quantity is None:
            raise UsageError(f"'{text}' is not a budget: {HOW_TO_WRITE}")
        number, unit = quantity
        if number <= 0:
            raise UsageError(f"a budget must be above zero, found '{text}': {HOW_TO_WRITE}")
        if number > (100 if unit == "%" else _MAX_MACS):
            most = "100%" if unit == "%" else f"{_MAX_MACS:.0e}"
            raise UsageError(f"a budget can be at most {most}, found '{text[:40]}': {HOW_TO_WRITE}")
        if unit == "%":
            return Budget(text, "share", float(number / 100))
        return Budget(text, unit, float(number))

    @property
    def is_full(self) -> bool:
        """Whether the static network answers every input."""
        return self.kind == "named" and self.value == 1.0

    def cost(self, costs: Costs) -> float:
        """The budget for a network with these costs, in their unit.

        Raises:
            BudgetInfeasible: the budget is below the cheapest policy; the message names the nearest feasible value.
            UsageError: the budget is a time and the costs are MACs, or the other way round.
        """
        first, static, unit = costs.first, costs.static, costs.unit
        if self.kind == "named":
            return first + self.value * (static - first)
        if self.kind == ("ms" if unit == MACS else "macs"):
            found = "no times of this device" if unit == MACS else "times of this device, but no MACs"
            raise UsageError(
                f"budget '{self.text}': there are {found} here; give a budget between {format_cost(first, unit)} and "
                f"{format_cost(static, unit)}"
            )
        cost = {"share": static, "macs": 1.0, "ms": 1000.0}[self.kind] * self.value
        if cost < first:
            nearest = exact_macs(first) if unit == MACS else f"{first * 1.0001 / 1000:.6g}ms"
            raise BudgetInfeasible(
                f"budget '{self.text}' is {format_cost(cost, unit)}, but the cheapest policy costs "
                f"{format_cost(first, unit)} ({100 * first / static:.1f}% of the static network): the nearest feasible "
                f"budget is {nearest}"
            )
        return cost


def parse_macs(value: Macs, name: str) -> int:
    """A number of MACs as typed (`800k`, `40M`, `1.5G`) or as a number, without rounding before the final integer.

    Args:
        value: the number.
        name: what it is, for the message, such as "rate".

    Raises:
        UsageError: not a number of MACs between 1 and 1e18.
    """
    if isinstance(value, str):
        number, unit = _quantity(value.strip()) or (Decimal(0), "")
    else:
        is_number = not isinstance(value, bool) and 0 < value <= _MAX_MACS
        number, unit = (Decimal(value), "macs") if is_number else (Decimal(0), "")
    if unit != "macs":
        raise UsageError(f"a {name} is a number of MACs such as 800k, 40M or 1.5G, found '{value}'")
    if not 1 <= number <= _MAX_MACS:
        raise UsageError(f"a {name} lies between 1 and {_MAX_MACS:.0e} MACs, found '{value}'")
    return int(number)


def format_macs(macs: float) -> str:
    """MACs for people: `9.25M MACs`."""
    return f"{short_macs(macs)} MACs"


def format_cost(cost: float, unit: str) -> str:
    """A cost for people with its unit: `9.25M MACs`, or `1,337 us`."""
    return format_macs(cost) if unit == MACS else f"{cost:,.0f} us"


def short_macs(macs: float) -> str:
    """MACs where the unit stands elsewhere: `9.25M`."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if macs >= size:
            return f"{macs / size:.3g}{unit}"
    return f"{macs:.0f}"


def exact_macs(macs: float) -> str:
    """MACs so that they can be typed as a budget again."""
    return f"{macs:.0f}"


def _quantity(text: str) -> tuple[Decimal, str] | None:
    """`40M`, `40%` or `5ms` as a number and its unit ("macs", "%" or "ms"); None for any other text."""
    match = _PATTERN.fullmatch(text)
    if match is None:
        return None
    number, unit = Decimal(match["number"]), match["unit"]
    return (number, unit) if unit in ("%", "ms") else (number * _MULTIPLES[unit], "macs")
