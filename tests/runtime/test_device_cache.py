"""The device cache: private to its owner, and placed by `MEXIT_CACHE`."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from mexit.errors import MexitError, UsageError
from mexit.runtime.device_cache import cache_folder, cache_root, write_fact


def test_every_new_folder_of_the_cache_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEXIT_CACHE", str(tmp_path / "cache"))
    path = cache_folder("model") / "times.json"
    write_fact(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}
    folders = [folder for folder in path.parents if folder.is_relative_to(cache_root())]
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in folders] == [0o700] * 3  # device, model, root


def test_a_cache_that_cannot_be_written_names_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEXIT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(MexitError, match="set MEXIT_CACHE to a folder that can be written"):
        write_fact(cache_folder("model") / "times.json", {})


def test_without_a_home_directory_the_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("MEXIT_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(UsageError, match="set MEXIT_CACHE"):
        cache_root()
