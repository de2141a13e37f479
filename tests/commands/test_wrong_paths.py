"""A file, a run or a bundle where another of them is expected is named as what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import refused


@pytest.fixture(autouse=True)
def _files() -> None:
    for name in ("x.onnx", "x.png", "notes.txt"):
        Path(name).write_bytes(b"content")
    Path("folder").mkdir()


@pytest.mark.parametrize(
    "line", ["export x.onnx", "evaluate x.onnx", "train --resume --out x.onnx", "export notes.txt"]
)
def test_a_file_is_no_run(line: str) -> None:
    said = refused(*line.split(), code=2)
    assert f"{line.split()[-1]} is a file, the directory of a run is expected" in said
    assert ("does not read ONNX files" in said) == ("onnx" in line)
    assert "does not exist" not in said


@pytest.mark.parametrize(
    "line", ["inspect x.onnx", "serve x.onnx", "bench x.onnx", "calibrate x.onnx", "run x.onnx x.png"]
)
def test_a_file_is_no_bundle(line: str) -> None:
    said = refused(*line.split(), code=2)
    assert "x.onnx is a file, the directory of a bundle is expected; mexit exports its own runs" in said


@pytest.mark.parametrize("command", ["inspect", "calibrate", "serve", "run"])
def test_a_run_is_no_bundle(command: str, workspace: Path) -> None:
    run = workspace / "runs/digits"
    said = refused(command, run, *(["x.png"] if command == "run" else []), code=2)
    assert f"{run} is a run, a bundle is expected: mexit export makes a bundle of it" in said


@pytest.mark.parametrize("line", ["train --resume --out", "train --method skd --teacher"])
def test_a_bundle_is_no_run(line: str, digits_bundle: Path) -> None:
    said = refused(*line.split(), digits_bundle, code=2)
    assert f"{digits_bundle} is a bundle, a run is expected: name the run that it was exported from" in said


def test_a_folder_is_neither(digits_bundle: Path) -> None:
    said = refused("run", "folder", "x.png", code=2)
    assert "folder is a folder, not an image: name its pictures, folder/*, or use mexit camera --source" in said
    (Path("folder") / "a").mkdir()
    (Path("folder") / "a" / "1.webp").touch()
    assert "name its pictures, folder/a/*, or" in refused("run", "folder", "x.png", code=2)
    assert "folder/bundle.json does not exist" in refused("inspect", "folder", code=2)
    assert "folder/settings.json does not exist" in refused("export", "folder", code=2)


def test_what_is_missing_is_still_missing() -> None:
    assert "run gone.onnx does not exist" in refused("export", "gone.onnx", code=2)
    assert "bundle gone.onnx does not exist" in refused("inspect", "gone.onnx", code=2)


def test_a_similar_name_beside_a_missing_one_is_suggested() -> None:
    assert refused("inspect", "foldre", code=2).endswith("foldre does not exist, did you mean folder?")
    assert refused("export", "foldre", code=2).endswith("foldre does not exist, did you mean folder?")
    assert refused("train", "--data", "folder:foldre", code=2).endswith("foldre does not exist, did you mean folder?")
