"""Saves the pictures of unsure answers, to be labelled and trained on."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from mexit.camera.events import CameraEvent
from mexit.camera.frame import RGB, OnEvent
from mexit.camera.outputs.background_sender import BackgroundSender
from mexit.camera.outputs.disk_quota import DiskQuota
from mexit.camera.outputs.output_names import FILE_TIME, camera_slug, file_time, utc_now
from mexit.camera.prediction import CameraPrediction
from mexit.camera.region import Region
from mexit.core.atomic_io import to_json, write_bytes
from mexit.errors import MexitError
from mexit.runtime.prediction import UNSURE

QUOTA_MB = 500.0
INTERVAL_S = 1.0  # pictures that follow more closely show much the same
_WAITING = 4  # pictures; each has the size of a frame in memory
_Picture = tuple[RGB, CameraPrediction, datetime]  # frame, answer and the present time


class SaveUnsure:
    """Writes a PNG file and a JSON file for each unsure answer; of live cameras in a thread of its own.

    Files are named TIME-CAMERA-FRAME. While those of one camera exceed the quota, the oldest are removed; files of
    earlier runs count. A picture that cannot be written is lost, and the camera goes on.
    """

    name = "unsure"

    def __init__(
        self,
        folder: Path,
        camera: str,
        *,
        live: bool,
        quota_mb: float = QUOTA_MB,
        interval_s: float = INTERVAL_S,
        region: Region | None = None,
        on_event: OnEvent,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        """Start the thread; write nothing yet.

        Args:
            folder: where the files go; made with the first picture.
            camera: name of the camera.
            live: whether the source is live. Of files, every picture is written before the next frame is read.
            quota_mb: size of the camera's files, 10^6 bytes.
            interval_s: least time between two saved pictures of a live camera, seconds.
            region: the part of each frame that the network saw, and that is saved; None: all of it.
            on_event: called with a message when a picture cannot be written.
            now: the present time in UTC.

        Raises:
            UsageError: the quota is not positive.
        """
        self._folder, self._slug = folder, camera_slug(camera)
        self._interval_s, self._on_event, self._now = interval_s if live else 0.0, on_event, now
        self._quota = DiskQuota(folder, re.compile(rf"{FILE_TIME}-{re.escape(self._slug)}-\d+\.(png|json)"), quota_mb)
        self._region = region
        self._next_s = float("-inf")
        self._saved = False
        self._failure = ""
        self._failures = 0
        self._sender: BackgroundSender[_Picture] | None = None
        if live:
            self._sender = BackgroundSender("mexit-save-unsure", self._save, _WAITING)

    @property
    def lost(self) -> int:
        """Pictures that were to be saved and were not."""
        return self._failures if self._sender is None else self._sender.lost

    def write(self, frame: RGB, prediction: CameraPrediction) -> None:
        """Save the frame, RGB (H, W, 3) uint8, if its answer is unsure and the last one was saved long enough ago."""
        if prediction.reason != UNSURE or prediction.captured_s < self._next_s:
            return
        self._next_s = prediction.captured_s + self._interval_s
        picture = frame, prediction, self._now()
        if self._sender is None:
            self._failures += not self._save(picture)
        else:
            self._sender.put(picture)

    def event(self, event: CameraEvent) -> None:
        """Ignore the event."""

    def close(self) -> Path | None:
        """Save what waits; return the folder, or None if nothing was saved."""
        if self._sender is not None:
            self._sender.close()
        return self._folder if self._saved else None

    def _save(self, picture: _Picture) -> bool:
        frame, prediction, saved_at = picture
        stem = f"{file_time(saved_at)}-{self._slug}-{prediction.frame_index:08}"
        png, answer = self._folder / f"{stem}.png", self._folder / f"{stem}.json"
        try:
            write_bytes(answer, to_json({**prediction.to_json(), "time": saved_at.isoformat(timespec="milliseconds")}))
            write_bytes(png, _png(frame if self._region is None else self._region.crop(frame)))
            self._quota.add(png, answer)
        except (MexitError, OSError) as error:
            for path in (answer, png):  # half of a pair, which the quota does not count
                with suppress(OSError):
                    path.unlink(missing_ok=True)
            self._report(str(error))
            return False
        self._saved, self._failure = True, ""
        return True

    def _report(self, failure: str) -> None:
        """Report a failure, but not the same cause for every picture."""
        if not self._failure:
            self._on_event(f"a picture of an unsure answer is not saved: {failure}")
        self._failure = failure


def _png(frame: RGB) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "png", compress_level=1)  # a third of the time of the default level
    return buffer.getvalue()
