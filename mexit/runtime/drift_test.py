"""Has the data changed? A sequential test that may look after every observation.

A small share of inputs that left early also runs to the last exit. While the data is like the certification data,
their rate of disagreement is at most p0. A gambler bets against that: a disagreement multiplies his wealth by
1 + stake (1 - p0), an agreement by 1 - stake p0. While the rate is at most p0 his wealth is a supermartingale, so
by Ville's inequality it ever reaches 1/alpha with probability at most alpha, however long one watches.

Several gamblers share the starting capital of 1, which keeps that property: with small and large stakes, so that
small and large shifts are found, and a new generation every so often, so that a shift after a long calm, which
ruins those before, is found too.
"""

from __future__ import annotations

from dataclasses import dataclass

from mexit.errors import UsageError

STAKES = (0.02, 0.05, 0.1, 0.2, 0.4)  # shares of 1 / p0, the largest stake that cannot lose everything
GENERATION = 250  # observations between two generations
LOWEST_RATE = 1e-4


@dataclass
class DriftTest:
    """One test of "the rate is at most p0".

    Attributes:
        p0: the rate below which data like the certification data stays.
        alpha: the probability of ever raising a false alarm.
        observations, disagreements: so far.
        alarm: whether it was ever raised.
    """

    p0: float
    alpha: float = 0.01
    observations: int = 0
    disagreements: int = 0
    alarm: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.p0 < 1 or not 0 < self.alpha < 1:
            raise UsageError(f"a rate and an alarm level must lie in [0, 1), found {self.p0} and {self.alpha}")
        rate = max(self.p0, LOWEST_RATE)
        self._gain = [1 + share / rate * (1 - rate) for share in STAKES]
        self._wealth = [0.0] * len(STAKES)

    def observe(self, disagreed: bool) -> bool:
        """Add one observation; returns whether the alarm was raised, now or before."""
        if self.alarm:
            return True
        if self.observations % GENERATION == 0:
            self._start_generation()
        self.observations += 1
        self.disagreements += disagreed
        for place, share in enumerate(STAKES):
            self._wealth[place] *= self._gain[place] if disagreed else 1 - share
        self.alarm = sum(self._wealth) >= 1 / self.alpha
        return self.alarm

    def _start_generation(self) -> None:
        """The i-th generation brings a capital of 1/(i (i + 1)), all of them together 1.

        Gamblers with the same stake win and lose alike, whenever they started: only their sum has to be kept.
        """
        place = self.observations // GENERATION + 1
        for stake in range(len(STAKES)):
            self._wealth[stake] += 1 / (place * (place + 1) * len(STAKES))
