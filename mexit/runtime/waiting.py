"""What waits for a segment: cohorts, by client, by segment and by deadline, each in order."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Any

from mexit.runtime.cohort import Cohort


class Waiting:
    """Cohorts that wait, and meanwhile must not change. For one thread at a time.

    Clients take turns; a cohort takes the turn of any of its clients. Of one client's cohorts the most urgent goes
    first; of equally urgent ones the furthest, which finishes work sooner.
    """

    def __init__(self) -> None:
        self._since: dict[Cohort, int] = {}  # serial numbers: among equals, whoever came first
        self._of: dict[str, list[Any]] = {}  # the client whose turn it is comes first
        self._before: dict[int, list[Any]] = {}
        self._ending: list[Any] = []
        self._serial = 0

    def __len__(self) -> int:
        return len(self._since)

    @property
    def clients(self) -> int:
        """For whom something waits."""
        return len(self._of)

    def put(self, cohort: Cohort) -> None:
        """Let it wait for its next segment."""
        cohort.reckon()
        self._serial += 1
        since = self._since[cohort] = self._serial
        for client, due_s in cohort.due_s.items():
            insort(self._of.setdefault(client, []), (due_s, -cohort.k, since, cohort))
        insort(self._before.setdefault(cohort.k, []), (cohort.first_due_s, since, cohort))
        if cohort.deadline_s != cohort.first_due_s:
            insort(self._ending, (cohort.deadline_s, since, cohort))

    def remove(self, cohort: Cohort) -> None:
        """It waits no longer."""
        since = self._since.pop(cohort)
        for client, due_s in cohort.due_s.items():
            own = self._of[client]
            del own[bisect_left(own, (due_s, -cohort.k, since))]
            if not own:
                del self._of[client]
        before = self._before[cohort.k]
        del before[bisect_left(before, (cohort.first_due_s, since))]
        if cohort.deadline_s != cohort.first_due_s:
            del self._ending[bisect_left(self._ending, (cohort.deadline_s, since))]

    def turn(self) -> list[Cohort]:
        """The cohorts of the client whose turn it is, in order."""
        return [place[-1] for place in next(iter(self._of.values()), ())]

    def take(self) -> Cohort | None:
        """The most urgent cohort of the client whose turn it is; that client is then behind all others."""
        if not self._of:
            return None
        client = next(iter(self._of))
        lead: Cohort = self._of[client][0][-1]
        self.remove(lead)
        if client in self._of:
            self._of[client] = self._of.pop(client)
        return lead

    def before(self, k: int) -> list[Cohort]:
        """Those that wait for segment `k`, the most urgent first."""
        return [place[-1] for place in self._before.get(k, ())]

    def ending(self) -> Iterator[Iterator[Cohort]]:
        """All cohorts, in rows of which each is in the order of deadlines, but for those without one.

        Nothing may be put or removed meanwhile.
        """
        yield (place[-1] for place in self._ending)
        for before in self._before.values():
            yield (place[-1] for place in before if place[-1].deadline_s == place[0])

    def all(self) -> list[Cohort]:
        """Whatever waits."""
        return list(self._since)

    def weight(self, cohort: Cohort) -> float:
        """Clients count alike, however many cohorts of theirs wait: the weights of all that waits sum to them."""
        return sum([1 / max(1, len(self._of.get(client, ()))) for client in cohort.due_s])

    def to_come(self, cohort: Cohort) -> float:
        """The weight of those that will come while a cohort runs: clients of which more waits send more."""
        return float(sum([client in self._of for client in cohort.due_s]))
