"""HDR and wide-gamut video is converted to ordinary colours, and the conversion is reported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pytest
from camera_media import slow_runtime, write_video
from numpy.typing import NDArray

from mexit.camera import hdr
from mexit.camera.pipeline import classify_frames

BT709, BT2020, PQ, HLG, BT2020_SDR = 1, 9, 16, 18, 14  # H.273
# BT.2087: linear BT.709 to linear BT.2020
TO_BT2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
LUMINANCE = np.array([0.2627, 0.6780, 0.0593])
COLOURS = [(255, 255, 255), (128, 128, 128), (20, 20, 20), (200, 90, 80), (80, 180, 90), (60, 90, 190)]


def signal_of(colour: Sequence[int], transfer: int) -> NDArray[np.float64]:
    """The signal, in [0, 1], of a BT.709 colour whose white is 203 cd/m2 (BT.2100, BT.2408)."""
    light = TO_BT2020 @ (np.asarray(colour) / 255) ** 2.4
    if transfer == PQ:
        root = (light * 203 / 10_000) ** 0.1593017578125
        return np.asarray(((0.8359375 + 18.8515625 * root) / (1 + 18.6875 * root)) ** 78.84375)
    if transfer == HLG:
        shown = light * 203 / 1000
        scene = shown * max(float(shown @ LUMINANCE), 1e-9) ** (1 / 1.2 - 1)
        logarithm = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
        return np.where(scene <= 1 / 12, np.sqrt(3 * scene), logarithm)
    return np.asarray(light ** (1 / 2.4))


def write_patches(path: Path, transfer: int, *, primaries: int = BT2020) -> Path:
    """A film of 10 bits with one frame per colour."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "4", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p10le"
        context = stream.codec_context
        context.color_trc, context.color_primaries, context.colorspace = transfer, primaries, primaries
        context.color_range = 1
        for i, colour in enumerate(COLOURS):
            signal = np.rint(signal_of(colour, transfer) * 65535) if primaries == BT2020 else np.multiply(colour, 257)
            picture = av.VideoFrame.from_ndarray(
                np.broadcast_to(signal, (64, 64, 3)).astype(np.uint16), format="rgb48le"
            )
            coded = picture.reformat(format="yuv420p10le", dst_colorspace=primaries, dst_color_range=1)
            coded.pts = i
            container.mux(stream.encode(coded))
        container.mux(stream.encode())
    return path


def read(path: Path) -> tuple[list[list[int]], list[str]]:
    """The colour in the middle of each frame, and the messages."""
    events: list[str] = []
    frames = [frame for frame, _ in classify_frames(slow_runtime(), str(path), on_event=events.append)]
    return [frame[32, 32].tolist() for frame in frames], events


@pytest.mark.parametrize(
    ("name", "transfer", "words"),
    [
        ("a.mp4", HLG, "HDR (HLG)"),
        ("a.mkv", PQ, "HDR (PQ)"),
        ("a.mov", BT2020_SDR, "wide-gamut (BT.2020)"),
        ("a.mp4", BT709, "wide-gamut (BT.2020)"),
    ],
)
def test_colours_are_converted(tmp_path: Path, name: str, transfer: int, words: str) -> None:
    colours, events = read(write_patches(tmp_path / name, transfer))
    np.testing.assert_allclose(colours, COLOURS, atol=7)
    assert events == [
        f"{tmp_path / name} is {words}: its colours are converted to those of ordinary (SDR, BT.709) pictures"
    ]


def test_ten_bits_of_ordinary_colours(tmp_path: Path) -> None:
    colours, events = read(write_patches(tmp_path / "a.mp4", BT709, primaries=BT709))
    np.testing.assert_allclose(colours, COLOURS, atol=4)
    assert events == []


def test_ordinary_video_is_not_reported(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", [np.full((64, 64, 3), 90, np.uint8)], [0.0])
    colours, events = read(path)
    np.testing.assert_allclose(colours, [[90, 90, 90]], atol=2)
    assert events == []


@pytest.mark.parametrize("transfer", [PQ, HLG])
def test_light_above_the_reference_white_is_clipped(transfer: int) -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)
    grey = hdr.to_sdr(np.repeat(ramp[None, :, None], 3, axis=2), transfer)[0]
    assert np.ptp(grey.astype(int), axis=1).max() <= 1, "grey stays grey"
    assert (np.diff(grey[:, 0].astype(int)) >= 0).all()
    assert (grey[0, 0], grey[-1, 0]) == (0, 255)
