"""The watch of a folder of models: which changes it reports, and when."""

from __future__ import annotations

import os
from pathlib import Path

import model_versions
import pytest

from mexit.serving.model_folder import ModelFolder
from mexit.serving.repository_watch import RepositoryWatch


@pytest.fixture
def folder(digits_bundle: Path, tmp_path: Path) -> Path:
    """The models `one`, version 1, and `two`, without versions."""
    model_versions.copy(digits_bundle, tmp_path / "models" / "one" / "1")
    model_versions.copy(digits_bundle, tmp_path / "models" / "two")
    return tmp_path / "models"


def test_new_and_changed_versions_are_reported_once(folder: Path, digits_bundle: Path) -> None:
    watch = RepositoryWatch(ModelFolder(folder))
    assert watch.changes() == ([], [])
    model_versions.copy(digits_bundle, folder / "one" / "2")
    model_versions.copy(digits_bundle, folder / "three")
    assert watch.changes() == (["one", "three"], [])
    assert watch.changes() == ([], [])
    policies = folder / "two" / "policies.json"
    policies.rename(folder / "two" / "before")
    policies.write_bytes((folder / "two" / "before").read_bytes())
    assert watch.changes() == (["two"], []), "calibration replaces the file"
    os.utime(folder / "two" / "segments/fp32/3.onnx", (0, 0))
    assert watch.changes() == (["two"], [])


def test_files_that_answers_do_not_depend_on(folder: Path) -> None:
    """Reports, older versions and ignored folders cause no load."""
    watch = RepositoryWatch(ModelFolder(folder))
    (folder / "two" / "reports" / "new.md").write_text("a page")
    (folder / "one" / "latest").mkdir()
    (folder / "one" / "2").mkdir()  # a version whose copy has just begun
    (folder / "notes.txt").write_text("no model")
    assert watch.changes() == ([], [])


def test_a_model_is_unloaded_at_the_second_look_without_it(folder: Path, tmp_path: Path) -> None:
    """A replacement may remove the old folder for a moment."""
    watch = RepositoryWatch(ModelFolder(folder))
    (folder / "two").rename(tmp_path / "two")
    assert watch.changes() == ([], [])
    (tmp_path / "two").rename(folder / "two")
    assert watch.changes() == ([], [])
    (folder / "two").rename(tmp_path / "two")
    assert watch.changes() == ([], [])
    assert watch.changes() == ([], ["two"])
    assert watch.changes() == ([], [])
    (tmp_path / "two").rename(folder / "two")
    assert watch.changes() == (["two"], [])


def test_an_older_version_takes_over_when_the_newest_is_removed(folder: Path, digits_bundle: Path) -> None:
    model_versions.copy(digits_bundle, folder / "one" / "2")
    watch = RepositoryWatch(ModelFolder(folder))
    (folder / "one" / "2").rename(folder / "one" / ".2")
    assert watch.changes() == (["one"], [])


def test_a_folder_that_cannot_be_read_changes_nothing(folder: Path, tmp_path: Path) -> None:
    watch = RepositoryWatch(ModelFolder(folder))
    folder.rename(tmp_path / "away")
    for _ in range(3):
        with pytest.raises(OSError, match="No such file"):
            watch.changes()
    (tmp_path / "away").rename(folder)
    assert watch.changes() == ([], [])
