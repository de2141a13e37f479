"""What a request may ask for besides its answer: a budget, a deadline, a last exit, receipts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mexit.errors import BadInput
from mexit.serving.strict_json import shown

PARAMETERS = ("mexit_budget", "mexit_deadline_us", "mexit_max_exit", "mexit_receipts")
QUERY = ("budget", "deadline_ms", "max_exit", "receipts")
_TRUTH = {"true": True, "false": False}
_MAX_BUDGET_TEXT = 64
_FOREVER = 10**12  # microseconds: eleven days


@dataclass(frozen=True)
class Options:
    """Wishes of one request; None leaves the server's default.

    Attributes:
        budget: as sent; the runtime reads it, which knows the names of the bundle's own budgets.
        deadline_ms: from the arrival of the request.
        max_exit: no input goes further, from 1.
        receipts: whether each answer's cost is told in detail.
    """

    budget: str | None = None
    deadline_ms: float | None = None
    max_exit: int | None = None
    receipts: bool = False


def from_parameters(parameters: Mapping[str, Any]) -> Options:
    """From the `parameters` of an inference request.

    `timeout` of the schedule policy extension is a deadline too, 0 meaning none; the earlier one counts.
    """
    unknown = [name for name in parameters if name.startswith("mexit_") and name not in PARAMETERS]
    if unknown:
        raise BadInput(f"unknown parameter {shown(unknown[0])}: known are {', '.join(PARAMETERS)}")
    deadlines = [
        number / 1e3
        for name in ("mexit_deadline_us", "timeout")
        if (number := _number(name, parameters.get(name), zero=name == "timeout"))
    ]
    max_exit = parameters.get("mexit_max_exit")
    whole = isinstance(max_exit, int) and not isinstance(max_exit, bool) and abs(max_exit) < _FOREVER
    if max_exit is not None and not whole:
        raise BadInput(f"mexit_max_exit must be a whole number, found {shown(max_exit)}")
    budget = _budget("mexit_budget", parameters.get("mexit_budget"))
    receipts = parameters.get("mexit_receipts", False)
    if not isinstance(receipts, bool):
        raise BadInput(f"mexit_receipts must be true or false, found {shown(receipts)}")
    return Options(budget, min(deadlines, default=None), max_exit, receipts)


def from_query(query: Mapping[str, str]) -> Options:
    """From `?budget=low&deadline_ms=5&max_exit=2&receipts=true`."""
    unknown = [name for name in query if name not in QUERY]
    if unknown:
        raise BadInput(f"unknown query {shown(unknown[0])}: known are {', '.join(QUERY)}")
    max_exit = query.get("max_exit")
    if max_exit is not None and not (max_exit.isascii() and max_exit.isdigit() and len(max_exit) < 10):
        raise BadInput(f"max_exit must be a whole number, found {shown(max_exit)}")
    deadline_ms = _number("deadline_ms", _parsed(query.get("deadline_ms")))
    if (receipts := query.get("receipts", "false")) not in _TRUTH:
        raise BadInput(f"receipts must be true or false, found {shown(receipts)}")
    budget = _budget("budget", query.get("budget"))
    return Options(budget, deadline_ms, None if max_exit is None else int(max_exit), _TRUTH[receipts])


def _budget(name: str, value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > _MAX_BUDGET_TEXT:
        raise BadInput(f"{name} must be a string of at most {_MAX_BUDGET_TEXT} characters, found {shown(value)}")
    return value


def _number(name: str, value: Any, *, zero: bool = False) -> float | None:
    """A positive number, or zero where that is allowed; None stays None."""
    if value is None:
        return None
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not (0 < value < _FOREVER or (zero and value == 0)):  # NaN compares false
        raise BadInput(f"{name} must be a number above zero, found {shown(value)}")
    return float(value)


def _parsed(text: str | None) -> float | str | None:
    try:
        return text if text is None else float(text)
    except ValueError:
        return text
