"""Links between near-duplicates: few however many pictures look alike, in bounded memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from sample_images import noise

from mexit.core.progress import Silent
from mexit.data import near_duplicates as module
from mexit.data.dataset import ArrayImages, DataSet
from mexit.data.groups import find_groups
from mexit.data.near_duplicates import HEIGHT, WIDTH, Thumbnails, near_duplicates


def thumbs(pictures: np.ndarray, progress: Silent | None = None) -> Thumbnails:
    """Thumbnails of pictures (N, HEIGHT, WIDTH) uint8, all read."""
    result = Thumbnails(ArrayImages(pictures), len(pictures), progress)
    result.read(np.arange(len(pictures)))
    return result


def static_camera(count: int, *, step: int = 0) -> np.ndarray:
    """Frames of one scene; each differs by a grey level in a pixel, and is `step` levels brighter at most."""
    frames = np.repeat(noise(1, HEIGHT, WIDTH) // 2 + 60, count, axis=0)
    frames[np.arange(count), np.arange(count) % HEIGHT, 3] += 1
    frames[::2] += np.uint8(step)
    return frames


@pytest.mark.parametrize("step", [0, 5, 20], ids=["equal", "alike", "of two brightnesses"])
def test_thousands_of_equal_hashes_take_bounded_memory(step: int) -> None:
    count = 5000
    frames = thumbs(static_camera(count, step=step))
    tracemalloc.start()
    links = near_duplicates(frames)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert links is not None
    assert len(links) == count - (2 if step > module.MAX_RMS else 1), "one link joins each picture"
    assert (links[:, 0] < links[:, 1]).all()
    assert peak < 100 << 20, "all pairs are 200 MB as indices alone"


def test_links_connect_what_is_alike_and_nothing_else() -> None:
    scenes = noise(700, HEIGHT, WIDTH)
    order = np.random.default_rng(0).permutation(2100)
    pictures = np.concatenate([scenes, scenes, scenes])[order]
    links = near_duplicates(thumbs(pictures))
    assert links is not None
    assert len(links) == 1400
    assert (order[links[:, 0]] % 700 == order[links[:, 1]] % 700).all()


@pytest.mark.parametrize("scenes", [1, 1500])
def test_large_sets_compare_neighbouring_hashes(scenes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_COMPARED", 1000)
    pictures = np.repeat(noise(scenes, HEIGHT, WIDTH), 3000 // scenes, axis=0)
    links = near_duplicates(thumbs(pictures))
    assert links is not None
    assert len(links) == 3000 - scenes


def test_no_pictures_and_plain_pictures_have_no_links() -> None:
    for pictures in (np.zeros((0, HEIGHT, WIDTH), np.uint8), np.full((9, HEIGHT, WIDTH), 200, np.uint8)):
        links = near_duplicates(thumbs(pictures))
        assert links is not None
        assert links.shape == (0, 2)


def test_very_large_sets_are_not_compared_and_the_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PICTURES", 50)
    pictures = static_camera(60)
    assert near_duplicates(thumbs(pictures)) is None
    labels = np.arange(60, dtype=np.int64) % 2
    grouping = find_groups(DataSet("x", ("a", "b"), ArrayImages(pictures), labels, "7" * 64, None), "auto")
    assert grouping is not None
    assert grouping.how.startswith("no groups: near-duplicates are looked for in sets of up to")


def test_long_reading_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOGGED", 20)
    lines: list[str] = []
    progress = Silent()
    monkeypatch.setattr(progress, "log", lines.append)
    thumbs(static_camera(50), progress)
    assert lines == [f"looking for near-duplicates: {done} of 50 pictures are read" for done in (20, 40)]
