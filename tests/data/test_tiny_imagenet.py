"""Tiny-ImageNet's layout, on a small copy with five classes that is made here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sample_images import encode, noise, spec

from mexit.data import registry, tiny_imagenet
from mexit.data.preprocess import prepare
from mexit.data.splits import split
from mexit.errors import BadInput, Damaged, NotFound

WNIDS = ("n02124075", "n01443537", "n02769748", "n03126707", "n02012849")  # not sorted, as in the archive
WORDS = """n00001740\tentity
n01443537\tgoldfish, Carassius auratus
n02012849\tcrane
n02124075\tEgyptian cat
n02769748\tbackpack, back pack, knapsack, packsack
n03126707\tcrane
"""
TRAINING, VALIDATION = 30, 4


def jpeg(seed: int, *, grey: bool = False) -> bytes:
    return encode(noise(64, 64, seed=seed) if grey else noise(64, 64, 3, seed=seed), "JPEG")


def make_tiny_imagenet(data_dir: Path) -> Path:
    """Make `tiny-imagenet-200` with 5 classes."""
    root = data_dir / "tiny-imagenet-200"
    for label, wnid in enumerate(WNIDS):
        images = root / "train" / wnid / "images"
        images.mkdir(parents=True)
        for k in range(TRAINING):
            (images / f"{wnid}_{k}.JPEG").write_bytes(jpeg(100 * label + k, grey=k == 1))
        boxes = "".join(f"{wnid}_{k}.JPEG\t0\t0\t62\t62\n" for k in range(TRAINING))
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text(boxes)
    lines = []
    for part in ("val", "test"):
        (root / part / "images").mkdir(parents=True)
        for k in range(len(WNIDS) * VALIDATION):
            (root / part / "images" / f"{part}_{k}.JPEG").write_bytes(jpeg(1000 + k))
            lines.append(f"{part}_{k}.JPEG\t{WNIDS[k % len(WNIDS)]}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(line for line in lines if line.startswith("val")))
    (root / "wnids.txt").write_text("\n".join(WNIDS))
    (root / "words.txt").write_text(WORDS)
    return root


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set that tests only read."""
    return make_tiny_imagenet(tmp_path_factory.mktemp("data"))


def test_training_is_train_and_the_official_test_part_is_val(ready: Path) -> None:
    data = registry.load("tiny-imagenet", ready.parent)
    count = len(WNIDS) * TRAINING
    assert data.official_test is not None
    assert data.official_test.tolist() == list(range(count, count + len(WNIDS) * VALIDATION))
    assert np.bincount(data.labels[:count]).tolist() == [TRAINING] * len(WNIDS)
    files = {data.images.name(i).rpartition("/")[2] for i in range(len(data))}
    assert not any(name.startswith("test_") for name in files), "the test part has no labels"
    assert len(files) == len(data)
    assert split(data).part("test").tolist() == data.official_test.tolist()


def test_every_image_has_the_label_of_its_folder_or_of_its_line(ready: Path) -> None:
    data = tiny_imagenet.load(ready)
    wnids = sorted(WNIDS)
    for i, label in enumerate(data.labels.tolist()):
        path = Path(data.images.name(i).removeprefix("image "))
        number = path.stem.rpartition("_")[2]
        expected = WNIDS[int(number) % len(WNIDS)] if path.name.startswith("val") else path.parent.parent.name
        assert wnids[label] == expected, path


def test_classes_have_their_first_word_unless_two_share_it(ready: Path) -> None:
    data = tiny_imagenet.load(ready)
    assert data.classes == ("goldfish", "n02012849", "Egyptian cat", "backpack", "n03126707")


def test_pixels_are_those_of_the_file_and_grey_becomes_three_equal_planes(ready: Path) -> None:
    data = tiny_imagenet.load(ready)
    input_spec = spec(3, (64, 64))
    tensor = data.batch(np.asarray([0, 2]), input_spec)
    assert tensor.shape == (2, 3, 64, 64)
    file = ready / "train" / "n01443537" / "images" / "n01443537_0.JPEG"
    assert tensor[0].tobytes() == prepare(file.read_bytes(), input_spec).tobytes()
    grey = next(i for i in range(len(data)) if data.images.name(i).endswith("_1.JPEG"))
    red, green, blue = data.batch(np.asarray([grey]), input_spec)[0]
    assert Image.open(data.images.name(grey).removeprefix("image ")).mode == "L"
    assert (red == green).all()
    assert (red == blue).all()
    assert red.std() > 0


