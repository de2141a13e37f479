"""What a rate limiter allows: so many MACs a second, and so many at once; as typed and as numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from mexit.core.budget import MAX_MACS, MULTIPLES, exact_macs, format_macs
from mexit.errors import UsageError

Macs = int | float | str
_PATTERN = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[kMG]?)")


@dataclass(frozen=True)
class RateLimit:
    """One token bucket's size and refill.

    Attributes:
        rate: MACs a second.
        burst: MACs that can be saved up, and spent at once.
    """

    rate: int
    burst: int


@dataclass(frozen=True)
class RateLimits:
    """What all clients together may spend, and each of them; None is without bound."""

    overall: RateLimit | None = None
    client: RateLimit | None = None


def read_rate_limits(
    cumulative_macs: Sequence[int],
    rate: Macs | None = None,
    burst: Macs | None = None,
    client_rate: Macs | None = None,
    client_burst: Macs | None = None,
) -> RateLimits:
    """Read what was typed for a network with these cumulative costs, (E,).

    Rates are MACs a second, bursts MACs: `40M`, `1.5G`, `800k`, `2000000`. A burst that is not given is one
    second's worth, or one image through the whole network where that is more.

    Raises:
        UsageError: no number, a burst without its rate, or one that some segment could never be run with.
    """
    return RateLimits(
        _rate_limit("rate", "burst", rate, burst, cumulative_macs),
        _rate_limit("client rate", "client burst", client_rate, client_burst, cumulative_macs),
    )


def segment_macs(cumulative_macs: Sequence[int]) -> tuple[int, ...]:
    """Cost of each segment alone, (E,)."""
    return tuple(cost - before for before, cost in zip((0, *cumulative_macs), cumulative_macs, strict=False))


def parse_macs(value: Macs, what: str) -> int:
    """A number of MACs as typed, without rounding on the way. Raises `UsageError`."""
    match = _PATTERN.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is not None:
        number = Fraction(match["number"]) * MULTIPLES[match["unit"]]
    elif isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= MAX_MACS:
        number = Fraction(value)
    else:
        raise UsageError(f"a {what} is a number of MACs such as 800k, 40M or 1.5G, found '{value}'")
    if not 1 <= number <= MAX_MACS:
        raise UsageError(f"a {what} lies between 1 and {MAX_MACS:.0e} MACs, found '{value}'")
    return int(number)


def _rate_limit(
    rate_name: str, burst_name: str, rate: Macs | None, burst: Macs | None, cumulative_macs: Sequence[int]
) -> RateLimit | None:
    if rate is None:
        if burst is not None:
            flag = f"--{rate_name.replace(' ', '-')}"
            raise UsageError(f"a {burst_name} refills at a {rate_name}: give {flag} too, in MACs a second")
        return None
    per_second = parse_macs(rate, rate_name)
    at_once = max(per_second, cumulative_macs[-1]) if burst is None else parse_macs(burst, burst_name)
    dearest = max(segment_macs(cumulative_macs))
    if at_once < dearest:
        raise UsageError(
            f"a {burst_name} of {format_macs(at_once)} is less than the dearest segment costs, which could then "
            f"never be run: give at least {exact_macs(dearest)}"
        )
    return RateLimit(per_second, at_once)
