"""The programs in `examples/` run and give the answers of the runtime."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from mexit import Runtime

EXAMPLES = Path(__file__).parents[1] / "examples"
Pixels = NDArray[np.uint8]


def run(name: str, *arguments: object) -> list[str]:
    """The lines that an example prints."""
    command = [sys.executable, EXAMPLES / name, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def crops() -> SimpleNamespace:
    """The functions of detector_crops.py."""
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / "detector_crops.py")))


@pytest.fixture(scope="module")
def runtime(digits_bundle: Path) -> Runtime:
    return Runtime.open(digits_bundle, budget="low")


@pytest.fixture(scope="module")
def sheet(test_digits: tuple[Pixels, Any]) -> tuple[Pixels, NDArray[np.int64], list[Pixels]]:
    """A picture (80, 96, 3) with six digits of different sizes, their boxes and their pixels."""
    picture = np.full((80, 96, 3), 30, np.uint8)
    boxes, parts = [], []
    for index in range(6):
        side = 16 + 4 * (index % 3)
        pixels = np.asarray(Image.fromarray(test_digits[0][index]).resize((side, side)).convert("RGB"))
        left, top = 32 * (index % 3), 40 * (index // 3)
        picture[top : top + side, left : left + side] = pixels
        boxes.append((left, top, left + side, top + side))
        parts.append(pixels)
    return picture, np.array(boxes), parts


def test_each_box_gets_the_answer_of_its_pixels(crops: SimpleNamespace, runtime: Runtime, sheet: Any) -> None:
    picture, boxes, parts = sheet
    before = runtime.stats.snapshot().predictions
    answers = crops.classify_boxes(runtime, picture, boxes)
    assert runtime.stats.snapshot().predictions == before + 6
    assert [one.index for one in answers] == [one.index for one in runtime(parts)]
    assert [one.macs for one in answers] == [one.macs for one in runtime(parts)]


def test_boxes_outside_of_the_picture_have_no_answer(crops: SimpleNamespace, runtime: Runtime, sheet: Any) -> None:
    """A box over the edge counts with its part inside; one beyond it, or without an area, has no answer."""
    picture, boxes, parts = sheet
    odd = np.array([[200, 0, 220, 20], boxes[0], [5, 5, 5, 9], [-8.4, -8, 16, 16]])
    answers = crops.classify_boxes(runtime, picture, odd)
    assert [one is None for one in answers] == [True, False, True, False]
    np.testing.assert_array_equal(answers[1].probabilities, runtime([parts[0]])[0].probabilities)
    np.testing.assert_array_equal(answers[3].probabilities, runtime([parts[0]])[0].probabilities)
    assert crops.classify_boxes(runtime, picture, np.zeros((0, 4))) == []
    assert crops.classify_boxes(runtime, picture, odd[:1]) == [None]


def test_a_margin_adds_pixels_on_each_side(crops: SimpleNamespace) -> None:
    picture = np.arange(100 * 100, dtype=np.int64).reshape(100, 100, 1).repeat(3, axis=2)
    part = crops.crop(picture, np.array([20, 40, 40, 80]), 0.1)
    np.testing.assert_array_equal(part, picture[36:84, 18:42])


def test_detections_get_our_classes(crops: SimpleNamespace, runtime: Runtime, sheet: Any) -> None:
    """An object with the fields of `supervision.Detections`; tests/long has the real one."""
    picture, boxes, parts = sheet
    found = np.vstack([boxes, [[200, 0, 220, 20]]]).astype(np.float32)
    detections = SimpleNamespace(xyxy=found, class_id=np.zeros(7, int), confidence=np.ones(7), data={})
    labelled = crops.label_detections(runtime, picture, detections, budget="full")
    expected = runtime(parts, budget="full")
    assert labelled.class_id.tolist() == [*(one.index for one in expected), -1]
    assert labelled.data["class_name"].tolist() == [*(one.label for one in expected), ""]
    assert labelled.data["exit"].tolist() == [3] * 6 + [0]
    np.testing.assert_allclose(labelled.confidence, [*(one.confidence for one in expected), 0], rtol=1e-6)


def test_unsure_answers_have_no_class(crops: SimpleNamespace, reject_bundle: Path, sheet: Any) -> None:
    picture, boxes, _ = sheet
    runtime = Runtime.open(reject_bundle, budget="full")
    noise = np.random.default_rng(0).integers(0, 255, picture.shape, dtype=np.uint8)
    detections = SimpleNamespace(xyxy=boxes, class_id=None, confidence=None, data={})
    labelled = crops.label_detections(runtime, noise, detections)
    unsure = [one.reason == "unsure" for one in crops.classify_boxes(runtime, noise, boxes)]
    assert any(unsure)
    assert (labelled.class_id == -1).tolist() == unsure
    assert (labelled.data["class_name"] == "").tolist() == unsure


@pytest.mark.slow
def test_the_program_prints_a_line_for_each_box(digits_bundle: Path, tmp_path: Path, sheet: Any) -> None:
    picture, boxes, parts = sheet
    Image.fromarray(picture).save(tmp_path / "sheet.png")
    (tmp_path / "boxes.json").write_text(json.dumps([*boxes.tolist(), [200, 0, 220, 20]]))
    *lines, outside, last = run("detector_crops.py", digits_bundle, tmp_path / "sheet.png", tmp_path / "boxes.json")
    answers = Runtime.open(digits_bundle, budget="low")(parts)
    expected = [f": {one.label} ({one.confidence:.0%}), exit {one.exit}" for one in answers]
    assert [line.partition("]")[2] for line in lines] == expected
    assert outside == "[200, 0, 220, 20]: outside of the picture"
    assert last.startswith("6 boxes, exits taken (")


@pytest.mark.slow
def test_the_first_examples_run(digits_bundle: Path, tmp_path: Path, test_digits: tuple[Pixels, Any]) -> None:
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for path, pixels in zip(paths, test_digits[0], strict=False):
        Image.fromarray(pixels).save(path)
    answers = Runtime.open(digits_bundle, budget="low")(list(test_digits[0][:3]))
    lines = run("02_predict.py", digits_bundle, *paths)
    for line, path, one in zip(lines, paths, answers, strict=False):
        assert line == f"{path}: {one.label} ({one.confidence:.1%}), exit {one.exit}, {one.macs:,} MACs"
    assert lines[3].startswith("3 answers, ")
    assert run("04_camera.py", digits_bundle, tmp_path)[-1].startswith("3 frames, exits taken (")
