"""Unusual images: tiny, huge, grey, transparent, 16-bit, CMYK, animated, turned, damaged."""

from __future__ import annotations

import io
import re
import struct
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sample_images import encode, noise, png_with_header, spec

from mexit.data import folder
from mexit.data.image_formats import FORMATS, formats
from mexit.data.preprocess import MAX_ENCODED_BYTES, MAX_PIXELS, decode_rgb, open_image, prepare, read_image
from mexit.errors import BadInput, Damaged, MissingExtra, NotFound, TooLarge

IMAGE = noise(8, 8, 3)
ORIENTATION = 0x0112


def levels(image: object, channels: int = 3, **options: object) -> np.ndarray:
    """The prepared image as integers 0..255, channels last."""
    tensor = prepare(image, spec(channels, **options)) * 255
    return np.moveaxis(tensor.round().astype(np.uint8), 0, -1)


def flat_file(kind: str) -> bytes:
    """A file of 20 x 30 pixels of the grey level 200; formats of black and white have white."""
    flat = np.full((20, 30, 3), 200, np.uint8)
    if kind == "PSD":
        head = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 20, 30, 8, 3) + bytes(12)
        return head + struct.pack(">H", 0) + flat.tobytes()
    if kind == "SUN":
        return struct.pack(">8I", 0x59A66A95, 30, 20, 24, 1800, 1, 0, 0) + flat.tobytes()
    return encode(Image.new("1", (30, 20), 1) if kind in ("MSP", "XBM") else flat, kind)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_supported_format_is_read(kind: str) -> None:
    expected = 255 if kind in ("MSP", "XBM") else 200
    assert np.abs(levels(flat_file(kind)).astype(int) - expected).max() <= 2


@pytest.mark.parametrize("kind", sorted(set(FORMATS) - {"XBM"}))
def test_half_of_a_file_is_refused(kind: str) -> None:
    content = encode(noise(64, 64, 3), kind) if kind not in ("PSD", "SUN", "MSP") else flat_file(kind)
    with pytest.raises(BadInput, match=r"the image is damaged: .|bytes that are not an image"):
        prepare(content[: len(content) // 2], spec())


def test_suffixes_are_those_of_the_formats() -> None:
    Image.init()
    for name, suffixes in FORMATS.items():
        for suffix in suffixes:
            assert Image.EXTENSION[suffix] in (name, "MPO"), suffix


@pytest.mark.parametrize("suffix", [".jpg", ".PNG", ".webp", ""])
def test_the_content_not_the_suffix_selects_the_format(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"picture{suffix}"
    path.write_bytes(encode(IMAGE, "GIF" if suffix == ".webp" else "PNG"))
    assert levels(read_image(path)).shape == (8, 8, 3)
    if suffix != ".webp":
        assert (levels(read_image(path)) == IMAGE).all()


@pytest.mark.parametrize("kind", ["EPS", "ICO", "ICNS", "SPIDER", "IM", "PDF"])
def test_formats_that_are_unsafe_to_decode_are_refused(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # IM
        content = encode(Image.new("L" if kind != "SPIDER" else "F", (16, 16)), kind)
    with pytest.raises(BadInput, match=rf"{len(content)} bytes that are not an image: supported are PNG"):
        prepare(content, spec())


def run_length_bmp(width: int, height: int) -> bytes:
    """A BMP file of 8 bits with run-length compression, without pixels."""
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, 2, 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1080, 0, 0, 1078) + head + bytes(1024) + b"\0\1"


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("DDS", encode(IMAGE, "DDS")[:12] + struct.pack("<II", 1024, 1025) + encode(IMAGE, "DDS")[20:]),
        ("QOI", encode(IMAGE, "QOI")[:4] + struct.pack(">II", 1025, 1024) + encode(IMAGE, "QOI")[12:]),
        ("plain PPM", b"P3 1025 1024 255\n0 0 0"),
        ("plain PPM", b"P2 1025 1024 255\n0"),
        ("run-length BMP", run_length_bmp(1025, 1024)),
    ],
    ids=["DDS", "QOI", "P3", "P2", "BMP"],
)
def test_formats_that_decode_slowly_have_a_limit_of_their_own(kind: str, content: bytes) -> None:
    with pytest.raises(TooLarge, match=rf"1025 x 1024 pixels; at most 1048576 of a {kind} file are allowed"):
        prepare(content, spec())


@pytest.mark.parametrize("largest", [1, 15, 100, 254, 256, 1000, 4095, 65534, 65535])
@pytest.mark.parametrize("kind", ["P5", "P6"])
def test_values_of_ppm_files_are_scaled_as_pillow_scales_them(kind: str, largest: int) -> None:
    """Pillow decodes these files in Python, in seconds for a million pixels; the limit for slow files does not hold."""
    shape = (9, 7) if kind == "P5" else (9, 7, 3)
    values = np.random.default_rng(largest).integers(0, largest + 1, shape)
    head = f"{kind} 7 9 {largest}\n".encode()
    content = head + values.astype(">u2" if largest > 255 else np.uint8).tobytes()
    with Image.open(io.BytesIO(content)) as expected, open_image(content) as found:
        assert (found.mode, found.format) == (expected.mode, "PPM")
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
    with pytest.raises(BadInput, match="the image is damaged"):
        prepare(content[:-1], spec())


def test_a_large_file_of_a_machine_vision_camera_is_read() -> None:
    content = b"P5 1400 1000 4095\n" + np.full(1_400_000, 2048, ">u2").tobytes()
    assert (levels(content, 1) == 128).all()


HEIC_HEAD = b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf"


def test_a_heic_file_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    formats.cache_clear()
    with pytest.raises(MissingExtra, match=r"Reading a HEIC image needs .*'pillow-heif': pip install 'mexit\[heic\]'"):
        prepare(HEIC_HEAD + bytes(100), spec())
    for name, suffix in (("cat", "png"), ("dog", "HEIC")):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"0.{suffix}").write_bytes(encode(IMAGE) if suffix == "png" else HEIC_HEAD)
    with pytest.raises(
        MissingExtra, match=r"Reading 1 of 2 images of .* such as dog/0\.HEIC, needs the package 'pillow-h"
    ):
        folder.load(tmp_path)
    (tmp_path / "dog/0.HEIC").rename(tmp_path / "dog/0.jpg")
    with pytest.raises(MissingExtra, match=r"image .*dog/0\.jpg: Reading a HEIC image"):
        folder.load(tmp_path).batch(np.asarray([0, 1]), spec())
    formats.cache_clear()


