"""`mexit run`: which of its arguments is the bundle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import on_terminal, refused, typed
from PIL import Image

from mexit.core.artifact_paths import BUNDLES, remember


def test_an_absent_bundle_is_named_and_no_other_one_answers(digits_bundle: Path, tmp_path: Path) -> None:
    picture = tmp_path / "digit.png"
    Image.new("L", (8, 8)).save(picture)
    assert "bundle bundles/absent does not exist" in refused("run", "bundles/absent", picture, code=2)
    assert typed("run", digits_bundle, picture).exit_code == 0


def test_an_absent_image_is_named_once(digits_bundle: Path) -> None:
    said = refused("run", digits_bundle, "absent.png", code=2)
    assert said.count("absent.png") == 1


def test_the_other_pictures_are_answered_whatever_one_path_is(digits_bundle: Path, tmp_path: Path) -> None:
    pictures = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in pictures:
        Image.new("L", (8, 8)).save(path)
    (tmp_path / "folder").mkdir()
    wrong = {
        "absent": "absent does not exist: the path of a picture is expected",
        "folder": "folder is a folder, a picture is expected: name its pictures",
        str(digits_bundle): "is a bundle, a picture is expected: name the bundle before the pictures",
    }
    for name, words in wrong.items():
        line = ("run", digits_bundle, pictures[0], tmp_path / name, pictures[1])
        shown = typed(*line)
        assert shown.exit_code == 2
        assert [row.split()[-1] for row in shown.stdout.splitlines()[1:]] == ["a.png", "b.png"]
        assert words in " ".join(shown.stderr.split())
        answers = json.loads(typed(*line, "--json").stdout)["predictions"]
        assert ["error" in answer for answer in answers] == [False, True, False]
        assert words in answers[1]["error"]


def test_a_first_path_beside_other_pictures_is_a_picture(bundle_copy: Path, tmp_path: Path) -> None:
    remember(BUNDLES, bundle_copy)
    picture = tmp_path / "films" / "a.png"
    (tmp_path / "films" / "1").mkdir(parents=True)
    Image.new("L", (8, 8)).save(picture)
    for name in ("0", "1"):  # absent, and a folder
        shown = typed("run", picture.parent / name, picture)
        assert shown.exit_code == 2
        assert shown.stdout.splitlines()[1].endswith("a.png")
    assert "a bundle directory or a picture is expected" in refused("run", tmp_path / "other" / "0", picture, code=2)
    assert "is a folder, not an image" in refused("run", tmp_path / "films", picture, code=2)
    Path("a.png").write_bytes(picture.read_bytes())
    assert "bundle 0 does not exist" in refused("run", "0", "a.png", code=2)  # bundles have such names


def test_an_unsure_image_has_no_label(reject_bundle: Path, test_digits, tmp_path: Path) -> None:
    pictures = [tmp_path / f"{number}.png" for number in range(30)]
    for path, pixels in zip(pictures, test_digits[0], strict=False):
        Image.fromarray(pixels).save(path)
    answers = json.loads(typed("run", reject_bundle, *pictures, "--json").stdout)["predictions"]
    unsure = [one for one in answers if one["reason"] == "unsure"]
    assert 0 < len(unsure) < 30
    assert all((one["label"], one["index"]) == (None, None) and sum(one["probabilities"]) > 0.99 for one in unsure)
    shown = typed("run", reject_bundle, *(one["image"] for one in unsure))
    assert shown.exit_code == 0
    assert [row.split()[:2] for row in shown.stdout.splitlines()[1:]] == [["-", "-"]] * len(unsure), "no confidence"
    assert shown.stdout.count("unsure") == len(unsure)
    assert "unsure: below the threshold of mexit calibrate --max-error" in " ".join(shown.stderr.split())


def test_the_exit_code_is_that_of_all_errors_and_the_last_line_counts_them(digits_bundle: Path, tmp_path: Path) -> None:
    good, damaged, absent = (tmp_path / name for name in ("good.png", "damaged.png", "absent.png"))
    Image.new("L", (8, 8)).save(good)
    damaged.write_bytes(b"no image")
    for pictures, code, failed in (
        ((good, damaged), 1, "1 of 2"),
        ((good, absent, absent), 2, "2 of 3"),
        ((absent, good, damaged), 1, "2 of 3"),
        ((damaged, good, absent), 1, "2 of 3"),
    ):
        for options in ((), ("--json",)):
            shown = typed("run", digits_bundle, *pictures, *options)
            assert shown.exit_code == code
            assert shown.stderr.splitlines()[-1] == f"error: {failed} pictures failed"
    assert "pictures failed" not in refused("run", digits_bundle, damaged, code=1)


@pytest.mark.parametrize("columns", [80, 70])
def test_lines_fit_a_terminal(digits_bundle: Path, tmp_path: Path, columns: int) -> None:
    pictures = [tmp_path / f"{number:02}-{'long' * 20}-{number:02}.png" for number in range(3)]
    for path in pictures:
        Image.new("L", (8, 8)).save(path)
    code, lines = on_terminal("run", digits_bundle, *pictures, columns=columns)
    assert code == 0, lines
    assert max(map(len, lines)) <= columns
    rows = [line for line in lines if line.endswith(".png")]
    assert len(rows) == 3
    for number, row in enumerate(rows):
        start, end = row.split()[-1].split("…")
        assert start.startswith(f"{number:02}-")
        assert end.endswith(f"-{number:02}.png")
    assert ("left out at 70 columns: saved; --json has all" in lines) == (columns == 70)
    assert any(" saved " in line for line in lines) == (columns == 80)


def test_each_picture_is_one_line_however_long_its_name(digits_bundle: Path, tmp_path: Path) -> None:
    names = ["a.png", f"{'long' * 40}.png", "日本 :cat: [red].png"]
    for name in names:
        Image.new("L", (8, 8)).save(tmp_path / name)
    header, *lines = typed("run", digits_bundle, *(tmp_path / name for name in names)).stdout.splitlines()
    assert header.split() == ["label", "confidence", "exit", "reason", "MACs", "saved", "time", "image"]
    assert [line[header.index("image") :] for line in lines] == names
