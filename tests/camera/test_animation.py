"""Animated pictures are read frame by frame, with the times that they hold."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from camera_media import slow_runtime, write_images
from numpy.typing import NDArray
from PIL import Image, features

from mexit.camera.frame import Counters
from mexit.camera.pipeline import classify_frames
from mexit.runtime import Runtime

GREYS = [20 * i for i in range(10)]
NAMES = [
    "a.gif",
    "a.webp",
    "a.png",
    "a.apng",
    pytest.param("a.avif", marks=pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")),
]


def write_animation(path: Path, greys: list[int] = GREYS, duration_ms: int = 100) -> Path:
    first, *rest = [Image.new("RGB", (32, 24), (grey, grey, grey)) for grey in greys]
    file_format = "PNG" if path.suffix == ".apng" else None
    first.save(path, file_format, save_all=True, append_images=rest, duration=duration_ms)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_every_frame_of_an_animation(tmp_path: Path, name: str) -> None:
    path = write_animation(tmp_path / name, duration_ms=40)
    answers = list(classify_frames(slow_runtime(), str(path)))
    assert [round(float(frame.mean())) for frame, _ in answers] == pytest.approx(GREYS, abs=4)
    assert [frame.shape for frame, _ in answers] == [(24, 32, 3)] * 10
    assert [result.frame_index for _, result in answers] == list(range(10))
    assert [result.time_s for _, result in answers] == pytest.approx([i * 0.04 for i in range(10)])


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.jpg"])
def test_a_still_picture_stays_one_frame(tmp_path: Path, name: str) -> None:
    write_images(tmp_path, [name])
    [(_, result)] = classify_frames(slow_runtime(), str(tmp_path / name))
    assert result.time_s is None


def test_an_animation_within_a_folder(tmp_path: Path) -> None:
    write_images(tmp_path, ["1.png", "3.png"])
    write_animation(tmp_path / "2.gif", GREYS[:3])
    results = [result for _, result in classify_frames(slow_runtime(), str(tmp_path))]
    assert [Path(result.source).name for result in results] == ["1.png", "2.gif", "2.gif", "2.gif", "3.png"]
    assert [result.time_s for result in results] == [None, 0.0, 0.1, 0.2, None]


def test_the_suffix_does_not_matter(tmp_path: Path) -> None:
    write_animation(tmp_path / "a.gif").rename(tmp_path / "a.jpg")
    assert len(list(classify_frames(slow_runtime(), str(tmp_path / "a.jpg")))) == 10


def test_the_first_frame_is_answered_like_the_file(
    digits_bundle: Path, test_digits: tuple[NDArray[np.uint8], NDArray[np.int64]], tmp_path: Path
) -> None:
    first, *rest = [Image.fromarray(image) for image in test_digits[0][:5]]
    first.save(tmp_path / "a.png", save_all=True, append_images=rest)
    runtime = Runtime.open(digits_bundle, budget="full")
    answers = [result for _, result in classify_frames(runtime, str(tmp_path / "a.png"))]
    expected = [runtime((tmp_path / "a.png").read_bytes())[0], *runtime(list(test_digits[0][1:5]))]
    for answer, image in zip(answers, expected, strict=True):
        np.testing.assert_array_equal(answer.probabilities, image.probabilities)


def test_transparent_frames_are_shown_on_black(tmp_path: Path) -> None:
    clear, solid = Image.new("RGBA", (8, 8), (200, 200, 200, 0)), Image.new("RGBA", (8, 8), (200, 200, 200, 255))
    clear.save(tmp_path / "a.webp", save_all=True, append_images=[solid], lossless=True)
    assert [frame.max() for frame, _ in classify_frames(slow_runtime(), str(tmp_path / "a.webp"))] == [0, 200]


def test_the_separate_still_of_an_apng_is_left_out(tmp_path: Path) -> None:
    still, *film = [Image.new("L", (8, 8), grey) for grey in (255, 10, 20, 30)]
    still.save(tmp_path / "a.png", save_all=True, append_images=film, default_image=True)
    assert [frame[0, 0, 0] for frame, _ in classify_frames(slow_runtime(), str(tmp_path / "a.png"))] == [10, 20, 30]


def test_pages_are_reported(tmp_path: Path) -> None:
    first, *rest = [Image.new("L", (8, 8), grey) for grey in (10, 20, 30)]
    first.save(tmp_path / "a.tif", save_all=True, append_images=rest)
    events: list[str] = []
    [(frame, _)] = classify_frames(slow_runtime(), str(tmp_path / "a.tif"), on_event=events.append)
    assert frame[0, 0, 0] == 10
    assert events == [f"{tmp_path / 'a.tif'} has 3 pages; the first is read"]


def test_a_cut_animation(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    first, *rest = [Image.fromarray(rng.integers(0, 255, (64, 64), np.uint8)) for _ in range(6)]
    content = io.BytesIO()
    first.save(content, "GIF", save_all=True, append_images=rest)
    (tmp_path / "a.gif").write_bytes(content.getvalue()[: len(content.getvalue()) * 2 // 3])
    counters, events = Counters(), list[str]()
    answers = classify_frames(slow_runtime(), str(tmp_path / "a.gif"), on_event=events.append, counters=counters)
    answered = len(list(answers))
    assert 1 <= answered <= 4
    assert counters.arrived == answered + counters.undecodable
    assert counters.undecodable == 1
    assert f"reading stopped after {answered} frames" in events[-1]
