"""The examples with OpenCV and with supervision, on a clip that the test makes."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mexit import Runtime
from mexit.data import digits

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
BUNDLE = ROOT / "tests" / "golden" / "bundle-2" / "bundles" / "demo"
SIDE = 64
TINT = np.array([0.2, 0.5, 1.0])  # of red, green and blue: a frame that is taken for RGB is darker


@pytest.fixture(scope="module")
def cv2() -> Any:
    return pytest.importorskip("cv2", exc_type=ImportError, reason="needs opencv-python-headless")


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return Runtime.open(BUNDLE, budget="low")


def enlarged(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A tinted digit, uint8 RGB (SIDE, SIDE, 3)."""
    large = pixels.repeat(SIDE // 8, axis=0).repeat(SIDE // 8, axis=1)
    return np.rint(large[:, :, None] * TINT).astype(np.uint8)


@pytest.fixture(scope="module")
def clip(cv2: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A film of 12 frames: four digits, three frames each."""
    path = tmp_path_factory.mktemp("clip") / "digits.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 25, (SIDE, SIDE))
    images = digits.load().images.at(np.arange(4))
    for pixels in images:
        for _ in range(3):
            writer.write(np.ascontiguousarray(enlarged(np.asarray(pixels))[:, :, ::-1]))
    writer.release()
    return path


def test_the_loop_answers_every_frame_of_the_clip(cv2: Any, clip: Path, runtime: Runtime, tmp_path: Path) -> None:
    """The answers are those of the runtime for the same frames in the order RGB, not BGR."""
    command = [sys.executable, EXAMPLES / "opencv_loop.py", BUNDLE, clip, "--out", tmp_path / "out.avi"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *changes, last = done.stdout.splitlines()
    capture = cv2.VideoCapture(str(clip))
    frames = [capture.read()[1] for _ in range(12)]
    answers = runtime([np.ascontiguousarray(frame[:, :, ::-1]) for frame in frames])
    swapped = runtime(frames)
    assert [f"{one.confidence:.0%}" for one in swapped] != [f"{one.confidence:.0%}" for one in answers]
    expected, before = [], None
    for index, one in enumerate(answers):
        if one.label != before:
            before = one.label
            text = f"{one.label} ({one.confidence:.0%}), exit {one.exit}, {one.macs:,} MACs"
            expected.append(f"frame {index}: {text}")
    assert changes == expected
    assert len(changes) > 1
    assert last.startswith("12 frames, exits taken (")
    written = cv2.VideoCapture(str(tmp_path / "out.avi"))
    shown = [written.read()[1] for _ in range(12)]
    assert all(one is not None and one.shape == (SIDE, SIDE, 3) for one in shown)
    assert np.abs(shown[0].astype(int) - frames[0]).max() > 100  # the text


def test_a_source_that_cannot_be_opened_is_named() -> None:
    pytest.importorskip("cv2", exc_type=ImportError, reason="needs opencv-python-headless")
    command = [sys.executable, EXAMPLES / "opencv_loop.py", BUNDLE, "missing.mp4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "OpenCV cannot open missing.mp4: give a video file" in done.stderr
    assert "Traceback" not in done.stderr


def test_detections_of_supervision_get_our_classes(runtime: Runtime) -> None:
    """The labelled detections can be filtered, merged and indexed as before."""
    supervision = pytest.importorskip("supervision", exc_type=ImportError, reason="needs supervision")
    label = runpy.run_path(str(EXAMPLES / "detector_crops.py"))["label_detections"]
    parts = [enlarged(np.asarray(pixels)) for pixels in digits.load().images.at(np.arange(3))]
    picture = np.concatenate(parts, axis=1)
    boxes = np.array([[SIDE * index, 0, SIDE * (index + 1), SIDE] for index in range(3)] + [[900, 0, 910, 9]], float)
    found = supervision.Detections(xyxy=boxes, class_id=np.zeros(4, int), confidence=np.full(4, 0.5))
    labelled = label(runtime, picture, found)
    expected = runtime(parts)
    assert labelled.class_id.tolist() == [*(one.index for one in expected), -1]
    known = labelled[labelled.class_id >= 0]
    assert known["class_name"].tolist() == [one.label for one in expected]
    assert known["exit"].tolist() == [one.exit for one in expected]
    merged = supervision.Detections.merge([known, known])
    assert len(merged) == 6
