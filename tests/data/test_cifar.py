"""CIFAR batches are read exactly, refused by name when damaged, and cannot run code."""

from __future__ import annotations

import os
import pickle
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mexit.data import cifar, registry
from mexit.data.splits import split
from mexit.errors import Damaged, NotFound, Untrusted

RNG = np.random.default_rng(0)
LABEL_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CIFAR10, CIFAR100 = "cifar-10-batches-py", "cifar-100-python"


def python2_pickle(value: Any) -> bytes:
    """A pickle as Python 2 wrote the original files: protocol 2, byte strings, numpy's old module."""
    return b"\x80\x02" + _python2(value) + b"."


def _python2(value: Any) -> bytes:
    if isinstance(value, str):
        return b"U" + bytes([len(value)]) + value.encode()
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(_python2, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(_python2(item) for pair in value.items() for item in pair) + b"u"
    assert isinstance(value, np.ndarray)
    code = f"{value.dtype.kind}{value.dtype.itemsize}"
    raw = value.tobytes()
    return (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR("
        + b"K\x01("
        + b"".join(map(_python2, value.shape))
        + b"tcnumpy\ndtype\n("
        + _python2(code)
        + b"K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        + b"\x89T"
        + struct.pack("<i", len(raw))
        + raw
        + b"tb"
    )


def batch(count: int, classes: int = 10, key: str = "labels") -> dict[str, Any]:
    return {
        "batch_label": "training batch 1 of 5",
        key: [i % classes for i in range(count)],
        "data": RNG.integers(0, 256, (count, 3072), dtype=np.uint8),
        "filenames": [f"{i}.png" for i in range(count)],
    }


def write(folder: Path, name: str, value: Any) -> None:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / name).write_bytes(value if isinstance(value, bytes) else python2_pickle(value))


@pytest.fixture
def parts(tmp_path: Path) -> list[dict[str, Any]]:
    """A CIFAR-10 of five batches of 40 images and 20 test images, below tmp_path; returns the dictionaries."""
    batches = [batch(40) for _ in range(5)] + [batch(20)]
    for k, part in enumerate(batches[:5], start=1):
        write(tmp_path / CIFAR10, f"data_batch_{k}", part)
    write(tmp_path / CIFAR10, "test_batch", batches[5])
    write(
        tmp_path / CIFAR10,
        "batches.meta",
        {"num_cases_per_batch": 40, "label_names": LABEL_NAMES, "num_vis": 3072},
    )
    return batches


def test_images_labels_classes_and_the_official_test_part(tmp_path: Path, parts: list[dict[str, Any]]) -> None:
    data = cifar.load("cifar10", tmp_path)
    assert (data.name, len(data), data.classes) == ("cifar10", 220, tuple(LABEL_NAMES))
    assert data.labels.tolist() == [label for part in parts for label in part["labels"]]
    assert data.official_test is not None
    assert data.official_test.tolist() == list(range(200, 220))
    (image,) = data.images.at(np.asarray([45]))
    red, green, blue = parts[1]["data"][5].reshape(3, 32, 32)
    assert image.shape == (32, 32, 3)
    for plane, expected in enumerate((red, green, blue)):
        assert (image[:, :, plane] == expected).all()


def test_the_splits_keep_the_test_part(tmp_path: Path, parts: list[dict[str, Any]]) -> None:
    splits = split(cifar.load("cifar10", tmp_path))
    assert splits.part("test").tolist() == list(range(200, 220))
    assert splits.part("train").max() < 200


def test_the_hash_covers_pixels_and_labels(tmp_path: Path, parts: list[dict[str, Any]]) -> None:
    hashes = {cifar.load("cifar10", tmp_path).sha256}
    parts[2]["data"][7, 99] ^= 1
    write(tmp_path / CIFAR10, "data_batch_3", parts[2])
    hashes.add(cifar.load("cifar10", tmp_path).sha256)
    parts[2]["labels"][7] ^= 1
    write(tmp_path / CIFAR10, "data_batch_3", parts[2])
    hashes.add(cifar.load("cifar10", tmp_path).sha256)
    assert len(hashes) == 3


def test_cifar_100_has_its_fine_classes(tmp_path: Path) -> None:
    names = [f"class {label}" for label in range(100)]
    coarse = {"coarse_labels": [0] * 200}
    write(tmp_path / CIFAR100, "train", batch(200, 100, "fine_labels") | coarse)
    write(tmp_path / CIFAR100, "test", batch(100, 100, "fine_labels") | {"coarse_labels": [0] * 100})
    write(tmp_path / CIFAR100, "meta", {"fine_label_names": names, "coarse_label_names": ["one"]})
    data = registry.load("cifar100", tmp_path)
    assert (data.classes, len(data), data.labels.max()) == (tuple(names), 300, 99)
    assert data.official_test is not None
    assert data.official_test.tolist() == list(range(200, 300))


@pytest.mark.parametrize("protocol", range(2, 5))
def test_batches_written_again_by_python_3_are_read(tmp_path: Path, protocol: int) -> None:
    one = batch(10)
    write(tmp_path, "one", pickle.dumps(one, protocol))
    content = cifar.read_pickle(tmp_path / "one")
    assert content["labels"] == one["labels"]
    assert (content["data"].values == one["data"]).all()


def test_the_folder_itself_may_be_named(tmp_path: Path, parts: list[dict[str, Any]]) -> None:
    assert len(registry.load("cifar10", tmp_path / CIFAR10)) == 220


class Attack:
    """Unpickles into a call."""

    def __init__(self, call: Any, *values: Any) -> None:
        self.call = (call, values)

    def __reduce__(self) -> Any:
        return self.call


TOUCH = "touch unpickled"
HOSTILE = {
    "os.system": pickle.dumps(Attack(os.system, TOUCH), 2),
    "builtins.eval": pickle.dumps({"data": Attack(eval, f"__import__('os').system('{TOUCH}')")}, 2),
    "by opcode": b"\x80\x02(X\x0f\x00\x00\x00touch unpickledios\nsystem\n.",
    "by stack": pickle.dumps(Attack(os.system, TOUCH), 4),
    "numpy's loader": b"cnumpy\nload\n(U\x01xtR.",
    "attribute of an array": b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.tofile\x93.",
    "object array": pickle.dumps({"data": np.asarray([Attack(os.system, TOUCH)], object)}, 2),
    "another pickle": pickle.dumps(Attack(pickle.loads, pickle.dumps(Attack(os.system, TOUCH))), 2),
    "extension registry": b"\x80\x02\x82\x01.",
    "persistent id": b"\x80\x02U\x01xQ.",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_pickle_with_any_other_reference_is_refused_and_runs_nothing(
    tmp_path: Path, parts: list[dict[str, Any]], content: bytes
) -> None:
    write(tmp_path / CIFAR10, "data_batch_2", content)
    with pytest.raises((Untrusted, Damaged), match="data_batch_2"):
        cifar.load("cifar10", tmp_path)
    assert not (Path.cwd() / "unpickled").exists()


def test_the_error_names_the_reference(tmp_path: Path) -> None:
    write(tmp_path, "evil", HOSTILE["os.system"])
    with pytest.raises(Untrusted, match=r"evil refers to \w+\.system: only numpy arrays, containers"):
        cifar.read_pickle(tmp_path / "evil")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": None}, r"no uint8 array 'data' \(N, 3072\)"),
        ({"data": [1, 2]}, "no uint8 array 'data'"),
        ({"data": np.zeros((40, 3071), np.uint8)}, "no uint8 array 'data'"),
        ({"data": np.zeros(40 * 3072, np.uint8)}, "no uint8 array 'data'"),
        ({"data": np.zeros((40, 3072), np.int8)}, "an array that is not uint8"),
        ({"data": np.zeros((39, 3072), np.uint8)}, "39 images and 40 labels under 'labels'"),
        ({"labels": list(range(40))}, "outside the 10 classes 0 to 9"),
        ({"labels": [-1] * 40}, "outside the 10 classes"),
        ({"labels": ["0"] * 40}, "outside the 10 classes"),
        ({"labels": None}, "40 images and no labels"),
        ({"data": np.zeros((0, 3072), np.uint8), "labels": []}, "0 images and 0 labels"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_batch_is_named(
    tmp_path: Path, parts: list[dict[str, Any]], change: dict[str, Any], words: str
) -> None:
    changed = {key: value for key, value in (parts[3] | change).items() if value is not None}
    write(tmp_path / CIFAR10, "data_batch_4", changed)
    with pytest.raises(Damaged, match=f"data_batch_4.*{words}"):
        cifar.load("cifar10", tmp_path)


def test_a_truncated_or_foreign_file_is_named(tmp_path: Path, parts: list[dict[str, Any]]) -> None:
    whole = python2_pickle(parts[0])
    for content in (whole[:-1], whole[: len(whole) // 2], b"", b"\0" * 50, python2_pickle([1, 2]), b"\x80\x09."):
        write(tmp_path / CIFAR10, "data_batch_1", content)
        with pytest.raises(Damaged, match="data_batch_1"):
            cifar.load("cifar10", tmp_path)


def test_random_damage_is_harmless_or_a_mexit_error(tmp_path: Path) -> None:
    whole = python2_pickle(batch(2))
    rng = np.random.default_rng(1)
    outside_pixels = [i for i in range(len(whole)) if not 200 < i < len(whole) - 200]
    for i in rng.choice(outside_pixels, 150).tolist():
        broken = bytearray(whole)
        broken[i] ^= 1 << int(rng.integers(8))
        write(tmp_path, "broken", bytes(broken))
        with suppress(Damaged, Untrusted):
            cifar.read_pickle(tmp_path / "broken")


def test_missing_class_names_are_refused(tmp_path: Path, parts: list[dict[str, Any]]) -> None:
    for meta in ({"num_vis": 3072}, {"label_names": []}, {"label_names": [1, 2]}):
        write(tmp_path / CIFAR10, "batches.meta", meta)
        with pytest.raises(Damaged, match=r"batches\.meta has no list 'label_names'"):
            cifar.load("cifar10", tmp_path)


def test_a_missing_file_is_named(tmp_path: Path, parts: list[dict[str, Any]]) -> None:
    (tmp_path / CIFAR10 / "data_batch_5").unlink()
    with pytest.raises(NotFound, match="data_batch_5"):
        cifar.load("cifar10", tmp_path)
    with pytest.raises(NotFound, match=r"cifar-100-python.*train, test, meta.*--data-dir"):
        cifar.load("cifar100", tmp_path)


def test_a_file_over_the_limit_is_not_read(tmp_path: Path, parts: list[dict[str, Any]]) -> None:
    with (tmp_path / CIFAR10 / "data_batch_1").open("wb") as file:
        file.truncate(cifar.MAX_BYTES + 1)  # sparse
    with pytest.raises(Damaged, match=f"at most {cifar.MAX_BYTES}"):
        cifar.load("cifar10", tmp_path)


def test_cifar_10_has_the_published_statistics(data_dir: Path) -> None:
    if not (data_dir / CIFAR10 / "test_batch").exists():
        pytest.skip(f"needs the python batches of CIFAR-10 in {data_dir}")
    data = cifar.load("cifar10", data_dir)
    assert (len(data), data.classes) == (60_000, tuple(LABEL_NAMES))
    assert np.bincount(data.labels).tolist() == [6000] * 10
    assert data.official_test is not None
    assert np.bincount(data.labels[data.official_test]).tolist() == [1000] * 10
    # The published mean colour of the training part.
    pixels = data.images.at(np.arange(50_000))
    means = [pixels[:, :, :, plane].mean() / 255 for plane in range(3)]
    assert means == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-4)
