"""Folders of images with one subfolder per class, and errors that name what is wrong."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from sample_images import encode, noise, spec

from mexit.data import folder
from mexit.data.preprocess import prepare
from mexit.errors import BadInput, NotFound


def fill(root: Path, classes: tuple[str, ...], count: int = 3) -> Path:
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{i}.png").write_bytes(encode(noise(9, 7, 3, seed=100 * label + i)))
    return root


def test_images_labels_and_class_names(tmp_path: Path) -> None:
    fill(tmp_path, ("dog", "cat"))
    data = folder.load(tmp_path)
    assert data.classes == ("cat", "dog")
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.official_test is None
    index = np.asarray([4, 0])
    expected = [prepare((tmp_path / path).read_bytes(), spec(3)) for path in ("dog/1.png", "cat/0.png")]
    assert data.batch(index, spec(3)).tobytes() == np.stack(expected).tobytes()


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_a_test_folder_becomes_the_official_test_part(tmp_path: Path, test_name: str) -> None:
    fill(tmp_path / "train", ("a", "b"), 4)
    fill(tmp_path / test_name, ("a", "b"), 2)
    data = folder.load(tmp_path)
    assert data.official_test is not None
    assert data.official_test.tolist() == [8, 9, 10, 11]
    assert data.labels.tolist() == [0] * 4 + [1] * 4 + [0, 0, 1, 1]


def test_hidden_folders_other_files_and_broken_links_are_skipped(tmp_path: Path) -> None:
    fill(tmp_path, ("a", "b", ".hidden"))
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "readme.png").write_bytes(encode(noise(4, 4)))
    (tmp_path / "b" / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(tmp_path / "b" / "pipe.png")
    (tmp_path / "empty").mkdir()
    assert folder.load(tmp_path).labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_the_hash_covers_every_image_and_every_label(tmp_path: Path) -> None:
    before = folder.load(fill(tmp_path / "x", ("a", "b"))).sha256
    assert folder.load(fill(tmp_path / "same", ("a", "b"))).sha256 == before
    (tmp_path / "same/a/0.png").write_bytes(encode(noise(9, 7, 3, seed=999)))
    assert folder.load(tmp_path / "same").sha256 != before
    fill(tmp_path / "moved", ("a", "b"))
    (tmp_path / "moved/a/2.png").rename(tmp_path / "moved/b/!.png")
    assert folder.load(tmp_path / "moved").sha256 != before


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotFound, match=f"image folder {tmp_path / 'nowhere'} does not exist"):
        folder.load(tmp_path / "nowhere")
    with pytest.raises(NotFound, match=f"{tmp_path / 'file'} is a file: the folder that holds the class folders"):
        folder.load(tmp_path / "file")


@pytest.mark.parametrize(("classes", "count"), [((), 0), (("a",), 1), (("a", "b"), 0)], ids=["none", "one", "empty"])
def test_fewer_than_two_classes_are_refused(tmp_path: Path, classes: tuple[str, ...], count: int) -> None:
    fill(tmp_path, classes, 3 * count)
    with pytest.raises(BadInput, match=rf"{tmp_path} has {count} class folder\(s\) with images; at least 2 are"):
        folder.load(tmp_path)


def test_training_and_test_classes_must_be_the_same(tmp_path: Path) -> None:
    fill(tmp_path / "train", ("a", "b", "c"))
    fill(tmp_path / "test", ("a", "b"))
    with pytest.raises(BadInput, match=r"train has 3 classes, .*test 2; .*: only train has c"):
        folder.load(tmp_path)


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2J", os.fsdecode(b"a\xff")], ids=["line break", "escape", "no utf-8"])
def test_a_class_name_with_control_characters_is_refused(tmp_path: Path, name: str) -> None:
    fill(tmp_path, (name, "b"))
    with pytest.raises(BadInput, match="has control characters: rename it"):
        folder.load(tmp_path)


def test_class_names_may_be_in_any_language(tmp_path: Path) -> None:
    names = ("Größe", "кот", "می\u200cخواهم", "猫")
    assert set(folder.load(fill(tmp_path, names)).classes) == set(names)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"no image", "8 bytes that are not an image"), (encode(noise(64, 64))[:900], "the image is damaged")],
    ids=["text", "cut short"],
)
def test_a_file_that_is_not_an_image_is_named_when_it_is_read(tmp_path: Path, content: bytes, words: str) -> None:
    fill(tmp_path, ("a", "b"))
    bad = tmp_path / "b" / "1.png"
    bad.write_bytes(content)
    data = folder.load(tmp_path)
    assert data.batch(np.asarray([0, 1, 2, 3, 5]), spec()).shape == (5, 1, 8, 8)
    with pytest.raises(BadInput, match=f"image {bad}: {words}"):
        data.batch(np.asarray([0, 4, 1]), spec())


def test_an_image_that_vanished_is_named(tmp_path: Path) -> None:
    data = folder.load(fill(tmp_path, ("a", "b")))
    (tmp_path / "a" / "2.png").unlink()
    with pytest.raises(NotFound, match=rf"image {tmp_path}/a/2\.png does not exist"):
        data.batch(np.arange(6), spec())
