"""`mexit data`: its table, JSON and exit codes; and the same checks before training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import program, quiet, refused, typed
from PIL import Image


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """A folder of two classes with names in `classes.txt`."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(("00", "01")):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for k in range(40):
            pixels = rng.integers(0, 100, (12, 12)) + 120 * label
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "pets" / name / f"{k}.png")
    (tmp_path / "pets/classes.txt").write_text("00\tSiamese cat\n01\tBorder collie :dog:\n")
    return Path("pets")


TRAIN = ("train", "--method", "clean", "--epochs", "1", "--threads", "1", "--data", "folder:pets")


@pytest.mark.parametrize("name", ["pets", "folder:pets", "./pets"])
def test_a_folder_is_reported_by_its_path(name: str, pets: Path) -> None:
    shown = typed("data", name)
    assert shown.exit_code == 0
    for words in ("Siamese cat", "Border collie :dog:", "80", "modes: 80 L", "no problems found"):
        assert words in shown.stdout
    assert "mexit train --data folder:pets" in shown.stdout


def test_the_next_command_can_be_typed_where_the_path_has_a_space(pets: Path) -> None:
    pets.rename("my pets")
    assert "mexit train --data 'folder:my pets'\n" in typed("data", "my pets").stdout
    for k in range(30):
        Path(f"my pets/00/{k}.png").write_bytes(b"no picture")
    assert "mexit data 'folder:my pets' lists all problems" in refused(*TRAIN[:-1], "folder:my pets", code=1)


def test_a_named_set_is_reported() -> None:
    assert "1,797" in typed("data", "digits").stdout
    assert "image folder nowhere does not exist" in refused("data", "nowhere", code=2)


def test_json_is_one_object(pets: Path) -> None:
    report = json.loads(typed("data", pets, "--json").stdout)
    assert report["classes"] == ["Siamese cat", "Border collie :dog:"]
    assert report["counts"] == {"all": [40, 40]}
    assert report["problems"] == []
    assert sum(report["splits"].values()) == 80


def test_warnings_leave_the_exit_code_zero(pets: Path) -> None:
    (pets / "00/notes.txt").write_text("x")
    shown = typed("data", pets)
    assert shown.exit_code == 0
    assert "warning: skipped, because they are no pictures of a class: 1 .txt" in shown.stdout


def test_what_blocks_training_is_said_and_exits_with_one(pets: Path) -> None:
    Path("pets/00/3.png").write_bytes(b"no picture")
    shown = typed("data", pets)
    assert shown.exit_code == 1
    assert "blocks training: 1 picture that cannot be read: image pets/00/3.png: 10 bytes" in " ".join(
        shown.stdout.split()
    )
    assert "next:" not in shown.stdout
    assert json.loads(typed("data", pets, "--json").stdout)["problems"][0]["blocks"]


@pytest.mark.slow
def test_every_line_fits_a_terminal_of_80_columns(pets: Path) -> None:
    for k in range(9):
        Path(f"pets/00/{k}.png").write_bytes(b"no picture")
        Path(f"pets/01/{k}.{k}suffix").write_bytes(b"x")
    done = program("data", "pets", env={**quiet(), "COLUMNS": "80"})
    assert done.returncode == 1
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_training_refuses_a_damaged_picture_and_leaves_nothing(damage: str, pets: Path) -> None:
    path = Path("pets/01/7.png")
    path.write_bytes({"cut": path.read_bytes()[:80], "text": b"no picture", "empty": b""}[damage])
    said = refused(*TRAIN, code=1)
    assert "error: 1 picture that cannot be read: image pets/01/7.png: " in said
    assert said.endswith("mexit data folder:pets lists all problems")
    assert not Path("runs").exists() or not any(Path("runs").iterdir())


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--model", "nosuch"), "unknown model 'nosuch'"),
        (("--size", "5"), "at least 8 x 8 pixels, found 5 x 5"),
        (("--size", "5000"), "sides of 1 to 4096 pixels, found (5000, 5000)"),
        (("--model", "resnet38", "--size", "20"), "takes images of 3 x 32 x 32"),
    ],
)
def test_a_network_that_cannot_be_is_refused_before_the_pictures_are_read(
    options: tuple[str, ...], error: str, pets: Path
) -> None:
    Path("pets/01/7.png").write_bytes(b"no picture")
    assert error in refused(*TRAIN, *options, code=2)


@pytest.mark.slow
def test_training_notes_class_names_and_problems_before_the_first_step(pets: Path) -> None:
    Path("pets/00/notes.txt").write_text("x")
    Image.new("L", (3, 3), 9).save("pets/01/tiny.png")
    for k in range(4):  # training pictures choose the bits
        Image.fromarray(np.linspace(k, 4095, 144).astype(np.uint16).reshape(12, 12)).save(f"pets/00/deep{k}.png")
    done = typed(*TRAIN, "--out", "runs/pets")
    assert done.exit_code == 0, done.output
    said = done.stderr
    assert said.index("2 classes: Siamese cat, Border collie :dog:") < said.index("training ")
    assert max(map(len, said[: said.index("training ")].splitlines())) <= 80
    said = " ".join(said.split())
    assert "warning: skipped, because they are no pictures of a class: 1 .txt" in said
    assert "warning: 1 picture with a side below 8 pixels: 01/tiny.png" in said
    assert "grey values of 16-bit files use 12 bits: they are divided by 16, in serving too" in said
    exported = typed("export", "runs/pets", "--out", "bundles/pets", "--no-calibrate", "--exits", "all")
    assert exported.exit_code == 0, exported.output
    manifest = json.loads(Path("bundles/pets/bundle.json").read_text())
    assert manifest["classes"] == ["Siamese cat", "Border collie :dog:"]
    assert manifest["input"]["prepare"]["grey_bits"] == 12
