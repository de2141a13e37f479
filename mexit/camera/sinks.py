"""Where answered frames go. A sink takes one frame at a time, in order, and is closed once, also after Ctrl-C."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol, TextIO

from mexit.camera.frame import RGB
from mexit.camera.pipeline import CameraPrediction
from mexit.errors import MexitError


class Sink(Protocol):
    """Takes answered frames."""

    def write(self, frame: RGB, prediction: CameraPrediction) -> None:
        """Take a frame, RGB (H, W, 3) uint8, and its prediction."""

    def close(self) -> Path | None:
        """Finish; gives the file that was written, or None if no frame came."""


class JsonLines:
    """One JSON object a line and frame. A line is with the system before the next frame is asked for, so
    whatever ends the process, the file holds whole lines of everything answered.

    The file is opened with the first frame: a source that cannot be read leaves an earlier file alone.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None

    def write(self, frame: RGB, prediction: CameraPrediction) -> None:
        """See `Sink.write`."""
        del frame
        line = json.dumps(prediction.to_json(), ensure_ascii=False, allow_nan=False)
        try:
            file = self._open() if self._file is None else self._file
            file.write(line + "\n")
            file.flush()
        except OSError as error:
            raise MexitError(f"could not write {self._path}: {error.strerror or error}") from None

    def close(self) -> Path | None:
        """See `Sink.close`."""
        if self._file is None:
            return None
        self._file.close()
        return self._path

    def _open(self) -> TextIO:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("w", encoding="utf-8")
        return self._file
