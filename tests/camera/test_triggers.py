"""Which frames run: motion above noise, intervals, unchanged pictures."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from numpy.typing import NDArray

from mexit.camera.frame import RGB
from mexit.camera.triggers import Trigger, TriggerSettings
from mexit.errors import UsageError

FPS = 10


def scene(height: int = 120, width: int = 160) -> NDArray[np.float64]:
    """A still scene with edges and gradients, grey levels (H, W, 3)."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([60 + 100 * x / width, 60 + 100 * y / height, 90 + 60 * ((x // 16 + y // 16) % 2)], axis=2)


def noisy(picture: NDArray[np.float64], sigma: float, seed: int) -> RGB:
    """The picture with Gaussian noise."""
    noise = np.random.default_rng(seed).normal(0, sigma, picture.shape) if sigma else 0
    return np.clip(np.rint(picture + noise), 0, 255).astype(np.uint8)


def with_square(picture: NDArray[np.float64], side: int, step: float, left: int = 50) -> NDArray[np.float64]:
    """The picture with a brighter square."""
    changed = picture.copy()
    changed[40 : 40 + side, left : left + side] += step
    return changed


def decisions(trigger: Trigger, frames: Iterable[RGB], start_s: float = 0.0, *, repeatable: bool = True) -> list[str]:
    """Decide about frames at `FPS`; those that run are answered."""
    found = []
    for number, frame in enumerate(frames):
        now_s = start_s + number / FPS
        found.append(trigger.should_run(frame, now_s))
        if found[-1] == "run":
            trigger.answered(now_s, repeatable=repeatable)
        elif found[-1] == "reuse":
            trigger.reused(now_s)
    return found


@pytest.mark.parametrize("sigma", [0.0, 2.0, 4.0])
def test_a_still_picture_reuses_its_answer_despite_noise(sigma: float) -> None:
    trigger = Trigger(TriggerSettings(reuse=True))
    decisions(trigger, [noisy(scene(), sigma, seed) for seed in range(70)])
    found = decisions(trigger, [noisy(scene(), sigma, seed) for seed in range(100, 190)], start_s=7.0)
    assert found.count("reuse") >= 87


@pytest.mark.parametrize("sigma", [0.0, 2.0, 4.0])
def test_a_small_change_runs(sigma: float) -> None:
    """A square of 0.1 % of the picture appears; then the picture stays as it is."""
    trigger = Trigger(TriggerSettings(reuse=True))
    decisions(trigger, [noisy(scene(), sigma, seed) for seed in range(70)])
    changed = with_square(scene(), 5, 60)
    found = decisions(trigger, [noisy(changed, sigma, seed) for seed in range(100, 110)], start_s=7.0)
    assert found[0] == "run"
    assert "reuse" in found[1:]


def test_a_change_of_colour_alone_runs() -> None:
    red, green = np.full((40, 40, 3), 50.0), np.full((40, 40, 3), 50.0)
    red[..., 0], green[..., 1] = 150, 150
    assert red.mean() == green.mean()
    trigger = Trigger(TriggerSettings(reuse=True))
    assert decisions(trigger, [noisy(picture, 0, 0) for picture in (red, red, green, green)]) == [
        "run",
        "reuse",
        "run",
        "reuse",
    ]


def test_slow_changes_add_up() -> None:
    """Each frame is one grey level brighter, less than any frame differs from the one before by noise."""
    trigger = Trigger(TriggerSettings(reuse=True))
    found = decisions(trigger, [noisy(scene() + level, 0, 0) for level in range(20)])
    assert found.count("run") >= 3


def test_an_answer_is_reused_for_a_limited_time() -> None:
    trigger = Trigger(TriggerSettings(reuse=True, reuse_s=2.0))
    still = noisy(scene(), 0, 0)
    assert [i for i, found in enumerate(decisions(trigger, [still] * 60)) if found == "run"] == [0, 20, 40]


def test_motion_runs_and_stillness_is_left_out() -> None:
    trigger = Trigger(TriggerSettings(run="motion", motion=0.01, reuse_s=100.0))
    decisions(trigger, [noisy(scene(), 2, seed) for seed in range(70)])
    still = decisions(trigger, [noisy(scene(), 2, seed) for seed in range(100, 120)], start_s=7.0)
    assert still == ["skip"] * 20
    moving = [noisy(with_square(scene(), 30, 80, left), 2, left) for left in range(10, 110, 10)]
    assert decisions(trigger, moving, start_s=9.0) == ["run"] * 10
    small = [noisy(with_square(scene(), 5, 80, 100), 2, 7)] * 2  # 0.1 % of the picture
    decisions(trigger, [noisy(scene(), 2, 3)], start_s=10.0)
    assert decisions(trigger, small, start_s=10.1) == ["skip", "skip"]