def test_a_heic_file_is_read() -> None:
    pytest.importorskip("pillow_heif")
    formats.cache_clear()
    assert "HEIF" in formats()
    content = encode(np.full((48, 64, 3), 200, np.uint8), "HEIF")
    assert np.abs(levels(content).astype(int) - 200).max() <= 3
    with pytest.raises(BadInput, match=r"the image is damaged|not an image"):
        prepare(content[: len(content) // 2], spec())


@pytest.mark.parametrize("value", [0, 77, 255])
def test_one_pixel_fills_the_input(value: int) -> None:
    assert (levels(np.full((1, 1), value, np.uint8)) == value).all()
    assert (levels(encode(np.full((1, 1), value, np.uint8))) == value).all()


def test_grey_is_repeated_and_black_and_white_are_0_and_255() -> None:
    assert (levels(encode(IMAGE[:, :, 0])) == IMAGE[:, :, :1]).all()
    bits = Image.fromarray(IMAGE[:, :, 0]).point(lambda level: 255 * (level > 127), "1")
    assert set(np.unique(levels(encode(bits)))) == {0, 255}


@pytest.mark.parametrize("background", ["black", "white"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "array"])
def test_transparent_pixels_show_the_background(background: str, kind: str) -> None:
    image = np.dstack([IMAGE, np.full((8, 8), 255, np.uint8)])
    image[:4, :, 3] = 0
    given = image if kind == "array" else encode(image, kind, **({"lossless": True} if kind == "WEBP" else {}))
    pixels = levels(given, alpha=background)
    assert (pixels[:4] == (255 if background == "white" else 0)).all()
    assert (pixels[4:] == IMAGE[4:]).all()


def test_half_transparent_pixels_are_blended() -> None:
    image = np.full((8, 8, 4), 200, np.uint8)
    image[:, :, 3] = 128
    assert np.abs(levels(encode(image)).astype(int) - 100).max() <= 1
    assert np.abs(levels(encode(image), alpha="white").astype(int) - 227).max() <= 1


def test_a_transparent_colour_of_a_palette_and_of_rgb_shows_the_background() -> None:
    palette = Image.fromarray(np.zeros((8, 8), np.uint8), "L").convert("P")
    assert (levels(encode(palette, transparency=0), alpha="white") == 255).all()
    red = np.zeros((8, 8, 3), np.uint8) + np.asarray([255, 0, 0], np.uint8)
    assert (levels(encode(red, transparency=(255, 0, 0)), alpha="white") == 255).all()
    assert (levels(encode(red, transparency=(0, 255, 0)), alpha="white") == red).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
@pytest.mark.parametrize("top", [65535, 200], ids=["full range", "nearly black"])
def test_16_bit_grey_is_divided_by_256_independent_of_its_range(kind: str, top: int) -> None:
    deep = np.linspace(0, top, 64).astype(np.uint16).reshape(8, 8)
    assert (levels(encode(deep, kind), 1)[:, :, 0] == deep >> 8).all()


def packed_12_bit_tiff(values: np.ndarray) -> bytes:
    """A grey TIFF file that declares 12 bits per pixel, two pixels in three bytes."""
    height, width = values.shape
    pairs = values.astype(np.uint32).reshape(-1, 2)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1)
    tags = [(256, width), (257, height), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, height)]
    tags.append((279, packed.size))
    pixels = packed.astype(np.uint8).tobytes()
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_the_declared_range_of_a_grey_file_is_used() -> None:
    twelve = (np.arange(64) * 65).reshape(8, 8)  # 0 to 4095
    expected = (twelve >> 4).astype(int)
    files = {
        "TIFF": packed_12_bit_tiff(twelve),
        "PGM": b"P5 8 8 4095\n" + twelve.astype(">u2").tobytes(),
        "8-bit PGM": b"P5 8 8 15\n" + (twelve >> 8).astype(np.uint8).tobytes(),
    }
    for name, content in files.items():
        found = levels(content, 1)[:, :, 0].astype(int)
        assert np.abs(found - expected).max() <= (16 if name.startswith("8") else 1), name
        assert found.max() >= 254, name


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_the_stored_range_holds_for_every_file_that_declares_none(kind: str, bits: int) -> None:
    deep = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    expected = np.minimum(deep.astype(int) >> (bits - 8), 255)
    assert (levels(encode(deep, kind), 1, grey_bits=bits)[:, :, 0] == expected).all()
    assert (levels(encode(deep >> (16 - bits), kind), 1, grey_bits=bits)[:, :, 0] == deep >> 8).all()
    declared = b"P5 8 8 4095\n" + (deep >> 4).astype(">u2").tobytes()
    assert (levels(declared, 1, grey_bits=bits) == levels(declared, 1)).all()
    assert (levels(encode(IMAGE), grey_bits=bits) == IMAGE).all()


