"""Listing image files, the hash of a list, and images without labels."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sample_images import encode, noise, spec

from mexit.data import folder, registry
from mexit.data.image_files import LabelledFiles, list_images
from mexit.data.preprocess import prepare
from mexit.errors import BadInput, Damaged, NotFound


def make_files(root: Path) -> None:
    """Make two class folders with two images each."""
    for label, name in enumerate(("cat", "dog")):
        (root / name).mkdir()
        for k in range(2):
            (root / name / f"{k}.jpg").write_bytes(encode(noise(9, 7, 3, seed=10 * label + k), "JPEG"))


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("x")
    with pytest.raises(Damaged, match=f"image folder {tmp_path}/a file cannot be listed: Not a directory"):
        list_images(tmp_path, "a file")


def labelled_files(root: Path) -> LabelledFiles:
    files = LabelledFiles(root)
    for label, folder_name in enumerate(("cat", "dog")):
        files.add(list_images(root, folder_name), label)
    return files


@pytest.mark.parametrize(
    ("limit", "detects_content", "detects_names"),
    [(1 << 30, True, False), (0, False, True)],
    ids=["small", "large"],
)
def test_the_hash_covers_content_of_small_sets_and_names_and_sizes_of_large_ones(
    tmp_path: Path, limit: int, detects_content: bool, detects_names: bool
) -> None:
    make_files(tmp_path)
    before = labelled_files(tmp_path).sha256(limit)
    assert labelled_files(tmp_path).sha256(limit) == before
    file = tmp_path / "cat/0.jpg"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"x")
    assert (labelled_files(tmp_path).sha256(limit) != before) == detects_content
    file.write_bytes(content + b"x")
    assert labelled_files(tmp_path).sha256(limit) != before
    file.write_bytes(content)
    (tmp_path / "cat/1.jpg").rename(tmp_path / "cat/2.jpg")  # the order is unchanged
    assert (labelled_files(tmp_path).sha256(limit) != before) == detects_names


def test_the_total_size_selects_the_form_of_the_hash(tmp_path: Path) -> None:
    make_files(tmp_path)
    files = labelled_files(tmp_path)
    total = sum(files.sizes)
    assert files.sha256(total) == files.sha256(1 << 30) != files.sha256(total - 1) == files.sha256(0)


def test_other_files_and_link_loops_are_skipped(tmp_path: Path) -> None:
    for name in (".png", "loop.png", "notes.txt", "a.PNG"):
        (tmp_path / name).write_bytes(b"no image" if name == "notes.txt" else encode(noise(9, 7), "JPEG"))
    (tmp_path / "loop.png").unlink()
    (tmp_path / "loop.png").symlink_to("loop.png")
    assert [file.name for file in list_images(tmp_path)] == ["a.PNG"]


def test_a_folder_without_class_folders_is_unlabelled(tmp_path: Path) -> None:
    for k in (2, 0, 1):
        (tmp_path / f"{k}.png").write_bytes(encode(noise(5, 5, 3, seed=k)))
    (tmp_path / "empty").mkdir()
    images = registry.load_unlabelled(f"folder:{tmp_path}")
    assert images is not None
    assert len(images) == 3
    expected = prepare((tmp_path / "1.png").read_bytes(), spec(3))
    assert images.batch(np.asarray([1]), spec(3)).tobytes() == expected.tobytes()
    with pytest.raises(BadInput, match=r"has 0 class folder\(s\) with images; at least 2 are needed"):
        folder.load(tmp_path)


def test_class_folders_and_other_sets_are_not_unlabelled(tmp_path: Path) -> None:
    make_files(tmp_path)
    (tmp_path / "readme.png").write_bytes(encode(noise(4, 4)))
    assert registry.load_unlabelled(f"folder:{tmp_path}") is None
    assert registry.load_unlabelled("digits") is None
    (tmp_path / "nothing").mkdir()
    with pytest.raises(BadInput, match="nothing holds no images"):
        folder.load_unlabelled(tmp_path / "nothing")
    with pytest.raises(NotFound, match=r"image folder .* does not exist"):
        registry.load_unlabelled(f"folder:{tmp_path}/nowhere")


LITTER = (
    *("cat/._0.jpg", "cat/.DS_Store", "__MACOSX/cat/._1.jpg", "cat/.ipynb_checkpoints/1.png", "cat/@eaDir/1.jpg/x.jpg"),
    *(
        "cat/Thumbs.db",
        "dog/desktop.ini",
        "dog/#recycle/3.jpg",
        ".git/x.png",
        "lost+found/x.png",
        "dog/$RECYCLE.BIN/y.gif",
    ),
)


def test_hidden_and_system_entries_are_skipped_and_counted(tmp_path: Path) -> None:
    make_files(tmp_path)
    for name in LITTER:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encode(noise(4, 4)))
    data = folder.load(tmp_path)
    assert (data.classes, len(data)) == (("cat", "dog"), 4)
    assert data.skipped == {"hidden or system entry": 11}


def test_other_files_are_counted_by_suffix(tmp_path: Path) -> None:
    make_files(tmp_path)
    for name in ("cat/0.txt", "cat/1.TXT", "dog/0.mp4", "dog/notes", "dog/0.eps", "dog/sub/x.svg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"%!PS no picture")
    (tmp_path / "dog/gone.png").symlink_to("nowhere.png")
    (tmp_path / "readme.png").write_bytes(encode(noise(4, 4)))
    (tmp_path / "empty").mkdir()
    assert folder.load(tmp_path).skipped == {
        ".txt": 2, ".mp4": 1, ".eps": 1, ".svg": 1, "no suffix": 1, "broken link": 1, "folder without images": 1,
        "image beside the class folders": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", ["x.jfif", "x.JPE", "x.Avif", "x.tif", "x.heic", "picture", "x.glasses", "x.txt", "1.5"]
)
def test_a_picture_is_listed_by_suffix_or_content(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(encode(noise(9, 7, 3), "JPEG"))
    assert [file.name for file in list_images(tmp_path)] == [name]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "JPEG2000", "QOI", "DDS"])
def test_a_picture_without_suffix_is_known_by_its_content(kind: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(encode(noise(40, 30, 3), kind))
    assert len(list_images(tmp_path)) == 1


@pytest.mark.parametrize(
    "content", [b"", b"BM", b"BMW is a maker of cars and motorcycles.", b"P5 is a station", b"RIFFxxxxWAVE"]
)
def test_other_content_without_suffix_is_no_picture(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    skipped: Counter[str] = Counter()
    assert list_images(tmp_path, skipped=skipped) == []
    assert skipped == {"no suffix": 1}


def test_a_linked_folder_is_followed_once(tmp_path: Path) -> None:
    root, more = tmp_path / "set", tmp_path / "more"
    root.mkdir()
    make_files(root)
    (more / "deep").mkdir(parents=True)
    for name in ("0.jpg", "deep/1.jpg"):
        (more / name).write_bytes(encode(noise(4, 4)))
    (root / "cat/more").symlink_to("../../more")
    (root / "cat/again").symlink_to(more / "deep")
    data = folder.load(root)
    names = data.images.names  # type: ignore[attr-defined]
    assert names[:2] == ["cat/0.jpg", "cat/1.jpg"]
    assert len(data) == 6
    assert data.skipped == {"linked folder that is listed already": 1}


def test_a_linked_class_folder_is_a_class(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    make_files(store)
    (tmp_path / "set").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).symlink_to(store / name)
    (tmp_path / "set" / "loop").symlink_to(".")
    assert len(folder.load(tmp_path / "set")) == 4


@pytest.mark.parametrize("target", [".", "..", "../..", "../dog/back"])
def test_cycles_of_links_end(target: str, tmp_path: Path) -> None:
    make_files(tmp_path)
    (tmp_path / "dog/back").symlink_to("..")
    (tmp_path / "cat/cycle").symlink_to(target)
    assert len(folder.load(tmp_path)) == 4
