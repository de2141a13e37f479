"""Steady answers of one camera: region of interest, trigger, reused answers and votes, in this order."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from mexit.camera.frame import RGB
from mexit.camera.region import Region
from mexit.camera.triggers import Trigger, TriggerSettings
from mexit.camera.votes import Votes, check_votes
from mexit.runtime.prediction import POLICY_REASONS, REUSED, UNSURE, Prediction


@dataclass(frozen=True)
class SteadySettings:
    """What happens to the frames of a camera before and after the network.

    Attributes:
        region: the part of the picture that is classified; None: the whole picture.
        trigger: which frames run through the network.
        votes: number of last answers that vote for the steady label, from 1 to 10,000.
        hold: number of answers after which another label that leads becomes the steady one, from 1 to 10,000.
    """

    region: Region | None = None
    trigger: TriggerSettings = field(default_factory=TriggerSettings)
    votes: int = 1
    hold: int = 1

    def __post_init__(self) -> None:
        check_votes(self.votes, self.hold)


class SteadyAnswers:
    """The steps of one camera, with their state. Not thread-safe."""

    def __init__(self, settings: SteadySettings, *, live: bool) -> None:
        """The steps before the first frame.

        Args:
            settings: their settings.
            live: whether the source is live, which reuses answers unless the settings say otherwise.
        """
        self._region = settings.region
        self._trigger = Trigger(settings.trigger, live=live)
        self._votes = Votes(settings.votes, settings.hold)
        self._last: Prediction | None = None

    @property
    def delay_frames(self) -> int:
        """The stated delay: answers after a change of all answers until the steady label changes too, at most."""
        return self._votes.delay_frames

    def answer(
        self, image: Any, rgb: RGB, now_s: float, classify: Callable[[Any], Prediction]
    ) -> tuple[Prediction, str | None] | None:
        """Answer a frame.

        Args:
            image: the frame as the runtime takes it.
            rgb: the frame, (H, W, 3) uint8.
            now_s: its time, seconds: by the timestamps of a recording, else its arrival.
            classify: runs the network on `image`, or on the region of `rgb`. Its errors are raised.

        Returns:
            The answer and the steady label after it; None for a frame that the trigger leaves out.

        Raises:
            BadInput: the region lies outside the picture.
        """
        start_s = time.perf_counter()
        region = rgb if self._region is None else self._region.crop(rgb)
        decision = self._trigger.should_run(region, now_s)
        if decision == "skip":
            return None
        if decision == "reuse" and self._last is not None:
            self._trigger.reused(now_s)
            return self._vote(reuse(self._last, (time.perf_counter() - start_s) * 1e3))
        self._last = classify(image if self._region is None else region)
        answer = self._vote(self._last)
        # With more time or tokens the same picture would get another answer, and votes need answers until they agree.
        final = self._last.reason in (*POLICY_REASONS, "max-exit", UNSURE)
        self._trigger.answered(now_s, repeatable=final and self._votes.settled)
        return answer

    def _vote(self, prediction: Prediction) -> tuple[Prediction, str | None]:
        return prediction, self._votes.update(prediction.label, prediction.confidence)


def reuse(prediction: Prediction, latency_ms: float) -> Prediction:
    """The answer for a frame with an unchanged picture: nothing ran for it, so it costs no MACs and has no receipt."""
    saved_macs = prediction.macs + prediction.saved_macs
    return replace(prediction, reason=REUSED, macs=0, saved_macs=saved_macs, latency_ms=latency_ms, receipt=None)
