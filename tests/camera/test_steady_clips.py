"""Votes on two clips with noise and true label changes, answered by a trained network.

The clips show test digits, which the network was not trained with, in a noisy picture. Clip "noise": each frame has
its own strong noise. Clip "blur": the picture is out of focus, shakes and flickers for a few frames at a time, so that
wrong answers come in groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from camera_media import write_video
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from mexit import Runtime
from mexit.camera.frame import RGB
from mexit.camera.prediction import CameraPrediction
from mexit.camera.region import Region
from mexit.camera.steady import SteadySettings
from mexit.camera.votes import Votes

FPS = 25
REGION = Region(32, 16, 64, 64)
STEADY = SteadySettings(region=REGION, votes=9, hold=3)


@dataclass(frozen=True)
class Clip:
    """A video, and the true label of each frame."""

    path: Path
    labels: tuple[str, ...]

    @property
    def changes(self) -> list[int]:
        """The first frame of each true label."""
        return [i for i, label in enumerate(self.labels) if i == 0 or label != self.labels[i - 1]]


def picture(digit: NDArray[np.uint8], background: int) -> NDArray[np.float64]:
    """A digit, enlarged to 64 x 64 pixels, in the region of a grey picture, (96, 128, 3)."""
    large = np.asarray(Image.fromarray(digit).resize((64, 64), Image.Resampling.BICUBIC), float)
    whole = np.full((96, 128, 3), float(background))
    whole[16:80, 32:96] = large[..., None]
    return whole


def noise_frames(digits: list[NDArray[np.uint8]], rng: np.random.Generator) -> list[RGB]:
    """Coarse Gaussian noise, whose grain is that of the network's input, new in each frame."""
    frames = []
    for digit in digits:
        grain = rng.normal(0, 70, (12, 16, 1)).repeat(8, axis=0).repeat(8, axis=1)
        frames.append(np.clip(picture(digit, 60) + grain, 0, 255).astype(np.uint8))
    return frames


def blurred_frames(digits: list[NDArray[np.uint8]], rng: np.random.Generator) -> list[RGB]:
    """Fine noise; now and then three frames out of focus, displaced and darker or brighter."""
    frames, trouble = [], 0
    for digit in digits:
        trouble = trouble - 1 if trouble else 3 * (rng.random() < 0.08)
        image = picture(digit, 20)
        if trouble:
            blurred = Image.fromarray(image.astype(np.uint8)).filter(ImageFilter.GaussianBlur(rng.uniform(4, 9)))
            image = np.roll(np.asarray(blurred, float), rng.integers(-14, 15, 2), axis=(0, 1)) * rng.uniform(0.5, 1.6)
        frames.append(np.clip(image + rng.normal(0, 20, image.shape), 0, 255).astype(np.uint8))
    return frames


@pytest.fixture(scope="module")
def runtime(digits_bundle: Path) -> Runtime:
    """The trained network."""
    return Runtime.open(digits_bundle, "medium")


@pytest.fixture(scope="module", params=["noise", "blur"])
def clip(request, runtime, test_digits, tmp_path_factory) -> Clip:
    """400 frames; the true label changes every 24 to 60 frames, and the shown digit of that class every 12.

    Votes remove the errors that noise causes. Digits that the network takes for others even without noise are left out.
    """
    images, labels = test_digits
    right = np.array([answer.label for answer in runtime(list(images))]) == labels.astype(str)
    images, labels = images[right], labels[right]
    rng = np.random.default_rng(1)
    shown, true = [], []
    while len(true) < 400:
        label = int(rng.choice([k for k in range(10) if not true or str(k) != true[-1]]))
        for _ in range(rng.integers(2, 6)):
            shown += [images[rng.choice(np.flatnonzero(labels == label))]] * 12
            true += [str(label)] * 12
    frames = (noise_frames if request.param == "noise" else blurred_frames)(shown, rng)
    path = tmp_path_factory.mktemp("clips") / f"{request.param}.mp4"
    return Clip(write_video(path, frames, [i / FPS for i in range(len(frames))]), tuple(true))


@pytest.fixture(scope="module")
def answers(clip: Clip, runtime: Runtime) -> list[CameraPrediction]:
    """The answers of every frame."""
    return [answer for _, answer in runtime.camera(str(clip.path), steady=STEADY)]


def wrong_changes(clip: Clip, found: list[str | None]) -> int:
    """Changes of the label beyond one for each true change."""
    return sum(now != before for before, now in pairwise(found)) - (len(clip.changes) - 1)


def test_wrong_changes_fall_to_a_fifth_and_no_true_change_is_late_or_missed(
    clip: Clip, answers: list[CameraPrediction]
) -> None:
    labels, steady = [answer.label for answer in answers], [answer.steady for answer in answers]
    assert len(labels) == len(clip.labels)
    delay_frames = Votes(STEADY.votes, STEADY.hold).delay_frames
    delays = []
    for start, end in zip(clip.changes, [*clip.changes[1:], len(steady)], strict=True):
        assert clip.labels[start] in steady[start:end], f"the change at frame {start} was missed"
        delays.append(steady[start:end].index(clip.labels[start]))
    assert wrong_changes(clip, labels) >= 25, "the clip is hard enough"
    assert 5 * wrong_changes(clip, steady[delay_frames:]) <= wrong_changes(clip, labels)
    assert max(delays) <= delay_frames
