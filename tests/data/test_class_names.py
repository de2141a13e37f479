"""Class names from `classes.txt`, in the forms that data sets have."""

from __future__ import annotations

from pathlib import Path

import pytest
from sample_images import encode, noise

from mexit.data import folder
from mexit.data.class_names import read_class_names
from mexit.errors import BadInput, Damaged

FOLDERS = ("00000", "00001", "00002")
NAMES = ("Speed limit (20 km/h)", "Stop", "Yield, always")
FORMS = {
    "tab": "00000\tSpeed limit (20 km/h)\n00001\tStop\n00002\tYield, always\n",
    "Windows": "\ufeff00000\tSpeed limit (20 km/h)\r\n00001\tStop\r\n00002\tYield, always\r\n",
    "another order and more classes": "00007\tBend\n00002\tYield, always\n00001\tStop\n00000\tSpeed limit (20 km/h)",
    "spaces": "00000 Speed limit (20 km/h)\n\n00001   Stop\n00002 Yield, always",
    "semicolon": "00000;Speed limit (20 km/h)\n00001; Stop\n00002;Yield, always",
    "one name per line": "Speed limit (20 km/h)\nStop\nYield, always\n",
}


@pytest.mark.parametrize("text", FORMS.values(), ids=FORMS.keys())
def test_every_form_gives_the_names(text: str, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_bytes(text.encode())
    assert read_class_names(tmp_path / "classes.txt", FOLDERS) == NAMES


@pytest.mark.parametrize(
    ("text", "folders", "names"),
    [
        ("cat\ndog\n", ("cat", "dog"), ("cat", "dog")),
        ("dog\ncat\nbird\n", ("cat", "dog"), ("cat", "dog")),
        ("polar bear\nbrown bear\n", ("brown bear", "polar bear"), ("brown bear", "polar bear")),
        ("n1,crane\nn2,crane\n", ("n1", "n2"), ("crane (n1)", "crane (n2)")),
        ("a\tAnt\n", ("a", "b"), ("Ant", "b")),
        ("one\ntwo\n", ("1", "2"), ("one", "two")),
        ("ten\nfive\n", ("10", "9"), None),
        ("zero\none\ntwo", ("0", "1", "10"), None),
    ],
    ids=["own names", "more names", "names with spaces", "a name twice", "not all", "from 1", "not from 0", "a gap"],
)
def test_other_lists(text: str, folders: tuple[str, ...], names: tuple[str, ...] | None, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text(text)
    if names is None:
        with pytest.raises(BadInput, match=r"lines that do not name the \d class folders .*write the folder, a tab"):
            read_class_names(tmp_path / "classes.txt", folders)
    else:
        assert read_class_names(tmp_path / "classes.txt", folders) == names


def test_what_names_no_class_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    for text in ("person\nbicycle\n", "", "a\tAnt\na\tBee\n"):
        path.write_text(text)
        with pytest.raises(BadInput, match=r"do not name the 2 class folders \(a, \.\.\.\)"):
            read_class_names(path, ("a", "c"))
    path.write_text("a\tAnt\x1b[2J\n")
    with pytest.raises(BadInput, match="has control characters"):
        read_class_names(path, ("a", "b"))
    path.write_bytes(b"a\tGr\xfc\xdfe")
    with pytest.raises(Damaged, match="are not UTF-8 text"):
        read_class_names(path, ("a", "b"))


@pytest.mark.parametrize("place", ["classes.txt", "Classes.TXT", "train/classes.txt"])
def test_a_folder_is_loaded_with_its_names(place: str, tmp_path: Path) -> None:
    for part in ("train", "test"):
        for label, name in enumerate(("a", "b")):
            (tmp_path / part / name).mkdir(parents=True)
            (tmp_path / part / name / "0.png").write_bytes(encode(noise(4, 4, seed=label)))
    before = folder.load(tmp_path)
    (tmp_path / place).write_text("a\tAnt\nb\tBee\n")
    data = folder.load(tmp_path)
    assert data.classes == ("Ant", "Bee")
    assert data.sha256 == before.sha256
    assert data.skipped == {}
