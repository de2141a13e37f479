"""Options of a request: budget, deadline, last exit and receipts, from OIP parameters or a URL query."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mexit.errors import BadInput
from mexit.serving.request_body import short_repr

PARAMETERS = ("mexit_budget", "mexit_deadline_us", "mexit_max_exit", "mexit_receipts")
QUERY = ("budget", "deadline_ms", "max_exit", "receipts")
_BOOLEANS = {"true": True, "false": False}
_MAX_BUDGET_CHARACTERS = 64
_MAX_NUMBER = 10**12


@dataclass(frozen=True)
class Options:
    """Options of one request. None stands for the server's default.

    Attributes:
        budget: the budget as text; the runtime parses it, because a bundle may define budgets of its own.
        deadline_ms: milliseconds from the arrival of the request.
        max_exit: last exit that any row may reach, from 1.
        receipts: whether every prediction carries its receipt.
    """

    budget: str | None = None
    deadline_ms: float | None = None
    max_exit: int | None = None
    receipts: bool = False


def options_from_parameters(parameters: Mapping[str, Any]) -> Options:
    """Read the `parameters` of an inference request.

    `timeout` of the schedule policy extension is a deadline in microseconds too; 0 means none. The earlier
    deadline counts. Raises `BadInput`.
    """
    unknown = [name for name in parameters if name.startswith("mexit_") and name not in PARAMETERS]
    if unknown:
        raise BadInput(f"unknown parameter {short_repr(unknown[0])}: known are {', '.join(PARAMETERS)}")
    deadline_us = _positive_number("mexit_deadline_us", parameters.get("mexit_deadline_us"))
    timeout = parameters.get("timeout")
    timeout_us = None if timeout == 0 and timeout is not False else _positive_number("timeout", timeout)
    deadlines_ms = [microseconds / 1e3 for microseconds in (deadline_us, timeout_us) if microseconds is not None]
    max_exit = parameters.get("mexit_max_exit")
    is_integer = isinstance(max_exit, int) and not isinstance(max_exit, bool) and abs(max_exit) < _MAX_NUMBER
    if max_exit is not None and not is_integer:
        raise BadInput(f"mexit_max_exit must be a whole number, found {short_repr(max_exit)}")
    budget = _budget("mexit_budget", parameters.get("mexit_budget"))
    receipts = parameters.get("mexit_receipts", False)
    if not isinstance(receipts, bool):
        raise BadInput(f"mexit_receipts must be true or false, found {short_repr(receipts)}")
    return Options(budget, min(deadlines_ms, default=None), max_exit, receipts)


def options_from_query(query: Mapping[str, str]) -> Options:
    """Read a query such as `?budget=low&deadline_ms=5&max_exit=2&receipts=true`. Raises `BadInput`."""
    unknown = [name for name in query if name not in QUERY]
    if unknown:
        raise BadInput(f"unknown query {short_repr(unknown[0])}: known are {', '.join(QUERY)}")
    max_exit = query.get("max_exit")
    if max_exit is not None and not (max_exit.isascii() and max_exit.isdigit() and len(max_exit) < 10):
        raise BadInput(f"max_exit must be a whole number, found {short_repr(max_exit)}")
    deadline_ms = _positive_number("deadline_ms", _float_or_text(query.get("deadline_ms")))
    if (receipts := query.get("receipts", "false")) not in _BOOLEANS:
        raise BadInput(f"receipts must be true or false, found {short_repr(receipts)}")
    budget = _budget("budget", query.get("budget"))
    return Options(budget, deadline_ms, None if max_exit is None else int(max_exit), _BOOLEANS[receipts])


def _budget(name: str, value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > _MAX_BUDGET_CHARACTERS:
        limit = f"a string of at most {_MAX_BUDGET_CHARACTERS} characters"
        raise BadInput(f"{name} must be {limit}, found {short_repr(value)}")
    return value


def _positive_number(name: str, value: Any) -> float | None:
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < _MAX_NUMBER:  # false for NaN
        raise BadInput(f"{name} must be a number above zero, found {short_repr(value)}")
    return float(value)


def _float_or_text(text: str | None) -> float | str | None:
    try:
        return text if text is None else float(text)
    except ValueError:
        return text
