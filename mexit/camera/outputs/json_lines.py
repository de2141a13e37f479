"""JSON lines: one object per answered frame, or one per event, with rotation by size."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from mexit.camera.events import CameraEvent
from mexit.camera.frame import RGB
from mexit.camera.outputs.output import FileOutput
from mexit.camera.prediction import CameraPrediction
from mexit.core.printable import json_text
from mexit.errors import MexitError, UsageError

KEEP = 5  # rotated files


class JsonLines(FileOutput):
    """Writes one JSON object per frame and line.

    Each line is flushed before the next frame is read, so the file holds whole lines however the process ends. The
    file is opened with the first line, so a source that cannot be read leaves an earlier file unchanged.

    With rotation the file never exceeds its limit, unless a single line does: it is renamed to `NAME.1` before that,
    `NAME.1` to `NAME.2` and so on, and the oldest is removed. A file of an earlier run is rotated too, not replaced.
    """

    name = "jsonl"

    def __init__(self, path: Path, *, max_mb: float | None = None, keep: int = KEEP) -> None:
        """Open nothing yet.

        Args:
            path: the file.
            max_mb: size from which the file is rotated, 10^6 bytes; None = no rotation.
            keep: number of rotated files that are kept beside the present one.

        Raises:
            UsageError: `max_mb` is not positive, or `keep` is negative.
        """
        if (max_mb is not None and not 0 < max_mb < math.inf) or keep < 0:
            raise UsageError(f"rotation expects a size above 0 MB and at least 0 kept files, found {max_mb} and {keep}")
        self._path = path
        self._max_bytes = None if max_mb is None else round(max_mb * 1e6)
        self._keep = keep
        self._file: BinaryIO | None = None
        self._bytes = 0

    def write(self, frame: RGB, prediction: CameraPrediction) -> None:
        """Write the prediction as a line. Raises `MexitError` if the file cannot be written."""
        del frame
        self._write_line(prediction.to_json())

    def close(self) -> Path | None:
        """Close the file; return its path, or None if no line came. Raises `MexitError` if that fails."""
        if self._file is None:
            return None
        try:
            self._file.close()
        except OSError as error:
            raise self._failed(error) from None
        return self._path

    def _write_line(self, value: dict[str, Any]) -> None:
        line = (json_text(value, ascii_only=False) + "\n").encode()
        try:
            if self._file is None or self._is_full(len(line)):
                self._open()
            assert self._file is not None
            self._file.write(line)
            self._file.flush()
            self._bytes += len(line)
        except OSError as error:
            raise self._failed(error) from None

    def _is_full(self, more: int) -> bool:
        return self._max_bytes is not None and self._bytes > 0 and self._bytes + more > self._max_bytes

    def _open(self) -> None:
        if self._file is not None:
            self._file.close()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._max_bytes is not None and self._path.is_file() and self._path.stat().st_size:
            self._rotate()
        self._file, self._bytes = self._path.open("wb"), 0

    def _rotate(self) -> None:
        """Rename the file and the rotated ones up to the first number that is free; else the oldest is replaced."""
        names = [self._path]
        while len(names) <= self._keep and names[-1].exists():
            names.append(self._path.with_name(f"{self._path.name}.{len(names)}"))
        for newer, older in zip(names[-2::-1], names[:0:-1], strict=True):
            with suppress(FileNotFoundError):
                os.replace(newer, older)

    def _failed(self, error: OSError) -> MexitError:
        """The error to raise. The file is given up: closing it again would try to write the same line.

        The part of that line that was written is removed.
        """
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            with suppress(OSError):
                os.truncate(self._path, self._bytes)
            self._file = None
        return MexitError(f"could not write {self._path}: {error.strerror or error}")


class EventLines(JsonLines):
    """Writes one JSON object per event and line, with the fields of `CameraEvent`."""

    name = "events"

    def write(self, frame: RGB, prediction: CameraPrediction) -> None:
        """Ignore the frame."""

    def event(self, event: CameraEvent) -> None:
        """Write the event as a line. Raises `MexitError` if the file cannot be written."""
        self._write_line(event.to_json())
