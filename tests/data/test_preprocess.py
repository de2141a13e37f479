"""Bytes, arrays and Pillow images give bit-identical tensors, alone and in a batch; other values are refused."""

from __future__ import annotations

import io
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from sample_images import encode, noise, spec

from mexit.core.manifest import InputSpec
from mexit.data.preprocess import check_tensor, fits, prepare, prepare_batch
from mexit.errors import BadInput

SPECS = {
    "grey": spec(1, (8, 8)),
    "grey box": spec(1, (8, 8), resize="box"),
    "colour": spec(3, (8, 8)),
    "colour cover": spec(3, (6, 10), fit="cover"),
    "grey contain": spec(1, (10, 6), fit="contain"),
    "colour cropped": spec(3, (8, 8), crop=0.75),
}
SHAPES = {
    "fitting grey": (8, 8),
    "fitting colour": (8, 8, 3),
    "large": (37, 23, 3),
    "wide grey": (5, 40),
    "one": (1, 1),
}
each_spec = pytest.mark.parametrize("input_spec", SPECS.values(), ids=SPECS.keys())


def accepted_forms(array: np.ndarray) -> dict[str, Any]:
    """The same image in every accepted form."""
    lazy = Image.open(io.BytesIO(encode(array)))
    return {
        "PNG": encode(array),
        "bytearray": bytearray(encode(array)),
        "memoryview": memoryview(encode(array)),
        "TIFF": encode(array, "TIFF"),
        "BMP": encode(array, "BMP"),
        "WEBP lossless": encode(array, "WEBP", lossless=True),
        "Pillow": Image.fromarray(array),
        "Pillow from a file": lazy,
        "array": array,
        "negative strides": array[::-1][::-1],
        "Fortran order": np.asfortranarray(array),
    }


@each_spec
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_every_form_gives_the_same_bits(input_spec: InputSpec, shape: tuple[int, ...]) -> None:
    array = noise(*shape)
    expected = prepare(array, input_spec)
    assert (expected.shape, expected.dtype) == (input_spec.shape, np.float32)
    assert expected.flags.c_contiguous
    for name, image in accepted_forms(array).items():
        assert prepare(image, input_spec).tobytes() == expected.tobytes(), name


@each_spec
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_batch_gives_the_same_bits_as_single_images(input_spec: InputSpec, shape: tuple[int, ...]) -> None:
    batch = noise(3, *shape)
    expected = np.stack([prepare(image, input_spec) for image in batch])
    for images in (batch, list(batch), [encode(image) for image in batch], [batch[0], encode(batch[1]), batch[2]]):
        assert prepare_batch(images, input_spec).tobytes() == expected.tobytes()


def test_an_array_of_the_right_size_is_only_divided_by_255() -> None:
    colour = noise(8, 8, 3)
    expected = colour.transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    assert prepare(colour, spec(3)).tobytes() == expected.tobytes()
    grey = noise(8, 8)
    assert prepare(grey, spec(1)).tobytes() == (grey[None].astype(np.float32) / np.float32(255)).tobytes()
    assert prepare(grey, spec(3)).tobytes() == np.repeat(prepare(grey, spec(1)), 3, axis=0).tobytes()


def test_an_array_of_the_right_size_needs_no_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert prepare(noise(8, 8), spec(1)).shape == (1, 8, 8)
    assert prepare_batch(noise(4, 8, 8, 3), spec(3)).shape == (4, 3, 8, 8)


def test_grey_is_itu_r_601_luma() -> None:
    colour = noise(8, 8, 3)
    expected = (colour @ np.asarray([19595, 38470, 7471]) + 0x8000) >> 16
    assert (prepare(colour, spec(1))[0] * 255).round().astype(int).tolist() == expected.tolist()


def test_box_is_the_mean_of_whole_blocks() -> None:
    blocks = np.kron(noise(8, 8), np.ones((5, 5), np.uint8))
    assert prepare(blocks, spec(1, resize="box")).tobytes() == prepare(noise(8, 8), spec(1)).tobytes()