@pytest.mark.parametrize("bits", [0, 8, 17])
def test_other_ranges_are_refused(bits: int) -> None:
    with pytest.raises(Damaged, match=f"prepare.grey_bits must lie in 9 to 16, found {bits}"):
        spec(grey_bits=bits)


@pytest.mark.parametrize("value", [-1, 65536], ids=["negative", "over 16 bits"])
def test_grey_values_beyond_16_bits_are_refused(value: int) -> None:
    with pytest.raises(BadInput, match=f"expected grey values of 8 or 16 bits, found {value} to {value}"):
        prepare(encode(Image.fromarray(np.full((8, 8), value, np.int32)), "TIFF"), spec())


def test_floating_point_pixels_are_refused() -> None:
    with pytest.raises(BadInput, match="found floating-point pixels"):
        prepare(encode(Image.fromarray(np.full((8, 8), 0.5, np.float32)), "TIFF"), spec())


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_is_read(kind: str) -> None:
    flat = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.abs(levels(encode(flat, kind)).astype(int) - [255, 0, 0]).max() <= 3
    assert levels(encode(flat, kind), 1).shape == (8, 8, 1)


@pytest.mark.parametrize("kind", ["LAB", "HSV", "YCbCr", "RGBX", "RGBa", "PA", "La"])
def test_pillow_images_of_rare_modes_are_read_or_refused(kind: str) -> None:
    for channels in (1, 3):
        try:
            tensor = prepare(Image.new(kind, (9, 9)), spec(channels))
        except BadInput:
            continue
        assert tensor.shape == (channels, 8, 8)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    frames = [Image.fromarray(np.full((8, 8), level, np.uint8)) for level in (250, 90, 0)]
    options = {"lossless": True} if kind == "WEBP" else {}
    moving = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(moving)).n_frames == 3
    assert (levels(moving) == 250).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_tag_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    upright = noise(8, 6, 3)
    flips = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.transpose(1, 0, 2), 6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1], 8: upright.transpose(1, 0, 2)[:, ::-1],
    }  # fmt: skip
    stored = encode(np.ascontiguousarray(flips[orientation]), exif=exif)
    assert (levels(stored, size=(8, 6)) == upright).all()
    assert (levels(Image.open(io.BytesIO(stored)), size=(8, 6)) == upright).all()
    if orientation != 1:
        unturned = prepare(stored, spec(3, size=flips[orientation].shape[:2], exif=False))
        assert (np.moveaxis(unturned * 255, 0, -1).round() == flips[orientation]).all()


