"""Sinks of answered frames. A sink takes frames in order and is closed once, also after Ctrl-C."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Protocol, TextIO

from mexit.camera.frame import RGB
from mexit.camera.prediction import CameraPrediction
from mexit.core.printable import json_text
from mexit.errors import MexitError


class Sink(Protocol):
    """Takes answered frames."""

    def write(self, frame: RGB, prediction: CameraPrediction) -> None:
        """Write a frame, RGB (H, W, 3) uint8, and its prediction."""

    def close(self) -> Path | None:
        """Finish; return the written file, or None if no frame came."""


class JsonLines:
    """Writes one JSON object per frame and line.

    Each line is flushed before the next frame is read, so the file holds whole lines however the process ends. The
    file is opened with the first frame, so a source that cannot be read leaves an earlier file unchanged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None

    def write(self, frame: RGB, prediction: CameraPrediction) -> None:
        """Write the prediction as a line. Raises `MexitError` if the file cannot be written."""
        del frame
        line = json_text(prediction.to_json(), ascii_only=False)
        try:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("w", encoding="utf-8")
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise self._failed(error) from None

    def close(self) -> Path | None:
        """Close the file; return its path, or None if no frame came. Raises `MexitError` if that fails."""
        if self._file is None:
            return None
        try:
            self._file.close()
        except OSError as error:
            raise self._failed(error) from None
        return self._path

    def _failed(self, error: OSError) -> MexitError:
        """The error to raise. The file is given up: closing it again would try to write the same line."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None
        return MexitError(f"could not write {self._path}: {error.strerror or error}")
