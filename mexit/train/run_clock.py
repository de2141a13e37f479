"""The time of a run: the share of a run by the clock that is done, and the time that any run still takes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import pairwise

from mexit.train.config import TrainSettings

_FORWARD_SHARE = 0.4  # of the time of a training image that an image takes without a backward pass
_MOST_CLOSING = 0.5  # of a run by the clock


@dataclass
class RunClock:
    """Measures a run.

    Attributes:
        settings: settings of the run.
        exits: E, which `max-average` attacks one by one.
        train_images, selection_images: sizes of the two splits.
    """

    settings: TrainSettings
    exits: int
    train_images: int
    selection_images: int
    _start_s: float = field(default=0.0, init=False)
    _call_s: float = field(default=0.0, init=False)
    _call_progress: float = field(default=0.0, init=False)
    _call_samples: int = field(default=0, init=False)
    _validation_s: float | None = field(default=None, init=False)  # duration of the newest validation
    _validations_s: float = field(default=0.0, init=False)  # of all in this call

    def start(self, elapsed_s: float, progress: float, samples: int) -> None:
        """Start the measurement of one call.

        Args:
            elapsed_s: seconds that the run has taken in earlier calls.
            progress: fraction of the run that is done, in [0, 1].
            samples: samples processed in all epochs.
        """
        self._call_samples = samples
        self._call_s = time.monotonic()
        self._start_s = self._call_s - elapsed_s
        self._call_progress = progress

    def add_validation(self, seconds: float) -> None:
        """Record the duration of a validation."""
        self._validation_s = seconds
        self._validations_s += seconds

    def elapsed_s(self) -> float:
        """Seconds that the run has taken, in all calls together."""
        return time.monotonic() - self._start_s

    def share(self, samples: int) -> float:
        """The fraction of a run by the clock that is done, in [0, 1], so that its validation at the end fits in.

        Args:
            samples: samples processed in all epochs.
        """
        length_s = 60 * self.settings.minutes
        closing_s = min(self._closing_s(samples), _MOST_CLOSING * length_s)
        return min(1.0, self.elapsed_s() / (length_s - closing_s))

    def remaining_s(self, progress: float, samples: int, validations_left: int) -> float:
        """Seconds until the end of the run, validations included; 0 before the first step of a run by epochs.

        Args:
            progress: fraction of the run that is done, in [0, 1].
            samples: samples processed in all epochs.
            validations_left: epochs from here on that end with a validation; unused in a run by the clock.
        """
        if self.settings.minutes:
            return max(0.0, 60 * self.settings.minutes - self.elapsed_s())
        done = self._work(progress) - self._work(self._call_progress)
        if done <= 0:
            return 0.0
        steps_s = time.monotonic() - self._call_s - self._validations_s
        validation_s = self._per_validation_image_s(samples) * self.selection_images
        rest_s = steps_s * (self._work(1.0) - self._work(progress)) / done
        return rest_s + (validations_left - 1) * validation_s + self._closing_s(samples)

    def _closing_s(self, samples: int) -> float:
        """Seconds of the last validation and of BatchNorm's statistics."""
        images = self.selection_images + min(self.settings.recompute_norms, self.train_images)
        return images * self._per_validation_image_s(samples)

    def _per_validation_image_s(self, samples: int) -> float:
        if self._validation_s is not None:
            return self._validation_s / max(1, self.selection_images)
        share = _FORWARD_SHARE if self.settings.attack == "none" else 1.0
        in_call = samples - self._call_samples
        return share * (time.monotonic() - self._call_s) / in_call if in_call else 0.0

    def _work(self, progress: float) -> float:
        """Passes through the network for each image, up to this fraction of the run: the attack may grow."""
        points = sorted({0.0, self.settings.short_attack_until, self.settings.average_attack_until, 1.0})
        return sum(max(0.0, min(progress, stop) - start) * self._passes(start) for start, stop in pairwise(points))

    def _passes(self, progress: float) -> float:
        attack = self.settings.training_attack(progress)
        if attack is None:
            return 3.0
        attacked_exits = self.exits if attack.target_exits == "max-average" else 1
        return 6.0 + 2.0 * attack.pgd.steps * attack.pgd.restarts * attacked_exits