@pytest.mark.parametrize("size", [(9000, 9000), (20_000, 20_000), (2**31 - 1, 2**31 - 1), (MAX_PIXELS + 1, 1)], ids=str)
def test_a_header_that_announces_too_many_pixels_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(TooLarge, match=f"at most {MAX_PIXELS} are allowed"):
        prepare(png_with_header(*size), spec())


def test_the_documented_number_of_pixels_is_answered() -> None:
    page = (Path(__file__).parents[2] / "docs" / "http-api.md").read_text()
    millions = re.search(r"pixels of an image \| (\d+) million", page)
    assert millions is not None
    assert int(millions[1]) * 1_000_000 == MAX_PIXELS


def test_a_photograph_of_50_megapixels_is_answered() -> None:
    assert np.abs(levels(encode(Image.new("L", (8160, 6144), 200), "JPEG")).astype(int) - 200).max() <= 1


def test_a_large_transparent_picture_is_blended_as_a_small_one() -> None:
    small = noise(40, 50, 4)
    large = np.kron(small, np.ones((50, 50, 1), np.uint8))  # 5 million pixels: more than one strip
    rows = decode_rgb(encode(large, compress_level=1))[::50, ::50]
    assert (rows == decode_rgb(encode(small))).all()


def test_too_many_bytes_and_too_large_arrays_are_refused() -> None:
    with pytest.raises(TooLarge, match=f"has {MAX_ENCODED_BYTES + 1} bytes; at most {MAX_ENCODED_BYTES} are allowed"):
        prepare(bytes(MAX_ENCODED_BYTES + 1), spec())
    large = np.zeros((1, MAX_PIXELS + 1), np.uint8)
    for image in (large, Image.fromarray(large)):
        with pytest.raises(TooLarge, match=f"{MAX_PIXELS + 1} x 1 pixels; at most {MAX_PIXELS} are allowed"):
            prepare(image, spec())


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM"])
@pytest.mark.parametrize("part", [0.02, 0.3, 0.6, 0.9])
def test_a_truncated_file_is_refused(kind: str, part: float) -> None:
    whole = encode(noise(64, 64, 3), kind)
    cut = whole[: int(len(whole) * part)]
    for image in (cut, bytearray(cut)):
        with pytest.raises(
            BadInput, match=r"the image is damaged: .|bytes that are not an image: supported are PNG, JPEG"
        ):
            prepare(image, spec())


def test_a_truncated_pillow_image_is_refused() -> None:
    half = encode(noise(64, 64, 3))[:4000]
    with pytest.raises(BadInput, match="the image is damaged: "):
        prepare(Image.open(io.BytesIO(half)), spec())


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 100, b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"%PDF-1.7",
     b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", png_with_header(0, 5)],
    ids=["empty", "zeros", "svg", "gif head", "png head", "pdf", "postscript", "no width"],
)  # fmt: skip
def test_other_content_is_refused_with_the_supported_formats(content: bytes) -> None:
    with pytest.raises(
        BadInput, match=rf"{len(content)} bytes that are not an image: supported are PNG, JPEG, |damaged"
    ):
        prepare(content, spec())


def test_random_damage_never_raises_anything_but_bad_input() -> None:
    rng = np.random.default_rng(5)
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "PPM", "BMP"):
        good = encode(noise(16, 16, 3), kind)
        for _ in range(60):
            bad = bytearray(good)
            for i in rng.integers(0, len(bad), 3):
                bad[i] = rng.integers(0, 256)
            try:
                assert prepare(bytes(bad), spec()).shape == (1, 8, 8)
            except BadInput:
                continue


def test_an_image_file_is_read_or_refused(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(encode(IMAGE))
    assert read_image(tmp_path / "x.png") == encode(IMAGE)
    with pytest.raises(NotFound, match=r"image .*gone\.png does not exist"):
        read_image(tmp_path / "gone.png")
    with pytest.raises(Damaged, match="is not a file"):
        read_image(tmp_path)
    with (tmp_path / "x.png").open("wb") as file:
        file.truncate(MAX_ENCODED_BYTES + 1)  # sparse
    with pytest.raises(TooLarge, match=rf"image .*x\.png has \d+ bytes; at most {MAX_ENCODED_BYTES} are expected"):
        read_image(tmp_path / "x.png")
