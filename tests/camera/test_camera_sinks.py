"""What is written: annotated video with the time stamps of its source, whole JSON lines, nothing torn."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from camera_media import grey_frames, prediction, read_video, write_images, write_video
from numpy.typing import NDArray

from mexit.camera import fonts, video_writer
from mexit.camera.overlay import Overlay, _percent
from mexit.camera.pipeline import STILL_S, CameraPrediction
from mexit.camera.sinks import JsonLines
from mexit.camera.video_writer import Clock, VideoWriter, enlarged, even
from mexit.errors import Damaged, MexitError, MissingExtra, UsageError
from mexit.flows.camera import camera

COSTS = (250, 600, 1000)


def result(time_s: float | None = 0.0, captured_s: float = 0.0, **changes: Any) -> CameraPrediction:
    base = prediction(**changes)
    return CameraPrediction(
        **vars(base), source="s", frame_index=0, time_s=time_s, captured_s=captured_s, age_ms=1.0, dropped=0
    )


def annotate(path: Path, frames: list[NDArray[np.uint8]], times: list[float | None], live: bool = False) -> None:
    sink = VideoWriter(path, Overlay(COSTS), live=live)
    for i, (frame, time_s) in enumerate(zip(frames, times, strict=True)):
        sink.write(frame, result(time_s, captured_s=i / 10))
    assert sink.close() == path


def test_irregular_time_stamps_are_kept(tmp_path: Path) -> None:
    times = [0.2, 0.28, 0.36, 0.9, 0.901, 1.5, 4.0]
    annotate(tmp_path / "a.mp4", grey_frames(7, (320, 400)), list(times))
    found, frames = read_video(tmp_path / "a.mp4")
    assert found == pytest.approx(times, abs=1e-5)
    assert frames[0].shape == (320, 400, 3)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"


def test_the_picture_beside_the_panel_is_that_of_the_source(tmp_path: Path) -> None:
    frame = np.zeros((400, 600, 3), np.uint8)
    frame[200:, :200], frame[200:, 200:400], frame[200:, 400:] = (220, 30, 40), (30, 200, 60), (40, 60, 210)
    annotate(tmp_path / "a.mp4", [frame] * 3, [0.0, 0.1, 0.2])
    shown = read_video(tmp_path / "a.mp4")[1][1]
    for column in (100, 300, 500):
        np.testing.assert_allclose(shown[300, column], frame[300, column], atol=12)


@pytest.mark.parametrize("size", [(321, 401), (37, 53), (1, 1), (500, 3)])
def test_odd_and_tiny_frames(tmp_path: Path, size: tuple[int, int]) -> None:
    annotate(tmp_path / "a.mp4", grey_frames(3, size), [0.0, 0.1, 0.2])
    times, frames = read_video(tmp_path / "a.mp4")
    assert len(times) == 3
    assert min(frames[0].shape[:2]) >= 24
    assert frames[2][-1, -1].min() > 200
    assert frames[0][-1, -1].max() < 50


def test_enlarging_is_by_whole_factors() -> None:
    frame = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    large = enlarged(frame)
    assert large.shape == (320, 480, 3)
    np.testing.assert_array_equal(large[::160, ::160], frame)
    assert enlarged(np.zeros((320, 400, 3), np.uint8)).shape == (320, 400, 3)
    assert even(np.zeros((3, 5, 3), np.uint8)).shape == (4, 6, 3)


def test_frames_of_another_size_are_fitted_into_the_first(tmp_path: Path) -> None:
    frames = [np.full((320, 640, 3), 200, np.uint8), np.full((640, 640, 3), 200, np.uint8)]
    annotate(tmp_path / "a.mp4", frames, [0.0, 0.1])
    shown = read_video(tmp_path / "a.mp4")[1]
    assert {frame.shape for frame in shown} == {(320, 640, 3)}
    assert shown[1][300, 320].min() > 180
    assert shown[1][300, 620].max() < 40


def test_images_last_a_while_each(tmp_path: Path) -> None:
    annotate(tmp_path / "a.mp4", grey_frames(3, (320, 320)), [None, None, None])
    assert read_video(tmp_path / "a.mp4")[0] == pytest.approx([0, STILL_S, 2 * STILL_S], abs=1e-5)


def ticks(live: bool, *frames: tuple[float | None, float]) -> list[float]:
    clock = Clock(live=live)
    return [round(clock.tick(result(*frame)) / video_writer.TICKS, 3) for frame in frames]


def test_the_clock_of_files_goes_on_where_the_next_file_starts_again() -> None:
    assert ticks(False, (0.2, 9), (0.3, 9), (0.0, 9), (0.1, 9)) == [0.2, 0.3, 0.4, 0.5]
    assert ticks(False, (0.0, 9), (0.1, 9), (None, 9), (0.0, 9)) == [0.0, 0.1, 0.6, 1.1]
    assert ticks(False, (5000.0, 9), (5000.5, 9)) == [0.0, 0.5]
    assert ticks(False, (0.0, 9), (3600.0, 9)) == [0.0, 3600.0]


def test_the_clock_of_a_live_stream_is_put_right_by_the_time_of_arrival() -> None:
    assert ticks(True, (70.0, 1.0), (70.1, 1.13), (70.3, 1.3)) == [0.0, 0.1, 0.3]
    # The camera restarted 20 s later, and its stamps with it.
    assert ticks(True, (70.0, 1.0), (70.1, 1.1), (0.0, 21.1), (0.1, 21.2)) == [0.0, 0.1, 20.1, 20.2]
    assert ticks(True, (None, 5.0), (None, 5.25)) == [0.0, 0.25]


def test_equal_time_stamps_still_rise() -> None:
    clock = Clock(live=False)
    found = [clock.tick(result(stamp)) for stamp in (0.0, 0.0, 0.0, 0.000001)]
    assert found == sorted(set(found))


def test_an_existing_video_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"the old one")
    sink = VideoWriter(path, Overlay(COSTS), live=False)
    for i, frame in enumerate(grey_frames(80, (320, 320))):
        sink.write(frame, result(i / 10))
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
        camera(
            digits_bundle,
            source=str(tmp_path / "bad.mp4"),
            budget="low",
            out=tmp_path / "a.mp4",
            jsonl=tmp_path / "a.jsonl",
        )
    assert {entry.name for entry in tmp_path.iterdir()} == {"bad.mp4", "a.mp4", "a.jsonl"}
    assert (tmp_path / "a.mp4").read_text() == (tmp_path / "a.jsonl").read_text() == "earlier"


def test_a_disk_that_is_full_is_an_error_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.mp4").write_text("earlier")
    sink = VideoWriter(tmp_path / "a.mp4", Overlay(COSTS), live=False)
    sink.write(grey_frames(1, (320, 320))[0], result(0.0))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sink, "_container", type("Full", (), {"mux": full, "close": full})())
    with pytest.raises(MexitError, match=r"could not write .*a.mp4: No space left on device"):
        sink.write(grey_frames(1, (320, 320))[0], result(0.1))
    assert sink.close() is None
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("a.mp4", "earlier")]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_json_lines_on_a_full_disk() -> None:
    sink = JsonLines(Path("/dev/full"))
    with pytest.raises(MexitError, match="could not write /dev/full: No space left on device"):
        sink.write(grey_frames(1)[0], result())


def test_json_lines_are_there_as_soon_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.jsonl"
    sink = JsonLines(path)
    assert not path.parent.exists()
    for i in range(3):
        sink.write(grey_frames(1)[0], result(i / 3, label="größer"))
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) == i + 1
    assert json.loads(lines[2]) == {
        "index": 0,
        "label": "größer",
        "confidence": 0.9,
        "probabilities": [0.9, 0.1],
        "exit": 1,
        "reason": "confident",
        "macs": 250,
        "saved_macs": 750,
        "latency_ms": 1.0,
        "budget": "low",
        "receipt": None,
        "source": "s",
        "frame_index": 0,
        "time_s": 0.666667,
        "captured_s": 0.0,
        "age_ms": 1.0,
        "dropped": 0,
    }
    assert sink.close() == path


def test_another_ending_than_mp4_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"must end in \.mp4"):
        VideoWriter(tmp_path / "a.avi", Overlay(COSTS), live=False)


def test_a_build_without_an_encoder_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(video_writer, "ENCODERS", ("libnothing",))
    with pytest.raises(MissingExtra, match=r"no H.264 encoder .*pip install .*mexit\[camera\]"):
        VideoWriter(tmp_path / "a.mp4", Overlay(COSTS), live=False)


@pytest.mark.parametrize("grey", [0, 127, 255])
@pytest.mark.parametrize("size", [(320, 320), (432, 768), (1080, 1920)])
def test_the_panel_can_be_read_on_any_picture(grey: int, size: tuple[int, int]) -> None:
    frame = np.full((*size, 3), grey, np.uint8)
    shown = Overlay(COSTS).draw(frame, result(label="traffic light"))
    assert shown.shape == frame.shape
    assert (frame == grey).all(), "the caller's frame was drawn into"
    changed = (shown != grey).any(axis=2)
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    light = (shown[rows[0] : rows[-1], columns[0] : columns[-1]] / 255.0) ** 2.2
    panel = light @ [0.2126, 0.7152, 0.0722]
    text, ground = np.quantile(panel, 0.995), np.median(panel)
    assert (text + 0.05) / (ground + 0.05) > 4.5  # WCAG's contrast for text
    assert panel.size < 0.45 * frame[..., 0].size


def test_the_panel_says_what_happened() -> None:
    overlay, font = Overlay(COSTS), _Wide()
    assert overlay._lines(result(), font, 1000) == ["exit 1 of 3  ·  25% of full cost (250 of 1k)"]
    assert overlay._lines(result(reason="deadline"), font, 40) == ["exit 1 of 3 (deadline)", "25% of full cost"]


class _Wide:
    def getlength(self, text: str) -> float:
        return float(len(text))


def test_a_label_that_is_too_long_is_cut() -> None:
    frame = np.zeros((320, 320, 3), np.uint8)
    shown = Overlay(COSTS).draw(frame, result(label="a very long label " * 10))
    assert not shown[:, -4:].any()


def test_labels_of_other_languages_are_never_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fonts.fitting("stop sign", 20) == ("stop sign", fonts.default(20))
    box = fonts._drawn(fonts.default(20), "\U0010ffff")
    assert fonts._drawn(fonts.default(20), "ß") == box, "this font knows more than ASCII now"
    monkeypatch.setattr(fonts, "SYSTEM_FONTS", ("no such font.ttf",))
    fonts.fitting.cache_clear()
    assert fonts.fitting("Zebra größer, façade", 20)[0] == "Zebra gro?er, facade"
    fonts.fitting.cache_clear()


@pytest.mark.parametrize(("share", "shown"), [(0.42, "42%"), (0.994, "99%"), (0.9991, ">99%"), (1.0, "100%")])
def test_confidence_is_not_rounded_up_to_certainty(share: float, shown: str) -> None:
    assert _percent(share) == shown


@pytest.mark.parametrize(
    ("out", "jsonl", "words"),
    [
        ("a.mp4", "a.mp4", "cannot both be written"),
        ("in.mp4", None, "is the source"),
        (None, "folder", "is a folder"),
    ],
)
def test_outputs_that_would_destroy_something_are_refused(
    digits_bundle: Path, tmp_path: Path, out: str | None, jsonl: str | None, words: str
) -> None:
    (tmp_path / "folder").mkdir()
    source = write_video(tmp_path / "in.mp4", grey_frames(2), [0.0, 0.1])
    with pytest.raises(UsageError, match=words):
        camera(
            digits_bundle,
            source=str(source),
            budget="low",
            out=tmp_path / out if out else None,
            jsonl=tmp_path / jsonl if jsonl else None,
        )


def test_several_images_of_different_sizes_make_one_video(digits_bundle: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "a", ["1.png"], size=(30, 20))
    write_images(tmp_path / "a", ["2.png"], size=(700, 1100))
    camera(digits_bundle, source=str(tmp_path / "a"), budget="low", out=tmp_path / "a.mp4")
    times, frames = read_video(tmp_path / "a.mp4")
    assert times == pytest.approx([0.0, STILL_S])
    assert {frame.shape for frame in frames} == {(480, 320, 3)}
