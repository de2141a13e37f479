"""The report of a data set: what it holds, and each problem on pictures that have it."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sample_images import encode, noise

from mexit.core.printable import json_text
from mexit.data import digits, folder
from mexit.data.dataset_problems import Problem
from mexit.data.dataset_report import DatasetReport, Sizes, report_data_set
from mexit.data.picture_scan import grey_bits, scan_pictures


def fill(root: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 40, part: str = "") -> Path:
    """Make `count` different pictures of each class."""
    for label, name in enumerate(classes):
        (root / part / name).mkdir(parents=True)
        for k in range(count):
            seed = 1000 * label + k + (500 if part == "test" else 0)
            (root / part / name / f"p{seed}.png").write_bytes(encode(noise(20, 16, 3, seed=seed)))
    return root


def report(root: Path, group: str = "auto") -> DatasetReport:
    return report_data_set(folder.load(root), group)


def found(root: Path, kind: str) -> Problem:
    (problem,) = [problem for problem in report(root).problems if problem.kind == kind]
    return problem


def test_a_good_folder_has_no_problems(tmp_path: Path) -> None:
    result = report(fill(tmp_path))
    assert result.problems == ()
    assert not result.blocked
    assert (result.pictures, result.classes, result.counts) == (80, ("cat", "dog"), {"all": (40, 40)})
    assert (result.sizes, result.modes) == (Sizes((20, 16), (20, 16), (20, 16)), {"RGB": 80})
    assert sum(result.splits.values()) == 80
    assert result.splits["calibration"] == 20
    assert result.groups.startswith("no groups")


def test_the_parts_of_a_set_are_counted(tmp_path: Path) -> None:
    fill(tmp_path, part="train")
    fill(tmp_path, count=5, part="test")
    fill(tmp_path, count=0, part="val")
    Image.new("L", (30, 40)).save(tmp_path / "train/cat/large.png")
    Image.fromarray(noise(90, 9)).save(tmp_path / "test/dog/long.png")
    result = report(tmp_path)
    assert result.counts == {"train": (41, 40), "test": (5, 6)}
    assert result.sizes == Sizes((20, 16), (20, 16), (40, 30))
    assert result.modes == {"RGB": 90, "L": 2}


def test_images_in_memory_have_a_report() -> None:
    result = report_data_set(digits.load(), "none")
    assert result.counts["all"][0] == 178
    assert result.modes == {"L": 1797}
    assert result.groups == ""
    assert not result.blocked


def test_the_report_is_json_with_any_file_name(tmp_path: Path) -> None:
    fill(tmp_path)
    os.rename(tmp_path / "cat/p0.png", os.path.join(os.fsencode(tmp_path), b"cat/\xff.png"))
    os.truncate(os.path.join(os.fsencode(tmp_path), b"cat/\xff.png"), 60)
    stored = json.loads(json_text(report(tmp_path).to_json()))
    assert stored["problems"][0]["files"] == [r"cat/\xff.png"]
    assert r"cat/\xff.png: the image is damaged" in stored["problems"][0]["text"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("cut.png", encode(noise(64, 64))[:900], "the image is damaged"),
        ("text.jpg", b"no picture", "10 bytes that are not an image"),
        ("empty.webp", b"", "0 bytes that are not an image"),
        ("float.tif", encode(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF"), "expected grey values of 8 or 16"),
        ("gone.jpg", encode(noise(9, 9, 3), "JPEG")[:300], "the image is damaged"),
    ],
)
def test_unreadable_pictures_block_training(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (fill(tmp_path) / "dog" / name).write_bytes(content)
    problem = found(tmp_path, "unreadable")
    assert problem.blocks
    assert problem.files == (f"dog/{name}",)
    assert f"1 picture that cannot be read: image {tmp_path}/dog/{name}: {words}" in problem.text
    assert problem.text.endswith("remove or replace what is named")


def test_all_unreadable_pictures_are_listed_and_some_are_shown(tmp_path: Path) -> None:
    fill(tmp_path)
    for k in range(5):
        (tmp_path / "cat" / f"p{k}.png").write_bytes(b"x")
    result = report(tmp_path)
    assert result.blocked
    assert len(result.problems[0].files) == 5
    assert "5 pictures that cannot be read" in result.problems[0].text
    assert " and 2 more: remove" in result.problems[0].text


def test_a_class_that_cannot_be_divided_blocks_training(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "bird").mkdir()
    (tmp_path / "bird/0.png").write_bytes(encode(noise(20, 16, 3, seed=77)))
    problem = found(tmp_path, "no splits")
    assert problem.blocks
    assert "bird" in problem.text
    assert report(tmp_path).splits == {}


def test_too_few_pictures_to_calibrate_with(tmp_path: Path) -> None:
    problem = found(fill(tmp_path, count=30), "few to calibrate")
    assert not problem.blocks
    assert "the calibration split has 15 images, and mexit export and calibrate need 20" in problem.text
    assert "add images" in problem.text


def test_a_track_in_train_and_test_is_said(tmp_path: Path) -> None:
    for part, numbers in (("train", range(6)), ("test", (6, 7))):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / part / name).mkdir(parents=True)
            for track, number in itertools.product(range(5), numbers):
                scene = Image.fromarray(noise(5, 5, 3, seed=10 * label + track))
                frame = np.roll(np.asarray(scene.resize((48, 48), Image.Resampling.BICUBIC)), 3 * number, axis=1)
                (tmp_path / part / name / f"{track:05}_{number:05}.png").write_bytes(encode(frame))
    assert found(tmp_path, "few groups").text.startswith("classes with fewer than 5 groups")
    groups = report(tmp_path).groups
    assert groups.startswith("10 groups of pictures (10 in the test part) by track_frame in the names")
    assert "60 training pictures belong to 10 groups that are in the test part too" in groups


def test_one_picture_in_two_classes(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "dog/again.png").write_bytes((tmp_path / "cat/p3.png").read_bytes())
    problem = found(tmp_path, "contradictory labels")
    assert not problem.blocks
    assert problem.files == ("cat/p3.png = dog/again.png",)
    assert "copies" not in {problem.kind for problem in report(tmp_path).problems}


def test_copies_and_near_duplicates_across_parts(tmp_path: Path) -> None:
    fill(tmp_path, part="train")
    fill(tmp_path, part="test")
    (tmp_path / "test/cat/copy.png").write_bytes((tmp_path / "train/cat/p3.png").read_bytes())
    smooth = Image.fromarray(noise(4, 4, 3, seed=5)).resize((60, 50), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "train/dog/s.png")
    smooth.resize((48, 40)).save(tmp_path / "test/dog/t.jpg", quality=85)
    problem = found(tmp_path, "copies across parts")
    assert not problem.blocks
    assert set(problem.files) == {"train/cat/p3.png = test/cat/copy.png", "train/dog/s.png = test/dog/t.jpg"}
    assert "the test accuracy will be too high" in problem.text


def test_copies_in_one_part(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "cat/q.png").write_bytes((tmp_path / "cat/p3.png").read_bytes())
    assert found(tmp_path, "copies").files == ("cat/p3.png = cat/q.png",)


@pytest.mark.parametrize(("size", "tiny"), [((3, 40), True), ((7, 7), True), ((8, 8), False), ((40, 9), False)])
def test_tiny_pictures(size: tuple[int, int], tiny: bool, tmp_path: Path) -> None:
    fill(tmp_path)
    Image.fromarray(noise(size[1], size[0])).save(tmp_path / "cat/x.png")
    kinds = {problem.kind: problem.files for problem in report(tmp_path).problems}
    assert kinds == ({"tiny": ("cat/x.png",)} if tiny else {})


def test_dark_and_blank_pictures(tmp_path: Path) -> None:
    fill(tmp_path)
    twelve = (np.arange(320).reshape(20, 16) * 12).astype(np.uint16)  # up to 3828 of 65535
    Image.fromarray(twelve).save(tmp_path / "cat/dark.png")
    Image.fromarray((twelve * 17).astype(np.uint16)).save(tmp_path / "cat/deep.png")
    Image.new("RGB", (20, 16), "white").save(tmp_path / "dog/white.png")
    result = report(tmp_path)
    kinds = {problem.kind: problem for problem in result.problems}
    assert {kind: problem.files for kind, problem in kinds.items()} == {
        "dark": ("cat/dark.png",),
        "blank": ("dog/white.png",),
    }
    assert "multiply values of 12 bits in 16-bit files by 16" in kinds["dark"].text
    assert result.modes == {"RGB": 81, "I;16": 2}


@pytest.mark.parametrize(("brightest", "bits"), [(1000, 10), (1024, 12), (4095, 12), (4096, 14), (65535, 16), (90, 10)])
def test_the_bits_of_deep_grey_files_are_found(brightest: int, bits: int, tmp_path: Path) -> None:
    fill(tmp_path)
    assert report(tmp_path).grey_bits is None
    for k, top in enumerate((brightest // 3, brightest)):
        values = np.linspace(0, top, 320).astype(np.uint16).reshape(20, 16)
        Image.fromarray(values).save(tmp_path / f"cat/deep{k}.png")
    declared = np.linspace(0, 4095, 320).astype(">u2").tobytes()
    (tmp_path / "dog/declared.pgm").write_bytes(b"P5 16 20 4095\n" + declared)
    result = report(tmp_path)
    assert result.grey_bits == bits
    assert "dark" not in [problem.kind for problem in result.problems]


def test_the_bits_can_be_those_of_some_pictures(tmp_path: Path) -> None:
    """Training looks at its own pictures only."""
    fill(tmp_path)
    for name, top in (("a", 1000), ("b", 4095)):
        Image.fromarray(np.linspace(0, top, 320).astype(np.uint16).reshape(20, 16)).save(tmp_path / f"cat/{name}.png")
    data = folder.load(tmp_path)
    scan = scan_pictures(data)
    bright = data.images.names.index("cat/b.png")  # type: ignore[attr-defined]
    assert grey_bits(scan) == grey_bits(scan, np.asarray([bright])) == 12
    assert grey_bits(scan, np.delete(np.arange(len(data)), bright)) == 10
    assert grey_bits(scan, np.flatnonzero(data.labels)) is None


def test_few_pictures_imbalance_and_names(tmp_path: Path) -> None:
    fill(tmp_path, ("Stop sign", "stop_sign", "yield"), count=20)
    fill(tmp_path / "more", ("x",), count=150)
    for file in (tmp_path / "more/x").iterdir():
        file.rename(tmp_path / "yield" / f"more-{file.name}")
    for k in range(6):
        (tmp_path / "Stop sign" / f"p{k}.png").unlink()
    problems = {problem.kind: problem.text for problem in report(tmp_path, "none").problems}
    assert (
        "classes with fewer than 20 pictures to train with, 1: Stop sign 14: add pictures" in problems["few pictures"]
    )
    assert "the class yield has 170 pictures, Stop sign 14" in problems["imbalance"]
    assert "'Stop sign' and 'stop_sign'" in problems["similar names"]


def test_skipped_files_are_counted(tmp_path: Path) -> None:
    fill(tmp_path)
    for name in ("a.txt", "b.txt", "c.mp4", "._p1.png"):
        (tmp_path / "cat" / name).write_bytes(b"x")
    text = found(tmp_path, "skipped").text
    assert text.endswith("2 .txt, 1 .mp4, 1 hidden or system entry")


def test_a_scan_in_a_time_says_whether_it_is_complete(tmp_path: Path) -> None:
    data = folder.load(fill(tmp_path, count=200))
    part = scan_pictures(data, most_seconds=0.0)
    assert not part.complete
    assert 0 < len(part.index) < len(data)
    assert set(data.labels[part.index].tolist()) == {0, 1}
    assert scan_pictures(data).complete


def test_a_heic_file_without_its_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from mexit.data.image_formats import formats

    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    formats.cache_clear()
    (fill(tmp_path) / "cat/x.jpg").write_bytes(b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf" + bytes(99))
    assert "pip install 'mexit[heic]'" in found(tmp_path, "unreadable").text
    formats.cache_clear()
