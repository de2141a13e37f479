"""Annotated video in segments: a new file every few minutes, named after the time of its first frame."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

from mexit.camera.frame import RGB
from mexit.camera.outputs.disk_quota import DiskQuota
from mexit.camera.outputs.output import FileOutput
from mexit.camera.outputs.output_names import FILE_TIME, file_time, utc_now
from mexit.camera.outputs.video_writer import VideoWriter
from mexit.camera.overlay import Overlay
from mexit.camera.prediction import CameraPrediction
from mexit.errors import MexitError, UsageError


class VideoSegments(FileOutput):
    """Writes `NAME-TIME.mp4` for each segment; a segment is complete once it has that name.

    A finished segment is moved to its place in a thread of its own, because a slow disk would delay the camera.
    """

    name = "video"

    def __init__(
        self,
        path: Path,
        overlay: Overlay,
        *,
        live: bool,
        segment_s: float,
        max_mb: float | None = None,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        """Open nothing yet.

        Args:
            path: folder and beginning of the names; it ends in `.mp4`.
            overlay: draws the predictions.
            live: whether the source is live, as for `VideoWriter`.
            segment_s: duration after which the next segment begins, seconds.
            max_mb: size of all segments of this name, 10^6 bytes, above which the oldest are removed; None = no limit.
            now: the present time in UTC.

        Raises:
            UsageError: `segment_s` or `max_mb` is not positive, or the name has another suffix.
            MissingExtra: PyAV is not installed or has no encoder.
        """
        if not segment_s > 0:
            raise UsageError(f"a segment lasts more than 0 seconds, found {segment_s:g}")
        self._path, self._segment_s, self._now = path, segment_s, now
        self._open: Callable[[Path], VideoWriter] = lambda path: VideoWriter(path, overlay, live=live)
        self._open(path)  # checks the name and the encoder before the first frame
        pattern = re.compile(f"{re.escape(path.stem)}-{FILE_TIME}\\.mp4", re.IGNORECASE)
        self._quota = None if max_mb is None else DiskQuota(path.parent, pattern, max_mb)
        self._writer: VideoWriter | None = None
        self._last_path: Path | None = None
        self._finishing: threading.Thread | None = None
        self._error: MexitError | None = None

    def write(self, frame: RGB, prediction: CameraPrediction) -> None:
        """Encode a frame, RGB (H, W, 3) uint8. Raises `MexitError` if this or an earlier segment cannot be written."""
        self._raise_error()
        if self._writer is not None and self._writer.duration_s >= self._segment_s:
            self._finish(self._writer)
            self._writer = None
        if self._writer is None:
            self._writer = self._open(self._next_path())
        self._writer.write(frame, prediction)

    def close(self) -> Path | None:
        """Finish the last segment; return the pattern of the segments' names, or None if no frame came.

        Raises:
            MexitError: a segment cannot be finished.
        """
        if self._writer is not None:
            self._finish(self._writer)
            self._writer = None
        if self._finishing is not None:
            self._finishing.join()
        self._raise_error()
        return None if self._last_path is None else self._path.with_stem(f"{self._path.stem}-*")

    def _next_path(self) -> Path:
        time = self._now()
        while (
            path := self._path.with_stem(f"{self._path.stem}-{file_time(time)}")
        ).exists() or path == self._last_path:
            time += timedelta(milliseconds=1)
        self._last_path = path
        return path

    def _finish(self, writer: VideoWriter) -> None:
        if self._finishing is not None:
            self._finishing.join()
        self._finishing = threading.Thread(target=self._close_writer, args=(writer,), name="mexit-segment")
        self._finishing.start()

    def _close_writer(self, writer: VideoWriter) -> None:
        try:
            path = writer.close()
            if path is not None and self._quota is not None:
                self._quota.add(path)
        except MexitError as error:
            self._error = error

    def _raise_error(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error
