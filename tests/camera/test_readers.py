"""Files: every frame in order with its timestamp, damaged frames counted, unreadable files explained."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from camera_media import grey_frames, read_video, slow_runtime, write_images, write_video
from numpy.typing import NDArray
from PIL import Image

from mexit.camera.frame import Counters
from mexit.camera.pipeline import classify_frames
from mexit.errors import BadInput, Damaged, MexitError, MissingExtra, NotFound
from mexit.flows.camera import CameraOptions, run_camera
from mexit.runtime import Runtime

Digits = tuple[NDArray[np.uint8], NDArray[np.int64]]


def times_with_gaps(count: int, fps: float = 12.5) -> list[float]:
    """A steady rate with a gap after every seventh frame, as of a camera that drops frames."""
    gaps = np.cumsum([0.137 if i % 7 == 6 else 0.0 for i in range(count)])
    return [0.24 + i / fps + float(gap) for i, gap in enumerate(gaps)]


def test_frames_of_a_video_are_answered_like_images(digits_bundle: Path, test_digits: Digits, tmp_path: Path) -> None:
    images = test_digits[0][:300]
    large = [np.repeat(np.kron(image, np.ones((16, 16), np.uint8))[..., None], 3, axis=2) for image in images]
    times = times_with_gaps(300)
    video = write_video(tmp_path / "digits.mp4", large, times)
    results = []
    report = run_camera(digits_bundle, str(video), CameraOptions(jsonl=tmp_path / "a.jsonl"), on_result=results.append)
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    predictions = Runtime.open(digits_bundle, budget="low")(list(images))
    same = [line["label"] == prediction.label for line, prediction in zip(lines, predictions, strict=True)]
    assert np.mean(same) >= 0.97
    assert [line["frame_index"] for line in lines] == list(range(300))
    assert [line["time_s"] for line in lines] == pytest.approx(times, abs=1e-5)
    assert all(line["dropped"] == 0 and line["source"] == str(video) for line in lines)
    captured = [line["captured_s"] for line in lines]
    assert captured == sorted(captured)
    assert (report.frames, report.dropped, report.undecodable) == (300, 0, 0)
    assert report.exits == tuple(sum(result.exit == k for result in results) for k in (1, 2, 3))
    assert report.mean_macs == pytest.approx(np.mean([result.macs for result in results]))
    assert 0 < report.saved < 1
    assert report.age_ms is not None
    assert report.age_ms["p50"] <= report.age_ms["p95"]


def test_images_of_a_folder_are_answered_like_their_files(
    digits_bundle: Path, test_digits: Digits, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i, image in enumerate(test_digits[0][:12]):
        Image.fromarray(image).resize((33, 21), Image.Resampling.BICUBIC).save(folder / f"digit{i}.png")
    runtime = Runtime.open(digits_bundle, budget="full")
    for i, (frame, result) in enumerate(classify_frames(runtime, str(folder))):
        content = (folder / f"digit{i}.png").read_bytes()
        np.testing.assert_array_equal(result.probabilities, runtime(content)[0].probabilities)
        assert (result.source, result.frame_index) == (str(folder / f"digit{i}.png"), i)
        assert result.time_s is None
        assert frame.shape == (21, 33, 3)
        assert frame.flags.writeable
    assert i == 11


def test_a_glob_mixes_images_and_videos(tmp_path: Path) -> None:
    write_images(tmp_path, ["a1.png", "a3.png"])
    write_video(tmp_path / "a2.mp4", grey_frames(3), [0.0, 0.1, 0.2])
    results = [result for _, result in classify_frames(slow_runtime(), f"{tmp_path}/a*")]
    assert [Path(result.source).name for result in results] == ["a1.png", "a2.mp4", "a2.mp4", "a2.mp4", "a3.png"]
    assert [result.frame_index for result in results] == [0, 1, 2, 3, 4]
    assert [result.time_s for result in results] == [None, 0.0, 0.1, 0.2, None]


def test_a_glob_skips_an_unreadable_file(tmp_path: Path) -> None:
    for name in ("1.mp4", "3.mp4"):
        write_video(tmp_path / name, grey_frames(2), [0.0, 0.1])
    (tmp_path / "2.mp4").write_text("no video")
    events: list[str] = []
    counters = Counters()
    answers = classify_frames(slow_runtime(), f"{tmp_path}/*.mp4", on_event=events.append, counters=counters)
    assert [result.frame_index for _, result in answers] == [0, 1, 3, 4]
    assert counters.undecodable == 1
    assert "2.mp4 is no video" in events[0]


def test_a_glob_skips_a_file_that_is_removed_while_others_are_read(tmp_path: Path) -> None:
    for name in ("1.mp4", "2.mp4", "3.mp4"):
        write_video(tmp_path / name, grey_frames(2), [0.0, 0.1])
    events: list[str] = []
    counters = Counters()
    answers = classify_frames(slow_runtime(), f"{tmp_path}/*.mp4", on_event=events.append, counters=counters)
    next(answers)
    (tmp_path / "2.mp4").unlink()
    assert [result.frame_index for _, result in answers] == [1, 3, 4]
    assert counters.undecodable == 1
    assert "2.mp4 does not exist; the file is skipped" in events[0]


def test_one_pixel(digits_bundle: Path, tmp_path: Path) -> None:
    write_images(tmp_path, ["dot.png"], size=(1, 1))
    report = run_camera(digits_bundle, str(tmp_path / "dot.png"), CameraOptions(out=tmp_path / "dot.mp4"))
    assert report.frames == 1
    times, frames = read_video(tmp_path / "dot.mp4")
    assert times == [0.0]
    assert frames[0].shape == (320, 320, 3)


@pytest.mark.parametrize(("mode", "colour"), [("L", 200), ("LA", (200, 255)), ("RGBA", (9, 8, 7, 0)), ("I;16", 51400)])
def test_images_of_other_modes_are_shown_as_rgb(tmp_path: Path, mode: str, colour: object) -> None:
    if mode == "I;16":
        Image.fromarray(np.full((2, 3), colour, np.uint16)).save(tmp_path / "a.png")
    else:
        Image.new(mode, (3, 2), colour).save(tmp_path / "a.png")
    [(frame, _)] = classify_frames(slow_runtime(), str(tmp_path / "a.png"))
    assert frame.shape == (2, 3, 3)
    assert frame[0, 0].tolist() == ([0, 0, 0] if mode == "RGBA" else [200, 200, 200])


def test_an_odd_sized_video(tmp_path: Path) -> None:
    video = write_video(tmp_path / "odd.mkv", grey_frames(4, (33, 47)), [0, 0.1, 0.2, 0.3], pix_fmt="yuv444p")
    frames = [frame for frame, _ in classify_frames(slow_runtime(), str(video))]
    assert [frame.shape for frame in frames] == [(33, 47, 3)] * 4
    assert [round(float(frame.mean())) for frame in frames] == pytest.approx([0, 85, 170, 255], abs=3)


def test_audio_is_ignored(tmp_path: Path) -> None:
    video = write_video(tmp_path / "loud.mp4", grey_frames(10), [i / 10 for i in range(10)], audio=True)
    with av.open(str(video)) as container:
        assert container.streams.audio
    assert [result.frame_index for _, result in classify_frames(slow_runtime(), str(video))] == list(range(10))


@pytest.mark.skipif(not hasattr(av.VideoStream, "set_display_rotation"), reason="needs PyAV 18 to write one")
def test_a_rotated_video_is_upright(tmp_path: Path) -> None:
    frame = np.zeros((64, 96, 3), np.uint8)
    frame[:16, -16:] = 255  # top right; a quarter turn counterclockwise brings it to the top left
    video = write_video(tmp_path / "phone.mp4", [frame] * 2, [0, 0.1], rotation=90)
    upright = next(iter(classify_frames(slow_runtime(), str(video))))[0]
    assert upright.shape == (96, 64, 3)
    assert upright[4, 4].min() > 200
    assert upright[4, -4].max() < 50


def noisy_frames(count: int) -> list[NDArray[np.uint8]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (64, 64, 3), np.uint8) for _ in range(count)]


def test_a_truncated_video(tmp_path: Path) -> None:
    times = [i / 10 for i in range(40)]
    video = write_video(tmp_path / "cut.mp4", noisy_frames(40), times, movflags="+faststart")
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    events: list[str] = []
    counters = Counters()
    answers = classify_frames(slow_runtime(), str(video), on_event=events.append, counters=counters)
    results = [result for _, result in answers]
    assert 15 <= len(results) < 25
    assert [result.time_s for result in results] == pytest.approx(times[: len(results)])
    assert counters.arrived == len(results) + counters.undecodable
    assert f"ends after {counters.arrived} of the 40 frames" in events[-1]


def test_undecodable_frames_are_counted_and_skipped(digits_bundle: Path, tmp_path: Path) -> None:
    times = [i / 10 for i in range(40)]
    video = write_video(tmp_path / "bad.mp4", noisy_frames(40), times, movflags="+faststart")
    with av.open(str(video)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    content = bytearray(video.read_bytes())
    for position, size in packets[20:23]:
        content[position : position + size] = b"\xff" * size
    video.write_bytes(content)
    report = run_camera(digits_bundle, str(video), CameraOptions(jsonl=tmp_path / "a.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert report.undecodable == 3
    assert report.frames == len(lines) == 37
    assert [line["frame_index"] for line in lines] == [*range(20), *range(23, 40)]
    assert lines[-1]["time_s"] == pytest.approx(3.9)


def test_a_damaged_image_is_counted_and_skipped(digits_bundle: Path, tmp_path: Path) -> None:
    paths = write_images(tmp_path / "images", ["1.png", "2.png", "3.png"])
    paths[1].write_bytes(paths[1].read_bytes()[:60])
    events: list[str] = []
    report = run_camera(digits_bundle, str(tmp_path / "images"), CameraOptions(), on_event=events.append)
    assert (report.frames, report.undecodable) == (2, 1)
    assert "2.png: frame 1 is skipped: the image is damaged" in events[0]


@pytest.mark.parametrize("name", ["text.mp4", "empty.mp4", "headless.mp4", "text.png"])
def test_unreadable_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("this is a shopping list\n" * 40 if name.startswith("text") else "")
    if name == "headless.mp4":
        write_video(path, grey_frames(10), [i / 10 for i in range(10)])
        path.write_bytes(path.read_bytes()[:-400])  # the index of an mp4 is at its end
    with pytest.raises(Damaged, match=name):
        list(classify_frames(slow_runtime() if name != "text.png" else refuse, str(path)))


def refuse(images: object, **_: object) -> list[object]:
    raise BadInput("no image")


def test_audio_alone_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(BadInput, match=r"song.mp4 holds no video stream \(it holds audio\)"):
        list(classify_frames(slow_runtime(), str(path)))


@pytest.mark.parametrize("name", ["clip.mp4", "clip.m3u8"])
def test_a_playlist_does_not_reach_the_network(tmp_path: Path, name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}/part.ts"
        (tmp_path / name).write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1.0,\n{address}\n#EXT-X-ENDLIST\n")
        with pytest.raises(MexitError):
            list(classify_frames(slow_runtime(), str(tmp_path / name)))
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_a_missing_source_is_refused_by_the_call() -> None:
    with pytest.raises(NotFound, match=r"nothing-here\.mp4 does not exist"):
        classify_frames(slow_runtime(), "nothing-here.mp4")


def test_without_pyav(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    write_images(tmp_path, ["a.png"])
    assert len(list(classify_frames(slow_runtime(), str(tmp_path / "a.png")))) == 1  # images do not need it
    with pytest.raises(MissingExtra, match=r"package 'av': pip install 'mexit\[camera\]'"):
        classify_frames(slow_runtime(), "rtsp://camera/stream")


def test_a_file_in_real_time(tmp_path: Path) -> None:
    """The newest frame is answered, and the others count as dropped."""
    times = [i / 50 for i in range(50)]
    video = write_video(tmp_path / "a.mp4", grey_frames(50), times)
    counters = Counters()
    answers = classify_frames(slow_runtime(0.1), str(video), every_frame=False, counters=counters)
    results = [result for _, result in answers]
    assert [result.frame_index for result in results] == sorted({result.frame_index for result in results})
    assert len(results) + counters.dropped == 50
    assert counters.dropped > 10
    for i, result in enumerate(results):
        assert result.dropped == result.frame_index - i
        assert result.time_s == pytest.approx(times[result.frame_index])


def test_stopped_ends_the_iteration(tmp_path: Path) -> None:
    write_images(tmp_path, [f"{i}.png" for i in range(5)])
    seen: list[int] = []
    for _, result in classify_frames(slow_runtime(), str(tmp_path), stopped=lambda: len(seen) == 2):
        seen.append(result.frame_index)
    assert seen == [0, 1]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_without_a_writer_does_not_delay_a_stop(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.ts")
    counters = Counters()
    assert list(classify_frames(slow_runtime(), str(tmp_path / "a.ts"), stopped=lambda: True, counters=counters)) == []
    assert counters.arrived == 0
    os.close(os.open(tmp_path / "a.ts", os.O_WRONLY | os.O_NONBLOCK))  # ends the thread that waits for a writer
