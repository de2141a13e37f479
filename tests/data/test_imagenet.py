"""ImageNet's folders, on small copies that are made here, with the unusual files that it has."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sample_images import encode, noise, spec

from mexit.data import imagenet, registry
from mexit.data.splits import split
from mexit.errors import BadInput, NotFound

WNIDS = ("n01440764", "n01443537", "n02105855")


def jpeg(seed: int) -> bytes:
    return encode(noise(20 + seed % 3, 30, 3, seed=seed), "JPEG")


def make_imagenet(root: Path, counts: tuple[int, int] = (40, 3)) -> Path:
    """Make `train` and `val`, each with a folder for each of three classes."""
    for part, count in zip(("train", "val"), counts, strict=True):
        for label, wnid in enumerate(WNIDS):
            (root / part / wnid).mkdir(parents=True)
            for k in range(count):
                name = f"{wnid}_{k}.JPEG" if part == "train" else f"ILSVRC2012_val_{100 * label + k:08}.JPEG"
                (root / part / wnid / name).write_bytes(jpeg(1000 * label + k))
    return root


def test_val_is_the_official_test_part(tmp_path: Path) -> None:
    make_imagenet(tmp_path / "imagenet")
    data = registry.load("imagenet", tmp_path)
    assert data.classes == WNIDS
    assert data.labels.tolist() == sorted([0, 1, 2] * 40) + sorted([0, 1, 2] * 3)
    for i, label in enumerate(data.labels.tolist()):
        parts = Path(data.images.name(i)).parts
        assert parts[-2] == WNIDS[label]
        assert (parts[-3] == "val") == (i >= 120)
    assert split(data).part("test").tolist() == list(range(120, 129))


def test_words_txt_names_the_classes(tmp_path: Path) -> None:
    make_imagenet(tmp_path)
    (tmp_path / "words.txt").write_text(
        "n01440764\ttench, Tinca tinca\nn01443537\tgoldfish\n\nn02105855\tShetland sheepdog, Shetland\n"
    )
    assert imagenet.load(tmp_path).classes == ("tench", "goldfish", "Shetland sheepdog")


def test_cmyk_grey_png_and_turned_files_are_decoded_by_content(tmp_path: Path) -> None:
    """ImageNet has grey and CMYK JPEG files, a PNG file named .JPEG, and photographs with an orientation tag."""
    make_imagenet(tmp_path)
    folder_of_one = tmp_path / "train" / WNIDS[0]
    colour = Image.fromarray(noise(6, 8, 3)).resize((48, 36))
    turned = Image.Exif()
    turned[0x0112] = 6  # to be displayed a quarter turn clockwise
    files = {
        "cmyk": encode(colour.convert("CMYK"), "JPEG", quality=95),
        "grey": encode(colour.convert("L"), "JPEG", quality=95),
        "png": encode(colour, "PNG"),
        "turned": encode(colour.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95, exif=turned.tobytes()),
    }
    for k, content in enumerate(files.values()):
        (folder_of_one / f"{WNIDS[0]}_{k}.JPEG").write_bytes(content)
    assert [Image.open(io.BytesIO(files[name])).mode for name in ("cmyk", "grey")] == ["CMYK", "L"]
    input_spec = spec(3, (36, 48))
    data = imagenet.load(tmp_path)
    names = [data.images.name(i).rpartition("_")[2] for i in range(40)]
    index = np.asarray([names.index(f"{k}.JPEG") for k in range(4)])
    images = dict(zip(files, data.batch(index, input_spec), strict=True))
    exact = np.moveaxis(np.asarray(colour), 2, 0) / np.float32(255)
    assert (images["png"] == exact).all()
    for name in ("cmyk", "turned"):
        assert np.abs(images[name] - exact).mean() < 0.03, name
    assert (images["grey"][0] == images["grey"][1]).all()
    assert np.abs(images["grey"][0] - np.tensordot([0.299, 0.587, 0.114], exact, 1)).mean() < 0.03


def test_a_missing_set_names_the_searched_folders(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(
        NotFound, match=rf"no imagenet in {tmp_path}/imagenet or {tmp_path}: expected the folders train and val"
    ):
        imagenet.load(tmp_path)


def test_a_validation_folder_without_class_folders_is_refused(tmp_path: Path) -> None:
    make_imagenet(tmp_path, (2, 0))
    for wnid in WNIDS:
        (tmp_path / "val" / wnid).rmdir()
    (tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(jpeg(0))
    with pytest.raises(BadInput, match="val holds images without class folders: move each into the folder of its"):
        imagenet.load(tmp_path)


def test_other_class_folders_are_refused_with_the_option_that_reads_them(tmp_path: Path) -> None:
    make_imagenet(tmp_path, (2, 2))
    (tmp_path / "train" / "cats").mkdir()
    with pytest.raises(BadInput, match=f"train holds cats, which are not WordNet.*--data folder:{tmp_path}"):
        imagenet.load(tmp_path)


def test_a_class_that_one_part_lacks_is_named(tmp_path: Path) -> None:
    make_imagenet(tmp_path, (2, 2))
    for file in (tmp_path / "val" / WNIDS[1]).iterdir():
        file.unlink()
    with pytest.raises(BadInput, match=rf"train has 3 classes, .*val 2; .*: only train has {WNIDS[1]}"):
        imagenet.load(tmp_path)
