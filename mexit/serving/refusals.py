"""Refusing costs the server something too: a client that is refused all the time hears of it at a bounded pace.

Whoever is refused at once can ask again at once, and reading what it sends takes processor time from everybody
else (benchmarks/rate_limiter.py). Held back a little, it has to hold as many connections as it wants refusals.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

PER_S = 20.0
AT_ONCE = 10  # refusals in a row that come without delay
MOST_S = 1.0
_MOST_CLIENTS = 4096


class RefusalPace:
    """When to send refusals. For one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._due_s: dict[str, float] = {}  # by client: when the last of `AT_ONCE` is used up

    async def hold(self, client: str) -> None:
        """Return when it is time to refuse this client once more."""
        await asyncio.sleep(self.delay_s(client))

    def delay_s(self, client: str) -> float:
        """Seconds to hold this refusal back, at most `MOST_S`; it is counted."""
        now_s = self._clock()
        if len(self._due_s) >= _MOST_CLIENTS:
            self._due_s = {one: due_s for one, due_s in self._due_s.items() if due_s > now_s}
        due_s = max(now_s, self._due_s.get(client, now_s)) + 1 / PER_S
        self._due_s[client] = min(due_s, now_s + AT_ONCE / PER_S + MOST_S)
        return min(MOST_S, max(0.0, due_s - now_s - AT_ONCE / PER_S))
