"""Annotated video: timestamps of the source, sizes, and complete files only."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pytest
from camera_media import camera_prediction, file_limit, grey_frames, read_video, write_images, write_video
from numpy.typing import NDArray

from mexit.camera.outputs.video_writer import TICKS_PER_S, Timestamps, VideoWriter, enlarge, pad_to_even
from mexit.camera.overlay import Overlay
from mexit.camera.pipeline import IMAGE_DURATION_S
from mexit.errors import Damaged, MexitError, MissingExtra, UsageError
from mexit.flows.camera import CameraOptions, run_camera

COSTS = (250, 600, 1000)


def write_all(sink: VideoWriter, frames: Sequence[NDArray[np.uint8]]) -> None:
    for i, frame in enumerate(frames):
        sink.write(frame, camera_prediction(i / 10))


def annotate(path: Path, frames: list[NDArray[np.uint8]], times: list[float | None]) -> None:
    sink = VideoWriter(path, Overlay((1, 2, 3), COSTS), live=False)
    for i, (frame, time_s) in enumerate(zip(frames, times, strict=True)):
        sink.write(frame, camera_prediction(time_s, captured_s=i / 10))
    assert sink.close() == path


def test_irregular_timestamps_are_kept(tmp_path: Path) -> None:
    times = [0.2, 0.28, 0.36, 0.9, 0.901, 1.5, 4.0]
    annotate(tmp_path / "a.mp4", grey_frames(7, (320, 400)), list(times))
    written, frames = read_video(tmp_path / "a.mp4")
    assert written == pytest.approx(times, abs=1e-5)
    assert frames[0].shape == (320, 400, 3)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"


def test_pixels_outside_the_panel_are_those_of_the_source(tmp_path: Path) -> None:
    frame = np.zeros((400, 600, 3), np.uint8)
    frame[200:, :200], frame[200:, 200:400], frame[200:, 400:] = (220, 30, 40), (30, 200, 60), (40, 60, 210)
    annotate(tmp_path / "a.mp4", [frame] * 3, [0.0, 0.1, 0.2])
    written = read_video(tmp_path / "a.mp4")[1][1]
    for column in (100, 300, 500):
        np.testing.assert_allclose(written[300, column], frame[300, column], atol=12)


@pytest.mark.parametrize("size", [(321, 401), (37, 53), (1, 1), (500, 3)])
def test_odd_and_tiny_frames(tmp_path: Path, size: tuple[int, int]) -> None:
    annotate(tmp_path / "a.mp4", grey_frames(3, size), [0.0, 0.1, 0.2])
    times, frames = read_video(tmp_path / "a.mp4")
    assert len(times) == 3
    assert min(frames[0].shape[:2]) >= 24
    assert frames[2][-1, -1].min() > 200
    assert frames[0][-1, -1].max() < 50


def test_small_frames_are_enlarged_by_a_whole_factor() -> None:
    frame = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    large = enlarge(frame)
    assert large.shape == (320, 480, 3)
    np.testing.assert_array_equal(large[::160, ::160], frame)
    assert enlarge(np.zeros((320, 400, 3), np.uint8)).shape == (320, 400, 3)
    assert pad_to_even(np.zeros((3, 5, 3), np.uint8)).shape == (4, 6, 3)


def test_frames_of_another_size_are_fitted_into_the_first(tmp_path: Path) -> None:
    frames = [np.full((320, 640, 3), 200, np.uint8), np.full((640, 640, 3), 200, np.uint8)]
    annotate(tmp_path / "a.mp4", frames, [0.0, 0.1])
    written = read_video(tmp_path / "a.mp4")[1]
    assert {frame.shape for frame in written} == {(320, 640, 3)}
    assert written[1][300, 320].min() > 180
    assert written[1][300, 620].max() < 40


def test_the_duration_of_images(tmp_path: Path) -> None:
    annotate(tmp_path / "a.mp4", grey_frames(3, (320, 320)), [None, None, None])
    expected = [0, IMAGE_DURATION_S, 2 * IMAGE_DURATION_S]
    assert read_video(tmp_path / "a.mp4")[0] == pytest.approx(expected, abs=1e-5)


def timestamps(live: bool, *frames: tuple[float | None, float]) -> list[float]:
    """Written timestamps of frames with the given timestamps and arrivals, seconds."""
    writer = Timestamps(live=live)
    return [round(writer.next(camera_prediction(*frame)) / TICKS_PER_S, 3) for frame in frames]


def test_timestamps_of_files_continue_over_the_next_file() -> None:
    assert timestamps(False, (0.2, 9), (0.3, 9), (0.0, 9), (0.1, 9)) == [0.2, 0.3, 0.4, 0.5]
    assert timestamps(False, (0.0, 9), (0.1, 9), (None, 9), (0.0, 9)) == [0.0, 0.1, 0.6, 1.1]
    assert timestamps(False, (5000.0, 9), (5000.5, 9)) == [0.0, 0.5]
    assert timestamps(False, (0.0, 9), (3600.0, 9)) == [0.0, 3600.0]


def test_timestamps_of_live_streams_are_corrected_by_the_arrival() -> None:
    assert timestamps(True, (70.0, 1.0), (70.1, 1.13), (70.3, 1.3)) == [0.0, 0.1, 0.3]
    # The camera restarted 20 s later, and so did its timestamps.
    assert timestamps(True, (70.0, 1.0), (70.1, 1.1), (0.0, 21.1), (0.1, 21.2)) == [0.0, 0.1, 20.1, 20.2]
    assert timestamps(True, (None, 5.0), (None, 5.25)) == [0.0, 0.25]


def test_equal_timestamps_increase() -> None:
    writer = Timestamps(live=False)
    ticks = [writer.next(camera_prediction(time_s)) for time_s in (0.0, 0.0, 0.0, 0.000001)]
    assert ticks == sorted(set(ticks))


def test_an_earlier_video_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"the old one")
    sink = VideoWriter(path, Overlay((1, 2, 3), COSTS), live=False)
    write_all(sink, grey_frames(80, (320, 320)))
    assert path.read_bytes() == b"the old one"
    assert [entry.name for entry in tmp_path.iterdir() if entry != path] == [f".a.mp4.tmp-{os.getpid()}"]
    assert sink.close() == path
    assert len(read_video(path)[0]) == 80
    assert list(tmp_path.iterdir()) == [path]
    assert sink.close() is None


def test_without_a_frame_nothing_is_written(digits_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.mp4").write_text("no video")
    for name in ("a.mp4", "a.jsonl"):
        (tmp_path / name).write_text("earlier")
    with pytest.raises(Damaged):
        run_camera(
            digits_bundle,
            str(tmp_path / "bad.mp4"),
            CameraOptions(out=tmp_path / "a.mp4", jsonl=tmp_path / "a.jsonl"),
        )
    assert {entry.name for entry in tmp_path.iterdir()} == {"bad.mp4", "a.mp4", "a.jsonl"}
    assert (tmp_path / "a.mp4").read_text() == (tmp_path / "a.jsonl").read_text() == "earlier"


def test_a_write_error_leaves_the_earlier_video(tmp_path: Path) -> None:
    """The system refuses to let the file grow beyond 40 kB."""
    (tmp_path / "a.mp4").write_text("earlier")
    noise = list(np.random.default_rng(0).integers(0, 256, (100, 320, 320, 3), np.uint8))
    sink = VideoWriter(tmp_path / "a.mp4", Overlay((1, 2, 3), COSTS), live=False)
    with file_limit(40_000):
        with pytest.raises(MexitError, match=r"could not write .*a.mp4: File too large"):
            write_all(sink, noise)
        assert sink.close() is None
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("a.mp4", "earlier")]


def test_a_folder_that_is_replaced_by_a_file(tmp_path: Path) -> None:
    sink = VideoWriter(tmp_path / "folder" / "a.mp4", Overlay((1, 2, 3), COSTS), live=False)
    write_all(sink, grey_frames(2))
    shutil.rmtree(tmp_path / "folder")
    (tmp_path / "folder").write_text("a file")
    with pytest.raises(MexitError, match=r"could not finish .*a.mp4: Not a directory"):
        sink.close()


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"must end in \.mp4"):
        VideoWriter(tmp_path / "a.avi", Overlay((1, 2, 3), COSTS), live=False)


def test_a_missing_encoder(tmp_path: Path) -> None:
    with pytest.raises(MissingExtra, match=r"no H.264 encoder .*libnothing.*pip install .*mexit\[camera\]"):
        VideoWriter(tmp_path / "a.mp4", Overlay((1, 2, 3), COSTS), live=False, encoders=("libnothing",))


@pytest.mark.parametrize(
    ("out", "jsonl", "message"),
    [
        ("a.mp4", "a.mp4", "cannot both be written"),
        ("in.mp4", None, "is the source"),
        (None, "folder", "is a folder"),
    ],
)
def test_outputs_that_would_overwrite_something(
    digits_bundle: Path, tmp_path: Path, out: str | None, jsonl: str | None, message: str
) -> None:
    (tmp_path / "folder").mkdir()
    source = write_video(tmp_path / "in.mp4", grey_frames(2), [0.0, 0.1])
    with pytest.raises(UsageError, match=message):
        run_camera(
            digits_bundle,
            str(source),
            CameraOptions(out=tmp_path / out if out else None, jsonl=tmp_path / jsonl if jsonl else None),
        )


def test_images_of_different_sizes_make_one_video(digits_bundle: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "a", ["1.png"], size=(30, 20))
    write_images(tmp_path / "a", ["2.png"], size=(700, 1100))
    run_camera(digits_bundle, str(tmp_path / "a"), CameraOptions(out=tmp_path / "a.mp4"))
    times, frames = read_video(tmp_path / "a.mp4")
    assert times == pytest.approx([0.0, IMAGE_DURATION_S])
    assert {frame.shape for frame in frames} == {(480, 320, 3)}
