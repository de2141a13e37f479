"""The steady label: a weighted vote over the last answers, and hysteresis.

Each of the last `window` answers votes for its label with its confidence as the weight; an unsure answer does not
vote. The label with the most votes *leads*; without votes "unsure" leads. The steady label changes when another label
has led without interruption and `hold` answers of that time had this label.

This is the weighted plurality vote of classifier ensembles (L. I. Kuncheva, Combining Pattern Classifiers, 2nd
edition, Wiley 2014, section 4.3), with the last frames in place of the classifiers.
"""

from __future__ import annotations

from collections import deque

from mexit.errors import UsageError

MOST_ANSWERS = 10_000  # that vote: the votes are counted for every answer


def check_votes(window: int, hold: int) -> None:
    """Check the arguments of `Votes`. Raises `UsageError`."""
    for name, value in (("votes", window), ("hold", hold)):
        if value < 1:
            raise UsageError(f"{name} must be at least 1, found {value}")
        if value > MOST_ANSWERS:
            raise UsageError(f"{name} must be at most {MOST_ANSWERS}, found {value}")


class Votes:
    """The steady label of one camera. Not thread-safe.

    Attributes:
        steady: the steady label; None before the first one, and while it is unsure.
    """

    def __init__(self, window: int = 1, hold: int = 1) -> None:
        """Votes before the first answer. With `window` 1 and `hold` 1 the steady label is that of the last answer.

        Args:
            window: number of last answers that vote, from 1 to `MOST_ANSWERS`.
            hold: number of answers with another label, while that label leads, until the steady label changes; from 1
                to `MOST_ANSWERS`.

        Raises:
            UsageError: a number out of its range.
        """
        check_votes(window, hold)
        self.steady: str | None = None
        self._answers: deque[tuple[str | None, float]] = deque(maxlen=window)
        self._window, self._hold = window, hold
        self._rival: str | None = None
        self._led = 0

    @property
    def delay_frames(self) -> int:
        """The stated delay: `window + hold - 2` answers.

        If all answers from one frame on have the same label and are sure, the steady label is that label at most this
        number of answers after that frame, whatever the confidences are: with the `window`-th of these answers every
        vote is for the label, so it leads, and after `hold - 1` more it has led for `hold` of them.
        """
        return self._window + self._hold - 2

    @property
    def settled(self) -> bool:
        """Whether the last answer agrees with the steady label, so that repeating the answer changes nothing."""
        return bool(self._answers) and self._answers[-1][0] == self.steady

    def update(self, label: str | None, confidence: float) -> str | None:
        """Count an answer; return the steady label after it.

        Args:
            label: the label of the answer; None if it is unsure.
            confidence: its calibrated probability, in (0, 1].
        """
        self._answers.append((label, confidence))
        leader = self._leader()
        if leader == self.steady:
            self._led = 0
            return self.steady
        if leader != self._rival:
            self._rival, self._led = leader, 0
        if label == leader:  # so a single sure answer among unsure ones counts once, however long it leads
            self._led += 1
        if self._led >= self._hold:
            self.steady, self._led = leader, 0
        return self.steady

    def _leader(self) -> str | None:
        """The label with the most votes; None without votes, and the steady label if two labels have the most."""
        votes: dict[str, float] = {}
        for label, confidence in self._answers:
            if label is not None:
                votes[label] = votes.get(label, 0.0) + confidence
        if not votes:
            return None
        first, *others = sorted(votes, key=lambda label: -votes[label])
        return self.steady if others and votes[others[0]] == votes[first] else first
