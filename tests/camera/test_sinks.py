"""JSON lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from camera_media import camera_prediction, grey_frames

from mexit.camera.sinks import JsonLines
from mexit.errors import MexitError


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
