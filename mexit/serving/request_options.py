"""Options of a request from OIP parameters or a URL query: budget, deadline, last exit and receipts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mexit.errors import BadInput
from mexit.runtime.request import RequestOptions
from mexit.serving.request_body import short_repr

PARAMETERS = ("mexit_budget", "mexit_deadline_us", "mexit_max_exit", "mexit_receipts")
QUERY = ("budget", "deadline_ms", "max_exit", "receipts")
UNLOAD_PARAMETERS = ("unload_dependents",)  # of Triton's clients; bundles have no dependents
_BOOLEANS = {"true": True, "false": False}
_MAX_BUDGET_CHARACTERS = 64
_MAX_NUMBER = 10**12


def options_from_parameters(parameters: Mapping[str, Any]) -> RequestOptions:
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
    return _options("mexit_", parameters, min(deadlines_ms, default=None))


def options_from_query(query: Mapping[str, str]) -> RequestOptions:
    """Read a query such as `?budget=low&deadline_ms=5&max_exit=2&receipts=true`. Raises `BadInput`."""
    unknown = [name for name in query if name not in QUERY]
    if unknown:
        raise BadInput(f"unknown query {short_repr(unknown[0])}: known are {', '.join(QUERY)}")
    values: dict[str, Any] = dict(query)
    max_exit, receipts = query.get("max_exit", ""), query.get("receipts", "")
    if max_exit.isascii() and max_exit.isdigit() and len(max_exit) < 10:
        values["max_exit"] = int(max_exit)
    if receipts in _BOOLEANS:
        values["receipts"] = _BOOLEANS[receipts]
    return _options("", values, _positive_number("deadline_ms", _float_or_text(query.get("deadline_ms"))))


def budget_from_query(query: Mapping[str, str]) -> str | None:
    """Read a query that holds a budget at most, such as `?budget=low`. Raises `BadInput`."""
    unknown = [name for name in query if name != "budget"]
    if unknown:
        raise BadInput(f"unknown query {short_repr(unknown[0])}: known are model, budget")
    options_from_query(query)
    return query.get("budget")


def check_load_parameters(names: Iterable[str], known: Sequence[str]) -> None:
    """Raise `BadInput` for a parameter of a load or unload that is not known, such as Triton's `config`."""
    if unknown := [name for name in names if name not in known]:
        raise BadInput(f"the parameter {short_repr(unknown[0])} is not supported: a model is loaded as it is on disk")


def _options(prefix: str, values: Mapping[str, Any], deadline_ms: float | None) -> RequestOptions:
    """Check the other options; `prefix` is that of their names. The runtime parses the budget."""
    budget, max_exit = values.get(f"{prefix}budget"), values.get(f"{prefix}max_exit")
    receipts = values.get(f"{prefix}receipts", False)
    if max_exit is not None and (type(max_exit) is not int or abs(max_exit) >= _MAX_NUMBER):
        raise BadInput(f"{prefix}max_exit must be a whole number, found {short_repr(max_exit)}")
    if budget is not None and (not isinstance(budget, str) or len(budget) > _MAX_BUDGET_CHARACTERS):
        limit = f"a string of at most {_MAX_BUDGET_CHARACTERS} characters"
        raise BadInput(f"{prefix}budget must be {limit}, found {short_repr(budget)}")
    if not isinstance(receipts, bool):
        raise BadInput(f"{prefix}receipts must be true or false, found {short_repr(receipts)}")
    return {"budget": budget, "deadline_ms": deadline_ms, "max_exit": max_exit, "receipts": receipts}


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
