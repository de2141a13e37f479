"""Contact sheets show the pictures themselves, from memory and from files, with what is known about them."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mexit.data.dataset import ArrayImages, DataSet, FileImages
from mexit.evaluate.answers import NO_ANSWER, Answers
from mexit.evaluate.contact_sheet import SIDE, Sheet, contact_sheet, picture_file, tiles

CLASSES = ("Straße <b>", "b")


def answers(index: list[int], predicted: list[int]) -> Answers:
    n = len(index)
    return Answers(
        "exit 2",
        np.array(index, np.int64),
        np.zeros(n, np.int64),
        np.array(predicted),
        np.full(n, 0.625),
        np.arange(1, n + 1),
    )


def data_of(images: object, n: int) -> DataSet:
    return DataSet("set", CLASSES, images, np.zeros(n, np.int64), "0" * 64, None)


@pytest.mark.parametrize("shape", [(28, 28), (32, 32, 3), (224, 224, 3)])
def test_pictures_in_memory_are_those_of_the_data_set(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, (5, *shape), dtype=np.uint8)
    first, second = tiles(answers([3, 1], [1, NO_ANSWER]), np.array([0, 1]), data_of(ArrayImages(array), 5))
    if max(shape) <= SIDE:
        expected = array[3] if len(shape) == 3 else array[3][..., None].repeat(3, axis=2)
        np.testing.assert_array_equal(np.asarray(first.picture), expected)
    assert max(first.picture.size) == min(SIDE, shape[0])
    assert first.to_json(CLASSES) == {
        "file": "image 3", "true": "Straße <b>", "answer": "b", "confidence": 0.625, "exit": 1,
    }  # fmt: skip
    assert second.to_json(CLASSES)["answer"] is None
    assert not second.correct


def test_pictures_of_files_have_their_path_their_colours_and_their_shape(pictures: Path) -> None:
    name = os.fsdecode(b"a/caf\xe9 \n.png") if os.name == "posix" else "a/b.png"
    (pictures / "a").mkdir()
    with (pictures / name).open("wb") as file:
        Image.new("RGB", (400, 100), "#ff0000").save(file, "PNG")
    (tile,) = tiles(answers([0], [0]), np.array([0]), data_of(FileImages(pictures, [name]), 1))
    assert tile.picture.size == (SIDE, SIDE // 4)
    assert tile.picture.getpixel((5, 5)) == (255, 0, 0)
    assert tile.correct
    if os.name == "posix":
        assert tile.file == "a/caf\\xe9 \\x0a.png"


@pytest.mark.parametrize("count", [0, 1, 7])
def test_the_sheet_grows_with_its_tiles_and_shows_every_one(count: int) -> None:
    array = np.full((8, 28, 28), 255, np.uint8)
    shown = tiles(answers(list(range(count)), [1] * count), np.arange(count), data_of(ArrayImages(array), 8))
    sheets = [Sheet("Most wrong", "wrong answers", shown), Sheet("Least certain", "lowest confidence", ())]
    image = Image.open(io.BytesIO(contact_sheet("a \udcff title " * 30, sheets, CLASSES)))
    pixels = np.asarray(image)
    frames = (pixels == (0xF1, 0xF3, 0xF5)).all(axis=2).sum()
    assert frames == count * (SIDE**2 - (SIDE // 28 * 28) ** 2)
    assert image.height == pytest.approx(300 + 299 * -(-count // 6), abs=60)


def test_small_pictures_are_stored_exactly_and_large_ones_compressed() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    content, kind = picture_file(Image.fromarray(noise))
    assert kind == "image/png"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(content))), noise)
    content, kind = picture_file(Image.new("RGB", (SIDE, SIDE)))
    assert kind == "image/jpeg"
    assert Image.open(io.BytesIO(content)).format == "JPEG"
