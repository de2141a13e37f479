"""Decoded video: turned and mirrored as its display matrix says, with square pixels, and without cover pictures."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from camera_media import grey_frames, slow_runtime, write_video
from numpy.typing import NDArray

from mexit.camera.decode import turn
from mexit.camera.pipeline import classify_frames
from mexit.errors import BadInput

Matrix = tuple[int, int, int, int]  # a, b, c, d
MATRICES: dict[str, Matrix] = {
    "upright": (1, 0, 0, 1),
    "mirrored": (-1, 0, 0, 1),
    "upside down and mirrored": (1, 0, 0, -1),
    "half a turn": (-1, 0, 0, -1),
    "a quarter turn": (0, 1, -1, 0),
    "three quarter turns": (0, -1, 1, 0),
    "transposed": (0, 1, 1, 0),
    "transposed and turned": (0, -1, -1, 0),
}


def read(path: Path) -> list[NDArray[np.uint8]]:
    return [frame for frame, _ in classify_frames(slow_runtime(), str(path))]


def corners(width: int = 96, height: int = 64) -> NDArray[np.uint8]:
    """A picture whose corners differ: white, grey, dark and black, clockwise from the top left."""
    frame = np.zeros((height, width, 3), np.uint8)
    frame[: height // 2, : width // 2], frame[: height // 2, width // 2 :] = 250, 170
    frame[height // 2 :, width // 2 :] = 85
    return frame


def shown(frame: NDArray[np.uint8], matrix: Matrix) -> NDArray[np.uint8]:
    """Move every pixel (x, y) to (a x + c y, b x + d y)."""
    a, b, c, d = matrix
    y, x = np.indices(frame.shape[:2])
    new_x, new_y = a * x + c * y, b * x + d * y
    new_x, new_y = new_x - new_x.min(), new_y - new_y.min()
    result = np.zeros((new_y.max() + 1, new_x.max() + 1, 3), np.uint8)
    result[new_y, new_x] = frame
    return result


def set_display_matrix(video: Path, matrix: Matrix) -> None:
    """Write a matrix into the track header of an mp4 file."""
    content = bytearray(video.read_bytes())
    header = content.find(b"tkhd")
    start = header + 8 + (20 if content[header + 4] == 0 else 32) + 16
    a, b, c, d = (value * 65536 for value in matrix)
    content[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    video.write_bytes(content)


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES.keys())
def test_a_display_matrix(tmp_path: Path, matrix: Matrix) -> None:
    video = write_video(tmp_path / "a.mp4", [corners()], [0.0])
    set_display_matrix(video, matrix)
    [frame] = read(video)
    expected = shown(corners(), matrix)
    assert frame.shape == expected.shape
    assert np.abs(frame.astype(int) - expected).mean() < 3


def test_angles_between_quarter_turns_are_rounded() -> None:
    frame = corners(6, 4)
    for degrees, matrix in ((20, (1, 0, 0, 1)), (70, (0, 1, -1, 0)), (160, (-1, 0, 0, -1)), (-100, (0, -1, 1, 0))):
        cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        display = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1 << 14]]) * (1 << 16)
        np.testing.assert_array_equal(turn(frame, display.astype(np.int32)), shown(frame, matrix))


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "h264", "ts"])
@pytest.mark.parametrize(
    ("pixel_aspect", "shape"),
    [
        (Fraction(2), (48, 128, 3)),
        (Fraction(1, 2), (96, 64, 3)),
        (Fraction(4, 3), (48, 85, 3)),
        (Fraction(16, 15), (48, 68, 3)),
        (Fraction(100), (48, 64, 3)),  # a mistake in the file
    ],
    ids=str,
)
def test_pixels_that_are_not_square(tmp_path: Path, suffix: str, pixel_aspect: Fraction, shape: tuple[int]) -> None:
    video = write_video(
        tmp_path / f"a.{suffix}", [corners(64, 48)] * 12, [i / 25 for i in range(12)], pixel_aspect=pixel_aspect
    )
    frames = read(video)
    assert [frame.shape for frame in frames] == [shape] * 12
    assert [round(int(frames[0][y, x, 0]), -1) for y in (5, -5) for x in (5, -5)] == pytest.approx(
        [250, 170, 0, 85], abs=9
    )


def test_pixels_that_are_not_square_in_a_turned_video(tmp_path: Path) -> None:
    """The matrix turns the picture after its pixels are made square."""
    video = write_video(tmp_path / "a.mp4", [corners(64, 48)], [0.0], pixel_aspect=Fraction(2))
    set_display_matrix(video, MATRICES["a quarter turn"])
    assert [frame.shape for frame in read(video)] == [(128, 48, 3)]


def write_with_cover(path: Path, *, attached: bool, cover_first: bool = True, film: bool = True) -> Path:
    """A film of 20 frames, or sound, and a cover picture of 32x32 pixels."""
    source = write_video(path.with_name("film.mp4"), grey_frames(20), [i / 25 for i in range(20)], audio=True)
    with av.open(str(source)) as read_from, av.open(str(path), "w") as container:
        inner = read_from.streams.video[0] if film else read_from.streams.audio[0]
        copy = None if cover_first else container.add_stream_from_template(inner)
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        copy = copy or container.add_stream_from_template(inner)
        if attached:
            cover.disposition = av.stream.Disposition.attached_pic
        else:
            cover.disposition, copy.disposition = av.stream.Disposition(0), av.stream.Disposition.default
        for packet in (*cover.encode(av.VideoFrame(32, 32, "yuvj420p")), *cover.encode()):
            container.mux(packet)
        for packet in read_from.demux(inner):
            if packet.dts is not None:
                packet.stream = copy
                container.mux(packet)
    return path


@pytest.mark.parametrize("cover_first", [True, False])
@pytest.mark.parametrize(("name", "attached"), [("a.mkv", False), ("a.mp4", True), ("a.mov", True)])
def test_a_cover_picture_is_skipped(tmp_path: Path, name: str, attached: bool, cover_first: bool) -> None:
    frames = read(write_with_cover(tmp_path / name, attached=attached, cover_first=cover_first))
    assert [frame.shape for frame in frames] == [(64, 64, 3)] * 20


def test_sound_with_a_cover_picture_is_no_video(tmp_path: Path) -> None:
    path = write_with_cover(tmp_path / "song.mp4", attached=True, film=False)
    with pytest.raises(BadInput, match=r"song.mp4 holds no video stream \(it holds a cover picture, audio\)"):
        read(path)


@pytest.mark.parametrize("suffix", ["h264", "264"])
def test_raw_video_has_times(tmp_path: Path, suffix: str) -> None:
    """Raw H.264 has no timestamps; they follow from the number of the frame and the rate."""
    video = write_video(tmp_path / f"a.{suffix}", grey_frames(10), [i / 25 for i in range(10)])
    results = [result for _, result in classify_frames(slow_runtime(), str(video))]
    assert [result.time_s for result in results] == pytest.approx([i / 25 for i in range(10)])


def test_raw_video_within_a_glob_starts_at_zero(tmp_path: Path) -> None:
    for name in ("1.h264", "2.h264"):
        write_video(tmp_path / name, grey_frames(3), [0, 0.04, 0.08])
    results = [result for _, result in classify_frames(slow_runtime(), f"{tmp_path}/*.h264")]
    assert [result.time_s for result in results] == pytest.approx([0, 0.04, 0.08] * 2)
    assert [result.frame_index for result in results] == list(range(6))


def test_a_video_that_changes_its_size(tmp_path: Path) -> None:
    times = [i / 25 for i in range(4)]
    parts = [
        write_video(tmp_path / f"{k}.h264", grey_frames(4, size), times) for k, size in enumerate([(64, 96), (48, 64)])
    ]
    (tmp_path / "both.h264").write_bytes(b"".join(part.read_bytes() for part in parts))
    shapes = [frame.shape for frame, _ in classify_frames(slow_runtime(), str(tmp_path / "both.h264"))]
    assert shapes == [(64, 96, 3)] * 4 + [(48, 64, 3)] * 4
