"""Region, trigger, reused answers and votes in the path of a frame."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from camera_media import camera_prediction, prediction, read_video, write_images, write_video
from command_line import typed
from numpy.typing import NDArray
from PIL import Image

from mexit import Runtime
from mexit.camera.frame import RGB, Counters
from mexit.camera.region import Region
from mexit.camera.steady import SteadyAnswers, SteadySettings
from mexit.camera.triggers import TriggerSettings
from mexit.commands.camera import LabelChanges
from mexit.errors import Damaged, Overloaded
from mexit.runtime.prediction import Prediction

REUSE = TriggerSettings(reuse=True)
STILL = np.full((32, 32, 3), 90, np.uint8)


@pytest.fixture
def runtime(digits_bundle: Path) -> Runtime:
    """A runtime whose statistics count the frames of one test."""
    return Runtime.open(digits_bundle, "medium")


@pytest.fixture
def digit_video(test_digits: tuple[NDArray[np.uint8], NDArray[np.int64]], tmp_path: Path) -> Path:
    """50 frames, 25 per second: the right half is a digit, another one from frame 30 on; the left half is grey."""
    frames = []
    for number in range(50):
        digit = Image.fromarray(test_digits[0][int(number >= 30)]).resize((64, 64), Image.Resampling.NEAREST)
        frames.append(np.hstack([np.full((64, 64), 128, np.uint8), np.asarray(digit)])[..., None].repeat(3, axis=2))
    return write_video(tmp_path / "digits.mp4", frames, [i / 25 for i in range(50)])


def answering(*answers: Prediction) -> Callable[[object], Prediction]:
    """A network that gives these answers, one per call."""
    remaining = iter(answers)
    return lambda _: next(remaining)


def reasons(steps: SteadyAnswers, classify: Callable[[object], Prediction], frames: list[RGB]) -> list[str | None]:
    """The reason of the answer of each frame, 0.1 s apart; None for a frame that is left out."""
    found = [steps.answer(frame, frame, number / 10, classify) for number, frame in enumerate(frames)]
    return [None if answer is None else answer[0].reason for answer in found]


def test_the_network_sees_the_region(runtime: Runtime, digit_video: Path) -> None:
    region = Region(0.5, 0, 0.5, 1)
    for frame, answer in runtime.camera(str(digit_video), steady=SteadySettings(region=region)):
        assert frame.shape == (64, 128, 3), "the whole picture is shown"
        [expected] = runtime(frame[:, 64:])
        assert np.array_equal(answer.probabilities, expected.probabilities)


def test_an_unchanged_picture_has_the_answer_before_it_and_costs_nothing(runtime: Runtime, digit_video: Path) -> None:
    counters = Counters()
    answers = [
        answer
        for _, answer in runtime.camera(str(digit_video), counters=counters, steady=SteadySettings(trigger=REUSE))
    ]
    ran = [answer for answer in answers if answer.reason != "reused"]
    assert {answer.frame_index for answer in ran} >= {0, 30}
    assert len(answers) == 50
    assert len(ran) < 10
    assert runtime.stats.snapshot().predictions == len(ran)
    assert sum(answer.macs for answer in answers) == runtime.stats.snapshot().macs
    for before, answer in pairwise(answers):
        if answer.reason == "reused":
            assert (answer.label, answer.confidence, answer.exit) == (before.label, before.confidence, before.exit)
            assert (answer.macs, answer.saved_macs) == (0, runtime.bundle.manifest.costs.static)
    assert (counters.arrived, counters.dropped) == (50, 0)


def test_an_interval_of_a_recording_follows_its_timestamps(runtime: Runtime, digit_video: Path) -> None:
    counters, trigger = Counters(), TriggerSettings(run="interval", interval_s=0.5)
    answers = [
        answer
        for _, answer in runtime.camera(str(digit_video), counters=counters, steady=SteadySettings(trigger=trigger))
    ]
    assert [answer.time_s for answer in answers] == pytest.approx([0.0, 0.52, 1.0, 1.52])
    assert counters.left_out == counters.dropped == 50 - len(answers)
    assert [answer.dropped for answer in answers] == [answer.frame_index - i for i, answer in enumerate(answers)]


def test_motion_answers_the_frames_that_change(runtime: Runtime, digit_video: Path) -> None:
    steady = SteadySettings(trigger=TriggerSettings(run="motion", motion=0.02))
    answers = [answer.frame_index for _, answer in runtime.camera(str(digit_video), steady=steady)]
    assert answers == [0, 30]


def test_a_region_outside_the_picture_is_an_error(runtime: Runtime, digit_video: Path) -> None:
    messages: list[str] = []
    steady = SteadySettings(region=Region(500, 0, 10, 10))
    with pytest.raises(Damaged, match="the region 500,0,10,10 lies outside the picture of 128 x 64 pixels"):
        list(runtime.camera(str(digit_video), steady=steady, on_event=messages.append))
    assert len(messages) == 1  # the same for all 50 frames


def test_an_answer_is_not_reused_before_the_votes_agree() -> None:
    """The picture changes once; three answers make the new label the steady one, and only then it is repeated."""
    steps = SteadyAnswers(SteadySettings(trigger=REUSE, votes=3, hold=2), live=True)
    a, b = prediction(label="a"), prediction(label="b")
    assert reasons(steps, answering(a, a), [STILL] * 4) == ["confident"] * 2 + ["reused"] * 2
    steps = SteadyAnswers(SteadySettings(trigger=REUSE, votes=3, hold=2), live=True)
    bright = STILL + np.uint8(80)
    found = [
        steps.answer(None, frame, n / 10, answering(b if frame is bright else a))
        for n, frame in enumerate([STILL] * 5 + [bright] * 6)
    ]
    assert [answer[1] for answer in found if answer is not None] == [None, *"aaaaaabbbb"]
    assert [answer[0].reason for answer in found[5:] if answer is not None] == ["confident"] * 3 + ["reused"] * 3


@pytest.mark.parametrize("reason", ["deadline", "rate-limit"])
def test_an_answer_that_came_too_early_is_not_reused(reason: str) -> None:
    steps = SteadyAnswers(SteadySettings(trigger=REUSE), live=True)
    answers = answering(prediction(reason=reason), prediction(), prediction())
    assert reasons(steps, answers, [STILL] * 4) == [reason, "confident", "reused", "reused"]


def test_a_reused_unsure_answer_stays_without_a_label() -> None:
    steps = SteadyAnswers(SteadySettings(trigger=REUSE), live=True)
    unsure = prediction(label=None, index=None, reason="unsure")
    steps.answer(STILL, STILL, 0.0, answering(unsure))
    answer = steps.answer(STILL, STILL, 0.1, answering())
    assert answer is not None
    assert (answer[0].reason, answer[0].label, answer[0].index, answer[1]) == ("reused", None, None, None)


def test_a_frame_that_the_rate_limiter_refuses_is_not_the_picture_to_compare_with() -> None:
    def refuse(_: object) -> Prediction:
        raise Overloaded("no tokens", retry_after_s=1.0)

    steps = SteadyAnswers(SteadySettings(trigger=REUSE), live=True)
    bright = STILL + np.uint8(80)
    assert reasons(steps, answering(prediction()), [STILL, STILL]) == ["confident", "reused"]
    with pytest.raises(Overloaded):
        steps.answer(bright, bright, 0.2, refuse)
    answer = steps.answer(bright, bright, 0.3, answering(prediction(label="b")))
    assert answer is not None
    assert answer[0].label == "b"


def test_the_command(digits_bundle: Path, digit_video: Path, tmp_path: Path) -> None:
    command = ("camera", digits_bundle, "--source", digit_video)
    steady = ("--region", "64,0,64,64", "--reuse", "--votes", 5, "--hold", 2)
    report = json.loads(typed(*command, *steady, "--out", tmp_path / "out.mp4", "--json").stdout)
    assert (report["frames"], report["dropped"]) == (50, 0)
    assert report["reused"] > 30
    outline = read_video(tmp_path / "out.mp4")[1][0][300, 325:330]  # five times as large as the source
    assert outline.min() > 180
    report = json.loads(typed(*command, "--run", "motion", "--json").stdout)
    assert report["frames"] + report["left_out"] == 50
    assert report["left_out"] == report["dropped"] > 40
    shown = " ".join(typed(*command, "--run", "interval", "--interval", 1).output.split())
    assert "left out by --run │ 48" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--region", "1,2"], "a region has 4 numbers, found 2"),
        (["--votes", 0], "votes must be at least 1, found 0"),
        (["--run", "sometimes"], "run must be every-frame, motion or interval, found sometimes"),
        (["--interval", 0], "interval must be above 0 seconds, found 0"),
    ],
)
def test_wrong_options(digits_bundle: Path, tmp_path: Path, options: list[object], message: str) -> None:
    write_images(tmp_path / "images", ["a.png"])
    run = typed("camera", digits_bundle, "--source", tmp_path / "images", *options)
    assert run.exit_code == 2
    assert message in " ".join(run.output.split())


def test_the_terminal_shows_changes_of_the_steady_label(capsys: pytest.CaptureFixture[str]) -> None:
    show = LabelChanges()
    for label, steady in [("a", None), ("a", "a"), ("b", "a"), (None, "a"), (None, None), ("b", None), ("b", "b")]:
        show(camera_prediction(label=label, steady=steady))
    assert [line.split(", ")[0] for line in capsys.readouterr().out.splitlines()] == [
        "frame 0: a",
        "frame 0: unsure at exit 1",
        "frame 0: b",
    ]