def test_a_picture_that_moves_all_the_time_is_not_called_still() -> None:
    """The level of the noise follows such a picture only up to its bound."""
    trigger = Trigger(TriggerSettings(run="motion", reuse=True))
    rng = np.random.default_rng(0)
    blocks = [
        rng.integers(100, 150, (6, 8, 3)).astype(np.uint8).repeat(10, axis=0).repeat(10, axis=1) for _ in range(200)
    ]
    assert set(decisions(trigger, blocks)) == {"run"}


def test_one_frame_per_interval() -> None:
    still = noisy(scene(40, 40), 0, 0)
    trigger = Trigger(TriggerSettings(run="interval", interval_s=0.5, reuse=False))
    assert decisions(trigger, [still] * 15) == (["run"] + ["skip"] * 4) * 3
    trigger = Trigger(TriggerSettings(run="interval", interval_s=0.5, reuse=True))
    assert decisions(trigger, [still] * 15) == ["run"] + ["skip"] * 4 + (["reuse"] + ["skip"] * 4) * 2


def test_intervals_keep_their_rhythm() -> None:
    """Frames every 0.1 s do not turn intervals of 0.25 s into 0.3 s; after a gap the rhythm starts again."""
    still = noisy(scene(40, 40), 0, 0)
    trigger = Trigger(TriggerSettings(run="interval", interval_s=0.25, reuse=False))
    assert decisions(trigger, [still] * 100).count("run") == 40
    assert decisions(trigger, [still] * 4, start_s=60.0) == ["run", "skip", "skip", "run"]


def test_a_frame_without_an_answer_does_not_count() -> None:
    """The rate limiter had no tokens: the next frame runs, in every mode."""
    still = noisy(scene(40, 40), 0, 0)
    for settings in (TriggerSettings(run="interval"), TriggerSettings(run="motion"), TriggerSettings(reuse=True)):
        trigger = Trigger(settings)
        assert [trigger.should_run(still, now_s) for now_s in (0.0, 0.1, 0.2)] == ["run"] * 3


def test_an_answer_that_may_not_be_repeated() -> None:
    still = noisy(scene(40, 40), 0, 0)
    for settings in (TriggerSettings(run="motion"), TriggerSettings(reuse=True)):
        trigger = Trigger(settings)
        assert decisions(trigger, [still] * 3, repeatable=False) == ["run"] * 3
        assert decisions(trigger, [still] * 2, start_s=0.3)[1] != "run"


def test_another_size_of_picture_runs() -> None:
    trigger = Trigger(TriggerSettings(reuse=True))
    large, small = noisy(scene(120, 160), 0, 0), noisy(scene(60, 80), 0, 0)
    assert decisions(trigger, [large, large, small, small, large]) == ["run", "reuse", "run", "reuse", "run"]


def test_the_next_recording_of_a_folder_runs() -> None:
    still = noisy(scene(40, 40), 0, 0)
    trigger = Trigger(TriggerSettings(run="interval", interval_s=1.0, reuse=True))
    decisions(trigger, [still] * 25)
    assert decisions(trigger, [still] * 12, start_s=0.0) == ["run"] + ["skip"] * 9 + ["reuse", "skip"]


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (1, 2000), (1081, 1921), (65, 3)])
def test_every_size_of_picture_works(size: tuple[int, int]) -> None:
    trigger = Trigger(TriggerSettings(reuse=True))
    picture = np.full((*size, 3), 100, np.uint8)
    changed = picture.copy()
    changed[-1 - size[0] // 64 :, -1 - size[1] // 64 :] = 255  # a cell in the last corner
    assert decisions(trigger, [picture, picture, changed, changed]) == ["run", "reuse", "run", "reuse"]


def test_reuse_is_for_live_sources_by_default() -> None:
    still = noisy(scene(40, 40), 0, 0)
    assert decisions(Trigger(TriggerSettings(), live=True), [still] * 3) == ["run", "reuse", "reuse"]
    assert decisions(Trigger(TriggerSettings(), live=False), [still] * 3) == ["run"] * 3
    assert decisions(Trigger(TriggerSettings(reuse=False), live=True), [still] * 3) == ["run"] * 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"run": "often"}, "run must be every-frame, motion or interval, found often"),
        ({"interval_s": 0.0}, "interval must be above 0 seconds, found 0"),
        ({"reuse_s": float("nan")}, "reuse_s must be above 0 seconds"),
        ({"motion": 1.0}, "motion must be a share of the picture"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TriggerSettings(**settings)
