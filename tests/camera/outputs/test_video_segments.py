"""Annotated video in segments."""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from camera_media import camera_prediction, grey_frames, read_video, write_video

from mexit.camera.outputs.output_names import FILE_TIME
from mexit.camera.outputs.video_segments import VideoSegments
from mexit.camera.overlay import Overlay
from mexit.errors import MexitError, UsageError
from mexit.flows.camera import CameraOptions, run_camera

START = datetime(2026, 1, 31, tzinfo=timezone.utc)
OVERLAY = Overlay((1, 2, 3), (250, 600, 1000))


def segments(path: Path, **settings: float) -> VideoSegments:
    times = iter(START + timedelta(seconds=i) for i in range(1000))
    return VideoSegments(path, OVERLAY, live=False, now=lambda: next(times), **{"segment_s": 1.0, **settings})


def write(output: VideoSegments, count: int) -> None:
    """Frames at 0, 0.25, 0.5 s, ..."""
    for i, frame in enumerate(grey_frames(count, (320, 320))):
        output.write(frame, camera_prediction(i / 4))


def test_segments_hold_every_frame_once(tmp_path: Path) -> None:
    output = segments(tmp_path / "gate.mp4")
    write(output, 12)
    assert output.close() == tmp_path / "gate-*.mp4"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"gate-20260131T00000{i}.000Z.mp4" for i in range(3)]
    videos = [read_video(tmp_path / name) for name in names]
    assert [len(times) for times, _ in videos] == [5, 5, 2]
    brightness = [frame[-1, -1].mean() for _, frames in videos for frame in frames]
    assert brightness == sorted(brightness)


def test_two_segments_of_one_moment_have_two_names(tmp_path: Path) -> None:
    output = VideoSegments(tmp_path / "a.mp4", OVERLAY, live=False, segment_s=0.5, now=lambda: START)
    write(output, 6)
    output.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a-20260131T000000.000Z.mp4",
        "a-20260131T000000.001Z.mp4",
    ]


def test_the_quota_removes_the_oldest_segments(tmp_path: Path) -> None:
    (tmp_path / "gate-old.mp4").write_text("another file")
    (tmp_path / "gate-20250131T000000.000Z.mp4").write_bytes(bytes(100_000))
    output = segments(tmp_path / "gate.mp4", max_mb=0.02)
    write(output, 12)
    output.close()
    kept = sorted(path.name for path in tmp_path.iterdir() if path.name != "gate-old.mp4")
    assert "gate-20250131T000000.000Z.mp4" not in kept
    assert kept[-1] == "gate-20260131T000002.000Z.mp4"
    assert (tmp_path / "gate-old.mp4").exists()


def test_a_segment_that_cannot_be_finished_ends_the_run(tmp_path: Path) -> None:
    output = segments(tmp_path / "gate.mp4")
    write(output, 5)
    (tmp_path / "gate-20260131T000000.000Z.mp4").mkdir()
    with pytest.raises(MexitError, match=r"could not finish .*gate-20260131T000000.000Z.mp4"):
        output.close()


def test_without_a_frame_nothing_is_written(tmp_path: Path) -> None:
    assert segments(tmp_path / "new" / "gate.mp4").close() is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("a.mp4", {"segment_s": 0.0}, "a segment lasts more than 0 seconds"),
        ("a.avi", {}, "must end in .mp4"),
        ("a.mp4", {"max_mb": 0.0}, "a quota is a number of MB above 0"),
    ],
)
def test_bad_settings(tmp_path: Path, name: str, settings: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        segments(tmp_path / name, **settings)


def test_a_run_writes_segments(digits_bundle: Path, tmp_path: Path) -> None:
    video = write_video(tmp_path / "in.mp4", grey_frames(8), [i / 4 for i in range(8)])
    report = run_camera(digits_bundle, str(video), CameraOptions(out=tmp_path / "out" / "a.mp4", segment_s=1.0))
    assert report.outputs == (tmp_path / "out" / "a-*.mp4",)
    written = sorted((tmp_path / "out").iterdir())
    assert all(re.fullmatch(f"a-{FILE_TIME}.mp4", path.name) for path in written)
    assert [len(read_video(path)[0]) for path in written] == [5, 3]
