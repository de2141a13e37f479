"""JSON lines."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from camera_media import camera_prediction, file_limit, grey_frames

from mexit.camera.events import CameraEvent
from mexit.camera.outputs.json_lines import EventLines, JsonLines
from mexit.errors import MexitError, UsageError


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk() -> None:
    sink = JsonLines(Path("/dev/full"))
    with pytest.raises(MexitError, match="could not write /dev/full: No space left on device"):
        sink.write(grey_frames(1)[0], camera_prediction())


def test_each_line_is_flushed(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.jsonl"
    sink = JsonLines(path)
    assert not path.parent.exists()
    for i in range(3):
        sink.write(grey_frames(1)[0], camera_prediction(i / 3, label="größer"))
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
        "camera": "gate",
        "source": "s",
        "frame_index": 0,
        "time_s": 0.666667,
        "captured_s": 0.0,
        "age_ms": 1.0,
        "dropped": 0,
        "steady": "größer",
    }
    assert sink.close() == path


def indices(path: Path) -> list[int]:
    return [json.loads(line)["dropped"] for line in path.read_text().splitlines()]


def write_frames(output: JsonLines, numbers: range) -> None:
    for i in numbers:
        output.write(grey_frames(1)[0], replace(camera_prediction(), dropped=i))


def test_rotation_by_size(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    line_bytes = len(json.dumps(camera_prediction().to_json())) + 1
    output = JsonLines(path, max_mb=3.5 * line_bytes / 1e6, keep=2)
    write_frames(output, range(10))
    assert output.close() == path
    assert indices(path) == [9]
    assert indices(tmp_path / "a.jsonl.1") == [6, 7, 8]
    assert indices(tmp_path / "a.jsonl.2") == [3, 4, 5]
    assert len(list(tmp_path.iterdir())) == 3


def test_a_file_of_an_earlier_run_is_rotated_too(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("earlier\n")
    output = JsonLines(path, max_mb=1.0)
    assert path.read_text() == "earlier\n"
    write_frames(output, range(2))
    output.close()
    assert indices(path) == [0, 1]
    assert (tmp_path / "a.jsonl.1").read_text() == "earlier\n"


def test_without_kept_files_the_old_lines_are_dropped(tmp_path: Path) -> None:
    output = JsonLines(tmp_path / "a.jsonl", max_mb=1e-5, keep=0)
    write_frames(output, range(3))
    output.close()
    assert indices(tmp_path / "a.jsonl") == [2]
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "settings", [{"max_mb": 0.0}, {"max_mb": -1.0}, {"max_mb": float("nan")}, {"max_mb": float("inf")}, {"keep": -1}]
)
def test_bad_sizes_are_refused(tmp_path: Path, settings: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="rotation expects"):
        JsonLines(tmp_path / "a.jsonl", **settings)


def test_any_number_of_kept_files(tmp_path: Path) -> None:
    """Files are renamed up to the first free number, so a large number of them costs nothing."""
    output = JsonLines(tmp_path / "a", max_mb=0.0004, keep=10**12)
    write_frames(output, range(4))
    assert [indices(tmp_path / name) for name in ("a", "a.1", "a.2", "a.3")] == [[3], [2], [1], [0]]


def test_a_line_that_does_not_fit_on_the_disk_is_left_out(tmp_path: Path) -> None:
    output = JsonLines(tmp_path / "a")
    write_frames(output, range(2))
    with file_limit((tmp_path / "a").stat().st_size + 50), pytest.raises(MexitError, match="could not write"):
        write_frames(output, range(2, 3))
    assert output.close() is None
    assert indices(tmp_path / "a") == [0, 1]


def test_events_have_a_file_of_their_own(tmp_path: Path) -> None:
    event = CameraEvent("gate", "label-changed", 12.5, "one", "zero", 3.0)
    frames, events = JsonLines(tmp_path / "frames"), EventLines(tmp_path / "events")
    for output in (frames, events):
        output.write(grey_frames(1)[0], camera_prediction())
        output.event(event)
        output.close()
    assert [line["label"] for line in map(json.loads, (tmp_path / "frames").read_text().splitlines())] == ["zero"]
    assert [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()] == [event.to_json()]
