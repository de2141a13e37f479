"""Videos, images and fake runtimes for the camera tests."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mexit.camera.prediction import CameraPrediction
from mexit.runtime.prediction import Prediction

TICKS = 90_000
FAST = {"preset": "ultrafast", "crf": "14"}


def write_video(
    path: Path,
    frames: Sequence[NDArray[np.uint8]],
    times: Sequence[float],
    *,
    audio: bool = False,
    rotation: int = 0,
    pix_fmt: str = "yuv420p",
    pixel_aspect: Fraction | None = None,
    **mux: str,
) -> Path:
    """Write H.264 in the container of the suffix; `times` are the frames' timestamps, seconds."""
    with av.open(str(path), "w", options=mux) as container:
        stream = container.add_stream("libx264", rate=25, options=FAST)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = Fraction(1, TICKS)
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if rotation:
            stream.set_display_rotation(rotation)
        if audio:
            _add_silence(container, times[-1])
        for frame, time_s in zip(frames, times, strict=True):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = round(time_s * TICKS), Fraction(1, TICKS)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def _add_silence(container: Any, seconds: float) -> None:
    stream = container.add_stream("aac", rate=16_000, layout="mono")
    for start in range(0, int(seconds * 16_000), 1024):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 16_000, start, Fraction(1, 16_000)
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file can grow above `size` bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def read_video(path: Path) -> tuple[list[float], list[NDArray[np.uint8]]]:
    """Timestamps, seconds, and RGB frames of a video."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        return [frame.time for frame in frames], [frame.to_ndarray(format="rgb24") for frame in frames]


def grey_frames(count: int, size: tuple[int, int] = (64, 64)) -> list[NDArray[np.uint8]]:
    """Frames (H, W, 3), each of one grey, from black to white."""
    return [np.full((*size, 3), round(255 * i / max(1, count - 1)), np.uint8) for i in range(count)]


def write_images(folder: Path, names: Sequence[str], size: tuple[int, int] = (20, 30)) -> list[Path]:
    """Write images of one grey each, from black to white in the order of the names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in zip(names, grey_frames(len(names), size), strict=True):
        Image.fromarray(frame).save(folder / name)
    return [folder / name for name in names]


def prediction(**changes: Any) -> Prediction:
    """A prediction at exit 1."""
    values: dict[str, Any] = {
        "index": 0,
        "label": "zero",
        "confidence": 0.9,
        "probabilities": np.array([0.9, 0.1]),
        "exit": 1,
        "reason": "confident",
        "macs": 250,
        "saved_macs": 750,
        "latency_ms": 1.0,
        "budget": "low",
    }
    return Prediction(**{**values, **changes})


def slow_runtime(seconds: float = 0.0) -> Callable[..., list[Prediction]]:
    """A runtime that takes `seconds` and always returns the same prediction."""

    def classify(images: Any, **_: Any) -> list[Prediction]:
        time.sleep(seconds)
        return [prediction()]

    return classify


def camera_prediction(time_s: float | None = 0.0, captured_s: float = 0.0, **changes: Any) -> CameraPrediction:
    """A prediction of a frame with the given timestamp and arrival, seconds; it is steady unless `steady` is given."""
    steady = changes.pop("steady", changes.get("label", "zero"))
    return CameraPrediction(
        **vars(prediction(**changes)),
        camera="gate",
        source="s",
        frame_index=0,
        time_s=time_s,
        captured_s=captured_s,
        age_ms=1.0,
        dropped=0,
        steady=steady,
    )
