"""File names with any bytes, emoji codes and markup: in messages, tables, JSON and the files that commands write."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from command_line import refused, typed
from PIL import Image

NAMES = (os.fsdecode(b"caf\xe9.png"), "[red]x.png", ":cat:.png", "🐱.png", "a\nb.png", "\x1b[31m.png")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with a digit under each name."""
    (tmp_path / "pictures").mkdir()
    for name in NAMES:
        Image.new("L", (8, 8), 128).save("digit.png")
        shutil.copy("digit.png", Path("pictures", name))
    return Path("pictures")


def test_camera_writes_a_line_for_every_name(pictures: Path, digits_bundle: Path) -> None:
    done = typed("camera", digits_bundle, "--source", pictures, "--jsonl", "answers.jsonl")
    assert done.exit_code == 0, done.output
    lines = Path("answers.jsonl").read_bytes().decode().splitlines()
    shown = [Path(json.loads(line)["source"]).name for line in lines]
    assert sorted(shown) == sorted([r"caf\xe9.png", *NAMES[1:]])


def test_run_shows_every_name(pictures: Path, digits_bundle: Path) -> None:
    paths = [pictures / name for name in NAMES]
    answers = json.loads(typed("run", digits_bundle, *paths, "--json").stdout)["predictions"]
    assert [Path(answer["image"]).name for answer in answers] == [r"caf\xe9.png", *NAMES[1:]]
    table = "".join(typed("run", digits_bundle, *paths).stdout.split())
    assert "\x1b" not in table
    for part in (r"caf\xe9", "[red]x", ":cat:"):
        assert part in table


@pytest.mark.parametrize("name", [":cat:", "[red]x", "x[/]", ":smiley:/:cat:"])
@pytest.mark.parametrize(
    "line", ["inspect {}", "run {} x.png", "serve {}", "train --data {}", "camera {bundle} --source {}"]
)
def test_a_message_has_the_name_as_typed(name: str, line: str, digits_bundle: Path) -> None:
    said = refused(*(word.format(name, bundle=digits_bundle) for word in line.split()), code=2)
    assert name in said


@pytest.mark.parametrize(("name", "shown"), [(os.fsdecode(b"gone\xe9"), r"gone\xe9"), ("a\nb", r"a\x0ab")])
def test_an_odd_name_is_one_line(name: str, shown: str) -> None:
    assert typed("inspect", name).stderr.splitlines()[0].count(shown) == 1


def test_a_folder_of_another_encoding_is_refused_before_it_is_read() -> None:
    said = refused("train", "--data", os.fsdecode(b"folder:caf\xe9"), code=2)
    assert r"--data folder:caf\xe9 has bytes that are not UTF-8, which settings cannot store: rename the folder" in said


def test_a_path_without_the_prefix_is_explained(tmp_path: Path) -> None:
    (tmp_path / "pets").mkdir()
    said = refused("train", "--data", "pets", code=2)
    assert "unknown data set 'pets'" in said
    assert "for the folder write folder:pets" in said