def test_an_empty_batch_has_the_input_shape() -> None:
    for images in ([], np.zeros((0, 8, 8, 3), np.uint8), np.zeros((0, 9, 9), np.uint8)):
        assert prepare_batch(images, spec(3)).shape == (0, 3, 8, 8)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 40), st.booleans(), st.sampled_from(["stretch", "cover", "contain"]),
    st.sampled_from([1.0, 0.9, 0.5, 0.01]), st.sampled_from([1, 3]),
)  # fmt: skip
@example(1, 40, False, "contain", 1.0, 1)
@example(4, 4, False, "stretch", 0.01, 1)
def test_any_size_gives_the_input_shape_within_0_and_1(
    height: int, width: int, colour: bool, fit: str, crop: float, channels: int
) -> None:
    image = noise(height, width, 3) if colour else noise(height, width)
    input_spec = spec(channels, (7, 5), fit=fit, crop=crop)
    tensor = prepare(image, input_spec)
    assert tensor.shape == (channels, 7, 5)
    assert 0 <= tensor.min() <= tensor.max() <= 1
    white = prepare(np.full_like(image, 255), input_spec)
    assert white.max() == 1
    assert fit == "contain" or white.min() == 1


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((8, 8), np.float32), r"expected a uint8 image \(H, W\), .*, found float32 \(8, 8\)"),
        (np.zeros((8, 8), np.int64), r"found int64 \(8, 8\)"),
        (np.zeros((8, 8), bool), r"found bool \(8, 8\)"),
        (np.zeros((8, 8, 2), np.uint8), r"found uint8 \(8, 8, 2\)"),
        (np.zeros((8, 8, 1), np.uint8), r"found uint8 \(8, 8, 1\)"),
        (np.zeros((1, 8, 8, 3), np.uint8), r"found uint8 \(1, 8, 8, 3\)"),
        (np.zeros((0, 8), np.uint8), r"found uint8 \(0, 8\)"),
        (np.zeros((8, 0, 3), np.uint8), r"found uint8 \(8, 0, 3\)"),
        (np.zeros(64, np.uint8), r"found uint8 \(64,\)"),
        ("picture.png", r"found str: read the file first, open\(path, 'rb'\).read\(\)"),
        (None, "found NoneType"),
        ([[0, 0], [0, 0]], "found list"),
    ],
    ids=["float", "int64", "bool", "two channels", "one channel", "batch", "no rows", "no columns", "flat", "path",
         "none", "list"],
)  # fmt: skip
def test_other_values_are_refused(image: Any, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        prepare(image, spec())


GOOD = np.full((2, 3, 8, 8), 0.5, np.float32)
TENSORS: dict[str, tuple[np.ndarray, str]] = {
    "float64": (GOOD.astype(np.float64), r"expected images float32 \(B, 3, 8, 8\) in \[0, 1\], found float64"),
    "float16": (GOOD.astype(np.float16), "found float16"),
    "channels last": (np.moveaxis(GOOD, 1, -1), r"found float32 \(2, 8, 8, 3\)"),
    "one channel": (GOOD[:, :1], r"found float32 \(2, 1, 8, 8\)"),
    "no batch": (GOOD[0], r"found float32 \(3, 8, 8\)"),
    "other size": (GOOD[:, :, :7], r"found float32 \(2, 3, 7, 8\)"),
    "0..255": (
        GOOD * 510,
        r"found values from 255 to 255 \(this looks like 0\.\.255: pass uint8, or divide by 255\)",
    ),
    "a little over": (GOOD * 2.01, r"found values from 1.005 to 1.005$"),
    "below zero": (GOOD - 1, "found values from -0.5 to -0.5"),
    "nan": (np.where(np.arange(8) == 3, np.float32(np.nan), GOOD), "not finite"),
    "infinity": (GOOD + np.float32(np.inf), "not finite"),
}


@pytest.mark.parametrize(("tensor", "words"), TENSORS.values(), ids=TENSORS.keys())
def test_a_tensor_of_another_kind_is_refused(tensor: np.ndarray, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        check_tensor(tensor, spec(3))


def test_a_good_tensor_is_returned_unchanged() -> None:
    edges = np.asarray([0, 1], np.float32).repeat(3 * 64).reshape(2, 3, 8, 8)
    for tensor in (GOOD, edges, GOOD[:0]):
        assert check_tensor(tensor, spec(3)) is tensor


@pytest.mark.parametrize(
    ("shape", "input_spec", "expected"),
    [((8, 8), spec(1), True), ((8, 8), spec(3), True), ((8, 8, 3), spec(3), True), ((8, 8, 3), spec(1), False),
     ((8, 8, 4), spec(3), False), ((8, 9), spec(1), False), ((8, 8), spec(1, crop=0.9), False)],
    ids=str,
)  # fmt: skip
def test_fits(shape: tuple[int, ...], input_spec: InputSpec, expected: bool) -> None:
    assert fits(np.zeros(shape, np.uint8), input_spec) == expected
    assert not fits(np.zeros(shape, np.float32), input_spec)
