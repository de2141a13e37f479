"""`mexit camera` with several sources and with a file of cameras."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from camera_media import grey_frames, write_images, write_video
from command_line import refused, typed


@pytest.fixture(autouse=True)
def _sources(tmp_path: Path) -> None:
    write_images(tmp_path / "pictures", [f"{i}.png" for i in range(4)])
    write_video(tmp_path / "a clip.mp4", grey_frames(6), [i / 25 for i in range(6)])


def cameras_file(text: str) -> Path:
    path = Path("cameras.toml")
    path.write_text(text)
    return path


TWO = "[[camera]]\nname = 'gate'\nsource = 'pictures'\n[[camera]]\nname = 'door'\nsource = 'a clip.mp4'\n"


def frames(shown: str) -> dict[str, int]:
    """Answered frames of each camera in what `--json` prints."""
    return {camera["camera"]: camera["frames"] for camera in json.loads(shown)["cameras"]}


def test_several_sources(digits_bundle: Path) -> None:
    shown = typed("camera", digits_bundle, "--source", "pictures", "--source", "a clip.mp4")
    assert shown.exit_code == 0
    assert "pictures: frame 0: " in shown.stdout
    assert "a-clip.mp4: frame 0: " in shown.stdout
    rows = [line.split("│") for line in shown.stdout.splitlines() if "│" in line]
    assert [(row[0].strip(), row[1].strip()) for row in rows] == [("pictures", "4"), ("a-clip.mp4", "6")]


def test_the_variable_has_one_source_a_line(digits_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEXIT_SOURCE", "pictures\na clip.mp4\n")
    assert frames(typed("camera", digits_bundle, "--json").stdout) == {"pictures": 4, "a-clip.mp4": 6}


def test_a_file_of_cameras(digits_bundle: Path) -> None:
    path = cameras_file(
        "budget = 'high'\n" + TWO.replace("'pictures'\n", "'pictures'\nbudget = 'full'\njsonl = 'gate.jsonl'\n")
    )
    shown = typed("camera", digits_bundle, "--config", path, "--json", "--limit", 3)
    assert frames(shown.stdout) == {"gate": 3, "door": 3}
    lines = [json.loads(line) for line in Path("gate.jsonl").read_text().splitlines()]
    assert {(line["camera"], line["budget"]) for line in lines} == {("gate", "full")}


def test_a_typed_option_replaces_the_value_of_the_file(digits_bundle: Path) -> None:
    path = cameras_file("budget = '1'\n" + TWO)
    assert "budget '1'" in refused("camera", digits_bundle, "--config", path, code=3)
    assert typed("camera", digits_bundle, "--config", path, "--budget", "full").exit_code == 0


def test_a_camera_that_fails_is_reported_and_the_others_are_read(digits_bundle: Path) -> None:
    Path("broken.mp4").write_bytes(b"no video")
    path = cameras_file(TWO + "[[camera]]\nname = 'yard'\nsource = 'broken.mp4'\n")
    shown = typed("camera", digits_bundle, "--config", path, "--json")
    assert shown.exit_code == 1
    assert frames(shown.stdout) == {"gate": 4, "door": 6, "yard": 0}
    assert "camera yard ends: broken.mp4 is no video" in shown.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name a camera or file with --source, or a file of cameras with --config"),
        (("--config", "cameras.toml", "--source", "pictures"), "--source is a setting of one camera: write it into"),
        (
            ("--config", "cameras.toml", "--votes", "3"),
            "--votes is a setting of one camera: write it into cameras.toml",
        ),
        (("--config", "absent.toml"), "absent.toml does not exist"),
        (("--source", "pictures", "--source", "a clip.mp4", "--out", "a.mp4"), "--out is for one camera"),
        (("--source", "pictures", "--source", "pictures", "--save-unsure", "a"), "--save-unsure is for one camera"),
    ],
)
def test_options_that_contradict(digits_bundle: Path, arguments: tuple[str, ...], message: str) -> None:
    cameras_file(TWO)
    assert message in refused("camera", digits_bundle, *arguments, code=2)
