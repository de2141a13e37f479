"""The time of an answer by the latency profile, beside that of the static network: what early exits save in time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mexit.runtime.prediction import Prediction
from mexit.runtime.runtime import Runtime


@dataclass(frozen=True)
class ProfileTimes:
    """Seconds of one image alone in its batch.

    Attributes:
        exits_s: of leaving at an exit, by the number of the exit.
        static_s: of the static network.
    """

    exits_s: Mapping[int, float]
    static_s: float

    @staticmethod
    def of(runtime: Runtime) -> ProfileTimes | None:
        """The times of a runtime's answers; None where budgets are in MACs, because nothing was measured then."""
        if runtime.timing is None:
            return None
        profile = runtime.timing.profile
        times = zip(runtime.bundle.manifest.numbers, profile.exits_us, strict=True)
        return ProfileTimes({number: us / 1e6 for number, us in times}, profile.static_us / 1e6)

    def seconds(self, prediction: Prediction) -> float:
        """The time of an answer; only the static network saves exactly no MACs."""
        return self.exits_s[prediction.exit] if prediction.saved_macs else self.static_s
