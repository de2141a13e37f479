"""IDX files are read exactly, or refused with an error that names the file."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from mexit.data.idx import load, read_idx
from mexit.errors import Damaged, NotFound

IMAGES = np.random.default_rng(0).integers(0, 256, (30, 4, 5), dtype=np.uint8)
LABELS = np.arange(30, dtype=np.uint8) % 10
NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def idx_bytes(array: np.ndarray) -> bytes:
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """A data folder with a small MNIST: 30 training images and the same 30 for testing."""
    (tmp_path / "mnist").mkdir()
    for name in NAMES:
        (tmp_path / "mnist" / name).write_bytes(idx_bytes(IMAGES if "images" in name else LABELS))
    return tmp_path


def replace(data: Path, name: str, content: bytes) -> None:
    (data / "mnist" / name).write_bytes(content)


def test_an_array_is_read_back_gzipped_or_not(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(idx_bytes(IMAGES))
    (tmp_path / "x.gz").write_bytes(gzip.compress(idx_bytes(IMAGES)))
    for name in ("x", "x.gz"):
        assert (read_idx(tmp_path / name) == IMAGES).all()


def test_a_data_set_has_its_test_part_and_a_hash_of_its_content(mnist: Path) -> None:
    data = load("mnist", mnist)
    assert (len(data), data.classes[3], data.name) == (60, "3", "mnist")
    assert data.official_test is not None
    assert data.official_test.tolist() == list(range(30, 60))
    before = data.sha256
    changed = IMAGES.copy()
    changed[0, 0, 0] ^= 1
    replace(mnist, NAMES[0], idx_bytes(changed))
    assert load("mnist", mnist).sha256 != before


@pytest.mark.parametrize("folder", ["mnist", "MNIST/raw", "."])
def test_the_usual_folders_are_searched(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        content = idx_bytes(IMAGES if "images" in name else LABELS)
        (tmp_path / folder / f"{name}.gz").write_bytes(gzip.compress(content))
    assert len(load("mnist", tmp_path)) == 60


GOOD = idx_bytes(IMAGES)
WRONG = {
    "empty": (b"", r"is not an IDX file of unsigned bytes \(it begins with \)"),
    "text": (b"P5 4 5 255", r"is not an IDX file of unsigned bytes \(it begins with 50352034\)"),
    "floats": (b"\0\0\x0d\3" + GOOD[4:], r".*begins with 00000d03"),
    "no dimension": (b"\0\0\x08\0" + GOOD[4:], r".*begins with 00000800"),
    "4 dimensions": (b"\0\0\x08\4" + GOOD[4:], r".*begins with 00000804"),
    "header cut short": (GOOD[:9], "is truncated within its header"),
    "one byte missing": (GOOD[:-1], "announces 600 values and holds 599"),
    "one byte too many": (GOOD + b"\0", "announces 600 values and holds 601"),
    "sizes that overflow": (
        b"\0\0\x08\3" + b"\xff" * 12 + b"x",
        f"announces {(2**32 - 1) ** 3} values and holds 1",
    ),
}


@pytest.mark.parametrize(("content", "words"), WRONG.values(), ids=WRONG.keys())
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(Damaged, match=rf"data file .*train-images-idx3-ubyte {words}"):
        read_idx(tmp_path / "train-images-idx3-ubyte")


PACKED = gzip.compress(GOOD)
WRONG_GZIP = {
    "empty": (b"", "is truncated"),
    "no gzip": (GOOD, "is not a gzip file"),
    "cut short": (PACKED[:-20], "is truncated"),
    "checksum cut off": (PACKED[:-8], "is truncated"),
    "checksum wrong": (PACKED[:-8] + bytes(8), "is not a gzip file: .*incorrect data check"),
    "bytes behind": (PACKED + b"more", "has 4 bytes after its gzip data"),
    "two in one": (PACKED + PACKED, rf"has {len(PACKED)} bytes after its gzip data"),
}


@pytest.mark.parametrize(("content", "words"), WRONG_GZIP.values(), ids=WRONG_GZIP.keys())
def test_damaged_gzip_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "x.gz").write_bytes(content)
    with pytest.raises(Damaged, match=rf"data file .*x\.gz {words}"):
        read_idx(tmp_path / "x.gz")


def test_every_flipped_bit_of_gzip_is_damaged_or_harmless(tmp_path: Path) -> None:
    for i in range(0, len(PACKED), 7):
        (tmp_path / "x.gz").write_bytes(PACKED[:i] + bytes([PACKED[i] ^ 4]) + PACKED[i + 1 :])
        try:
            assert (read_idx(tmp_path / "x.gz") == IMAGES).all()
        except Damaged:
            continue


def test_a_gzip_bomb_is_stopped_at_the_limit(tmp_path: Path) -> None:
    compressor = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = compressor.compress(bytes(1 << 26)) + compressor.flush()
    assert len(bomb) < 1 << 17
    (tmp_path / "x.gz").write_bytes(bomb)
    with pytest.raises(Damaged, match=r"x\.gz is truncated, or unzips to more than 1048576 bytes"):
        read_idx(tmp_path / "x.gz", max_bytes=1 << 20)


def test_a_file_over_the_limit_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(101))
    with pytest.raises(Damaged, match="has 101 bytes; at most 100 are expected"):
        read_idx(tmp_path / "x", max_bytes=100)


MISMATCHES = {
    "fewer labels": (
        "train-labels-idx1-ubyte",
        idx_bytes(LABELS[:29]),
        r"\(30, 4, 5\) .* \(29,\) do not match",
    ),
    "labels of two axes": ("t10k-labels-idx1-ubyte", idx_bytes(LABELS.reshape(30, 1)), "do not match"),
    "images of two axes": ("t10k-images-idx3-ubyte", idx_bytes(IMAGES.reshape(30, 20)), "do not match"),
    "labels for images": ("train-images-idx3-ubyte", idx_bytes(LABELS), "do not match"),
    "label 10": (
        "train-labels-idx1-ubyte",
        idx_bytes(LABELS + 1),
        "labels go up to 10, expected 10 classes from 0",
    ),
    "two sizes": (
        "t10k-images-idx3-ubyte",
        idx_bytes(IMAGES.transpose(0, 2, 1)),
        r"training and test images have different sizes, \(4, 5\) and \(5, 4\)",
    ),
}


@pytest.mark.parametrize(("name", "content", "words"), MISMATCHES.values(), ids=MISMATCHES.keys())
def test_images_and_labels_that_do_not_match_are_refused(mnist: Path, name: str, content: bytes, words: str) -> None:
    replace(mnist, name, content)
    with pytest.raises(Damaged, match=words):
        load("mnist", mnist)


def test_a_data_set_without_images_is_refused(mnist: Path) -> None:
    replace(mnist, NAMES[0], idx_bytes(IMAGES[:0]))
    replace(mnist, NAMES[1], idx_bytes(LABELS[:0]))
    with pytest.raises(Damaged, match="do not match"):
        load("mnist", mnist)


@pytest.mark.parametrize("name", NAMES[1:])
def test_each_missing_file_is_named(mnist: Path, name: str) -> None:
    (mnist / "mnist" / name).unlink()
    stem = "-".join(name.split("-")[:2])
    with pytest.raises(NotFound, match=rf"data file .*{stem}-idx\*-ubyte\(\.gz\) does not exist"):
        load("mnist", mnist)


def test_a_missing_set_names_the_searched_folders(tmp_path: Path) -> None:
    with pytest.raises(NotFound) as caught:
        load("fashion-mnist", tmp_path)
    for words in (
        "no fashion-mnist in",
        "FashionMNIST/raw",
        "train-images-idx3-ubyte.gz",
        "--data-dir or MEXIT_DATA",
    ):
        assert words in str(caught.value)