def test_images_are_decoded_on_access(tmp_path: Path) -> None:
    root = make_tiny_imagenet(tmp_path)
    bad = root / "train" / WNIDS[0] / "images" / f"{WNIDS[0]}_5.JPEG"
    bad.write_bytes(jpeg(0)[:300])
    data = tiny_imagenet.load(root)
    bad_index = next(i for i in range(len(data)) if data.images.name(i) == f"image {bad}")
    assert data.batch(np.asarray([bad_index + 1]), spec(3, (64, 64))).shape == (1, 3, 64, 64)
    with pytest.raises(BadInput, match=f"image {bad}: the image is damaged"):
        data.batch(np.asarray([bad_index + 1, bad_index]), spec(3, (64, 64)))


def test_a_missing_set_names_the_searched_folders(tmp_path: Path) -> None:
    with pytest.raises(
        NotFound, match=rf"no tiny-imagenet in {tmp_path}/tiny-imagenet-200 or {tmp_path}: expected wnids\.txt"
    ):
        tiny_imagenet.load(tmp_path)


def swap(path: str, old: str, new: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        text = (root / path).read_text()
        assert old in text
        (root / path).write_text(text.replace(old, new, 1))

    return change


def remove(path: str) -> Callable[[Path], None]:
    return lambda root: (root / path).unlink()


def move(path: str, to: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        (root / to).parent.mkdir(parents=True, exist_ok=True)
        (root / path).rename(root / to)

    return change


ANNOTATIONS = "val/val_annotations.txt"


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (remove("words.txt"), NotFound, r"words\.txt does not exist"),
        (remove(ANNOTATIONS), NotFound, r"val_annotations\.txt does not exist"),
        (swap("wnids.txt", "n02769748", "n0276974x"), Damaged, r"wnids\.txt: expected WordNet.*'n0276974x'"),
        (swap("wnids.txt", "n02769748", "n02124075"), Damaged, r"wnids\.txt names 5 classes, 4 of them different"),
        (swap("wnids.txt", "n02769748", "n02769749"), Damaged, r"train holds n02769748, which wnids\.txt"),
        (swap("words.txt", "n02012849\t", "n02012849 "), Damaged, r"words\.txt, line 3: expected n12345678"),
        (swap(ANNOTATIONS, "\t0\t32\t44\t62\n", "\n"), Damaged, r"annotations\.txt, line 1: expected a file"),
        (swap(ANNOTATIONS, "val_1.JPEG\tn01443537", "val_1.JPEG\tn01443538"), Damaged, "line 2: the class 'n014"),
        (swap(ANNOTATIONS, "val_1.JPEG", "val_0.JPEG"), Damaged, r"line 2: a second line for 'val_0\.JPEG'"),
        (swap(ANNOTATIONS, "val_1.JPEG", "val_99.JPEG"), NotFound, r"1 of 20 images .* such as val_99\.JPEG;"),
        (move("test/images/test_0.JPEG", "val/images/x.JPEG"), Damaged, r"1 images in .* no line in .*x\.JPEG"),
        (move("train/n02124075/images", "elsewhere"), NotFound, r"train/n02124075/images does not exist, although"),
        (move("train", "training"), NotFound, r"image folder .*/train does not exist"),
        (move("val/images", "val/pictures"), NotFound, r"20 of 20 images .* are not in .*val/images"),
    ],
    ids=[
        "no words", "no annotations", "bad number", "number twice", "unknown folder", "words without tab",
        "short line", "unknown class", "second line", "missing image", "image without line", "missing class",
        "no train", "no val images",
    ],
)  # fmt: skip
def test_the_error_names_what_is_wrong(
    tmp_path: Path, change: Callable[[Path], None], error: type[Exception], words: str
) -> None:
    root = make_tiny_imagenet(tmp_path)
    change(root)
    with pytest.raises(error, match=words):
        tiny_imagenet.load(root)


def test_a_class_without_images_is_refused(tmp_path: Path) -> None:
    root = make_tiny_imagenet(tmp_path)
    for file in (root / "train" / "n02124075" / "images").iterdir():
        file.unlink()
    with pytest.raises(Damaged, match="n02124075/images holds no images"):
        tiny_imagenet.load(root)
