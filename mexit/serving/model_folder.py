"""The models of a folder, in Triton's layout: `NAME/bundle.json`, or `NAME/<number>/bundle.json` with versions.

A version is a folder whose name is a whole number without a leading zero. The highest number is the newest version, so
10 is newer than 2. All other folders are ignored. `NAME/bundle.json` is version 1. A folder that is a bundle itself is
one model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mexit.core.artifact_paths import is_bundle
from mexit.core.atomic_io import read_json
from mexit.core.bundle import MANIFEST, POLICIES, Bundle
from mexit.core.manifest import NAME_PATTERN, Manifest
from mexit.core.wrong_path import BUNDLE, found_instead
from mexit.errors import NotFound, UsageError

_VERSION_PATTERN = re.compile(r"[1-9][0-9]{0,17}")  # of Triton's int64
FileState = tuple[str, int, int, int]
"""Path, size in bytes, time of the last change in nanoseconds, and inode of a file."""


@dataclass(frozen=True)
class ModelVersion:
    """A version of a model on disk.

    Attributes:
        model: name of the model.
        number: number of the version, from 1.
        path: the bundle's directory.
    """

    model: str
    number: int
    path: Path

    def fingerprint(self) -> tuple[FileState, ...]:
        """The state of the files that answers depend on; a changed file changes it. Raises `OSError`."""
        segments = sorted(file for file in (self.path / "segments").rglob("*") if file.is_file())
        policies = self.path / POLICIES
        files = [self.path / MANIFEST, *([policies] if policies.exists() else []), *segments]
        states = [(str(file), file.stat()) for file in files]
        return tuple((name, state.st_size, state.st_mtime_ns, state.st_ino) for name, state in states)


class ModelFolder:
    """A bundle, or a folder with the bundles of several models.

    Attributes:
        path: the folder.
        single: whether it is one bundle.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        """Read the folder.

        Args:
            path: the bundle or the folder of models.
            name: name of the model of a single bundle; default the bundle's. Other models have their folder's name.

        Raises:
            NotFound: the path does not exist, or holds no model.
            UsageError: the path is a file or a run, or the name is given for a folder of models, or is not possible.
            Damaged: the manifest of a single bundle is not readable.
        """
        if name is not None and not NAME_PATTERN.fullmatch(name):
            raise UsageError(
                f"'{name}' cannot be a model's name, which is part of URLs: use at most 64 letters, digits, "
                "'.', '_' and '-', the first a letter or digit"
            )
        self.path = path
        self.single = is_bundle(path)
        self._name = name
        if self.single:
            manifest = Manifest.from_json(read_json(path / MANIFEST, "bundle manifest"))
            self._name = name or manifest.name
            return
        if not path.is_dir() or found_instead(path, BUNDLE):
            Bundle.open(path)  # raises the error that says what the path is instead
        if not self.versions():
            raise NotFound(
                f"{path} holds no model: expected {MANIFEST} in it, or NAME/{MANIFEST} or NAME/1/{MANIFEST} below it; "
                "mexit export makes a bundle"
            )
        if name is not None:
            raise UsageError("--name is for a single bundle: the models of a folder have the names of their folders")

    def versions(self) -> Mapping[str, tuple[ModelVersion, ...]]:
        """The versions of each model, the newest first. Raises `OSError` if the folder cannot be read."""
        if self.single:
            assert self._name is not None
            return {self._name: (ModelVersion(self._name, 1, self.path),)} if is_bundle(self.path) else {}
        names = [folder for folder in _folders(self.path) if NAME_PATTERN.fullmatch(folder.name)]
        found = {folder.name: tuple(_versions_of(folder)) for folder in names}
        return {name: versions for name, versions in found.items() if versions}


def _versions_of(folder: Path) -> Iterator[ModelVersion]:
    if is_bundle(folder):
        yield ModelVersion(folder.name, 1, folder)
        return
    numbers = [int(one.name) for one in _folders(folder) if _VERSION_PATTERN.fullmatch(one.name) and is_bundle(one)]
    for number in sorted(numbers, reverse=True):
        yield ModelVersion(folder.name, number, folder / str(number))


def _folders(path: Path) -> list[Path]:
    return sorted(one for one in path.iterdir() if one.is_dir())
