"""`mexit run`: which of its arguments is the bundle."""

from __future__ import annotations

import json
from pathlib import Path

from command_line import refused, typed
from PIL import Image


def test_an_absent_bundle_is_named_and_no_other_one_answers(digits_bundle: Path, tmp_path: Path) -> None:
    picture = tmp_path / "digit.png"
    Image.new("L", (8, 8)).save(picture)
    assert "bundle bundles/absent does not exist" in refused("run", "bundles/absent", picture, code=2)
    assert typed("run", digits_bundle, picture).exit_code == 0


def test_an_absent_image_is_named_once(digits_bundle: Path) -> None:
    said = refused("run", digits_bundle, "absent.png", code=2)
    assert said.count("absent.png") == 1


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
    assert shown.output.count("unsure") == len(unsure)


def test_each_picture_is_one_line_however_long_its_name(digits_bundle: Path, tmp_path: Path) -> None:
    names = ["a.png", f"{'long' * 40}.png", "日本 :cat: [red].png"]
    for name in names:
        Image.new("L", (8, 8)).save(tmp_path / name)
    header, *lines = typed("run", digits_bundle, *(tmp_path / name for name in names)).stdout.splitlines()
    assert header.split() == ["label", "confidence", "exit", "reason", "MACs", "saved", "time", "image"]
    assert [line[header.index("image") :] for line in lines] == names
