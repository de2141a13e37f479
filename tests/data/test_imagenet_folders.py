"""ImageNet's folders on miniatures of them, the odd files that it is known for, and the hash of large sets."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from pictures import encode, noise, spec
from PIL import Image

from mexit.data import folder, imagenet, registry
from mexit.data.image_files import Listing, pictures
from mexit.data.preprocess import prepare
from mexit.data.splits import split
from mexit.errors import BadInput, Damaged, NotFound

WNIDS = ("n01440764", "n01443537", "n02105855")


def photograph(seed: int) -> bytes:
    return encode(noise(20 + seed % 3, 30, 3, seed=seed), "JPEG")


def miniature(root: Path, counts: tuple[int, int] = (40, 3)) -> Path:
    """`train` and `val` with a folder for each of three classes."""
    for part, count in zip(("train", "val"), counts, strict=True):
        for place, wnid in enumerate(WNIDS):
            (root / part / wnid).mkdir(parents=True)
            for k in range(count):
                name = f"{wnid}_{k}.JPEG" if part == "train" else f"ILSVRC2012_val_{100 * place + k:08}.JPEG"
                (root / part / wnid / name).write_bytes(photograph(1000 * place + k))
    return root


def test_val_is_the_official_test_part(tmp_path: Path) -> None:
    miniature(tmp_path / "imagenet")
    data = registry.load("imagenet", tmp_path)
    assert data.classes == WNIDS
    assert data.labels.tolist() == sorted([0, 1, 2] * 40) + sorted([0, 1, 2] * 3)
    for place, label in enumerate(data.labels.tolist()):
        parts = Path(data.images.name(place)).parts
        assert parts[-2] == WNIDS[label]
        assert (parts[-3] == "val") == (place >= 120)
    assert split(data).part("test").tolist() == list(range(120, 129))


def test_classes_take_their_words_where_they_are_given(tmp_path: Path) -> None:
    miniature(tmp_path)
    (tmp_path / "words.txt").write_text(
        "n01440764\ttench, Tinca tinca\nn01443537\tgoldfish\n\nn02105855\tShetland sheepdog, Shetland\n"
    )
    assert imagenet.load(tmp_path).classes == ("tench", "goldfish", "Shetland sheepdog")


def test_colour_models_formats_and_orientation_go_by_content(tmp_path: Path) -> None:
    """ImageNet holds grey and CMYK JPEG files, a PNG file named JPEG, and photographs that lie on their side."""
    miniature(tmp_path)
    folder_of_one = tmp_path / "train" / WNIDS[0]
    colour = Image.fromarray(noise(6, 8, 3)).resize((48, 36))
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned a quarter clockwise
    odd = {
        "cmyk": encode(colour.convert("CMYK"), "JPEG", quality=95),
        "grey": encode(colour.convert("L"), "JPEG", quality=95),
        "png": encode(colour, "PNG"),
        "turned": encode(colour.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95, exif=turned.tobytes()),
    }
    for k, content in enumerate(odd.values()):
        (folder_of_one / f"{WNIDS[0]}_{k}.JPEG").write_bytes(content)
    assert [Image.open(io.BytesIO(odd[name])).mode for name in ("cmyk", "grey")] == ["CMYK", "L"]
    wanted = spec(3, (36, 48))
    data = imagenet.load(tmp_path)
    names = [data.images.name(place).rpartition("_")[2] for place in range(40)]
    places = np.asarray([names.index(f"{k}.JPEG") for k in range(4)])
    found = dict(zip(odd, data.batch(places, wanted), strict=True))
    exact = np.moveaxis(np.asarray(colour), 2, 0) / np.float32(255)
    assert (found["png"] == exact).all()
    for name in ("cmyk", "turned"):
        assert np.abs(found[name] - exact).mean() < 0.03, name
    assert (found["grey"][0] == found["grey"][1]).all()
    assert np.abs(found["grey"][0] - np.tensordot([0.299, 0.587, 0.114], exact, 1)).mean() < 0.03


def test_a_missing_set_says_what_belongs_where(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(
        NotFound, match=rf"no imagenet in {tmp_path}/imagenet or {tmp_path}: its folders train and val"
    ):
        imagenet.load(tmp_path)


def test_a_flat_validation_folder_says_what_to_do(tmp_path: Path) -> None:
    miniature(tmp_path, (2, 0))
    for wnid in WNIDS:
        (tmp_path / "val" / wnid).rmdir()
    (tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(photograph(0))
    with pytest.raises(
        BadInput, match="val holds pictures without class folders: move each into the folder of its"
    ):
        imagenet.load(tmp_path)


def test_folders_of_other_classes_are_sent_to_the_folder_reader(tmp_path: Path) -> None:
    miniature(tmp_path, (2, 2))
    (tmp_path / "train" / "cats").mkdir()
    with pytest.raises(BadInput, match=f"train holds cats, which are no WordNet.*--data folder:{tmp_path}"):
        imagenet.load(tmp_path)


def test_a_part_without_a_class_names_it(tmp_path: Path) -> None:
    miniature(tmp_path, (2, 2))
    for file in (tmp_path / "val" / WNIDS[1]).iterdir():
        file.unlink()
    with pytest.raises(BadInput, match=rf"train has 3 classes, .*val 2, .*: only train has {WNIDS[1]}"):
        imagenet.load(tmp_path)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("x")
    with pytest.raises(Damaged, match=f"image folder {tmp_path}/a file cannot be listed: Not a directory"):
        pictures(tmp_path, "a file")


def listing(root: Path) -> Listing:
    """One class a part, so that labels are in the hash."""
    found = Listing(root)
    for label, part in enumerate(("train", "val")):
        found.add(pictures(root, part), label)
    return found


@pytest.mark.parametrize(
    ("limit", "sees_pixels", "sees_names"), [(1 << 30, True, False), (0, False, True)], ids=["small", "large"]
)
def test_the_hash_of_a_large_set_covers_names_and_sizes_that_of_a_small_one_content(
    tmp_path: Path, limit: int, sees_pixels: bool, sees_names: bool
) -> None:
    miniature(tmp_path, (2, 2))
    before = listing(tmp_path).digest(limit)
    assert listing(tmp_path).digest(limit) == before
    file = tmp_path / "train" / WNIDS[0] / f"{WNIDS[0]}_0.JPEG"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"x")
    assert (listing(tmp_path).digest(limit) != before) == sees_pixels
    file.write_bytes(content + b"x")
    assert listing(tmp_path).digest(limit) != before
    file.write_bytes(content)
    last = tmp_path / "train" / WNIDS[2] / f"{WNIDS[2]}_1.JPEG"
    last.rename(last.with_name(f"{WNIDS[2]}_2.JPEG"))  # still the last of its part
    assert (listing(tmp_path).digest(limit) != before) == sees_names


def test_the_two_forms_of_the_hash_differ_and_the_size_of_the_set_decides(tmp_path: Path) -> None:
    found = listing(miniature(tmp_path, (2, 2)))
    total = sum(found.sizes)
    assert found.digest(total) == found.digest(1 << 30) != found.digest(total - 1) == found.digest(0)


def test_files_that_only_look_like_images_are_passed_over(tmp_path: Path) -> None:
    for name in (".png", "loop.png", "notes.txt", "a.PNG"):
        (tmp_path / name).write_bytes(photograph(0))
    (tmp_path / "loop.png").unlink()
    (tmp_path / "loop.png").symlink_to("loop.png")
    assert [picture.name for picture in pictures(tmp_path)] == ["a.PNG"]


def test_pictures_alone_have_no_labels(tmp_path: Path) -> None:
    for k in (2, 0, 1):
        (tmp_path / f"{k}.png").write_bytes(encode(noise(5, 5, 3, seed=k)))
    (tmp_path / "empty").mkdir()
    found = registry.load_pictures(f"folder:{tmp_path}")
    assert found is not None
    assert len(found) == 3
    expected = prepare((tmp_path / "1.png").read_bytes(), spec(3))
    assert found.batch(np.asarray([1]), spec(3)).tobytes() == expected.tobytes()
    with pytest.raises(BadInput, match=r"holds 0 class folder\(s\) with images; at least 2 are needed"):
        folder.load(tmp_path)


def test_class_folders_and_other_sets_are_not_pictures_alone(tmp_path: Path) -> None:
    miniature(tmp_path, (1, 1))
    (tmp_path / "train" / "readme.png").write_bytes(encode(noise(4, 4)))
    assert registry.load_pictures(f"folder:{tmp_path}/train") is None
    assert registry.load_pictures("digits") is None
    (tmp_path / "nothing").mkdir()
    with pytest.raises(BadInput, match="nothing holds no images"):
        folder.load_pictures(tmp_path / "nothing")
    with pytest.raises(NotFound, match=r"image folder .* does not exist"):
        registry.load_pictures(f"folder:{tmp_path}/nowhere")
