"""The flow as a process: signals, crashes, the example program and a sample video."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import pytest
from camera_media import grey_frames, read_video, write_video
from command_line import typed
from PIL import Image

from mexit.errors import UsageError
from mexit.flows.camera import CameraOptions, run_camera

SCRIPT = """
import sys, time
from pathlib import Path
from mexit.flows.camera import CameraOptions, run_camera

options = CameraOptions(out=Path("out.mp4"), jsonl=Path("out.jsonl"))
report = run_camera(Path(sys.argv[1]), sys.argv[2], options, on_result=lambda result: time.sleep(0.01))
print(report.frames, report.signal, len(report.outputs))
"""


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """640 frames, the first at 0.3 s."""
    times = [0.3 + i / 12.5 for i in range(640)]
    return write_video(tmp_path_factory.mktemp("video") / "long.mp4", grey_frames(64, (64, 64)) * 10, times)


@pytest.fixture
def running(digits_bundle: Path, video: Path, tmp_path: Path) -> subprocess.Popen[str]:
    """A process in the middle of a long video, after two fragments of its output; there is an earlier output."""
    (tmp_path / "out.mp4").write_text("an earlier video")
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(digits_bundle), str(video)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    end_s = time.monotonic() + 120
    while not (tmp_path / "out.jsonl").exists() or (tmp_path / "out.jsonl").read_bytes().count(b"\n") < 260:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end_s
        time.sleep(0.02)
    return process


def lines_of(path: Path) -> list[dict[str, object]]:
    content = path.read_text()
    assert content.endswith("\n")
    return [json.loads(line) for line in content.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_outputs(running: subprocess.Popen[str], tmp_path: Path, number: int) -> None:
    running.send_signal(number)
    out, errors = running.communicate(timeout=20)
    lines = lines_of(tmp_path / "out.jsonl")
    assert out.split() == [str(len(lines)), str(int(number)), "2"], errors
    assert errors == ""
    times, _ = read_video(tmp_path / "out.mp4")
    assert 130 <= len(times) == len(lines) < 640
    assert times == pytest.approx([line["time_s"] for line in lines], abs=1e-5)
    assert [line["frame_index"] for line in lines] == list(range(len(lines)))
    assert not list(tmp_path.glob(".*tmp*"))


@pytest.mark.slow
def test_a_kill_leaves_the_earlier_video_and_the_recorded_part(running: subprocess.Popen[str], tmp_path: Path) -> None:
    running.kill()
    running.communicate(timeout=20)
    lines = lines_of(tmp_path / "out.jsonl")
    assert (tmp_path / "out.mp4").read_text() == "an earlier video"
    [recording] = tmp_path.glob(".out.mp4.tmp-*")
    times, _ = read_video(recording)
    assert len(lines) - len(times) < 120, "two key frames"
    assert times == pytest.approx([line["time_s"] for line in lines[: len(times)]], abs=1e-5), "from the beginning"


def test_a_limit_ends_the_run(digits_bundle: Path, video: Path, tmp_path: Path) -> None:
    report = run_camera(digits_bundle, str(video), CameraOptions(out=tmp_path / "b.mp4", limit=4))
    assert (report.frames, report.signal, report.outputs) == (4, None, (tmp_path / "b.mp4",))
    assert len(read_video(tmp_path / "b.mp4")[0]) == 4
    with pytest.raises(UsageError, match="limit must be at least 1, found 0"):
        run_camera(digits_bundle, str(video), CameraOptions(limit=0))


def test_unsure_frames_have_no_label_and_are_counted(reject_bundle: Path, test_digits, tmp_path: Path) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    for number, pixels in enumerate(test_digits[0][:40]):
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    options = CameraOptions(out=tmp_path / "out.mp4", jsonl=tmp_path / "out.jsonl")
    report = run_camera(reject_bundle, str(folder), options)
    lines = lines_of(tmp_path / "out.jsonl")
    unsure = [line for line in lines if line["reason"] == "unsure"]
    assert report.unsure == len(unsure) > 0
    assert all((line["label"], line["index"]) == (None, None) for line in unsure)
    assert len(read_video(tmp_path / "out.mp4")[0]) == 40
    shown = typed("camera", reject_bundle, "--source", folder).output
    assert ": unsure at exit " in shown
    assert any(f": {line['label']}, " in shown for line in lines if line["label"] is not None)
    assert f"unsure │ {len(unsure)}" in " ".join(shown.split()).replace("┃", "│")


def test_signal_handlers_are_restored(digits_bundle: Path, video: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run_camera(digits_bundle, str(video), CameraOptions(limit=2))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_the_example_runs(digits_bundle: Path, video: Path) -> None:
    example = Path(__file__).parents[2] / "examples" / "04_camera.py"
    command = [sys.executable, str(example), str(digits_bundle), str(video), "20"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("20 frames, exits taken (")


@pytest.mark.slow
def test_a_traffic_camera(digits_bundle: Path, data_dir: Path, tmp_path: Path) -> None:
    video = data_dir / "video" / "car-detection.mp4"
    if not video.exists():
        pytest.skip(f"needs the sample video {video.name}")
    report = run_camera(digits_bundle, str(video), CameraOptions(out=tmp_path / "a.mp4", limit=120))
    assert (report.frames, report.dropped, report.undecodable) == (120, 0, 0)
    times, frames = read_video(tmp_path / "a.mp4")
    with av.open(str(video)) as container:
        original = [frame for frame, _ in zip(container.decode(video=0), range(120), strict=False)]
    assert times == pytest.approx([frame.time for frame in original], abs=1e-5)
    assert frames[0].shape == (432, 768, 3)
    outside_panel = (slice(150, None), slice(500, None))
    for written, source in zip(frames[::40], original[::40], strict=True):
        difference = abs(written[outside_panel].astype(int) - source.to_ndarray(format="rgb24")[outside_panel])
        assert difference.mean() < 4
