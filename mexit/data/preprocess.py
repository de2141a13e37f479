"""Prepare an image for the network: decode, convert, resize, scale to [0, 1].

Training, calibration, run, server and camera all use this module, so the same image gives bit-identical tensors
everywhere. A uint8 array of the right size needs numpy only; everything else needs Pillow. Sizes are checked before
memory is allocated.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from mexit.core.atomic_io import read_bytes
from mexit.core.manifest import InputSpec, PrepareSpec
from mexit.data.image_formats import FORMATS, HEAD_BYTES, MAX_SLOW_PIXELS, SLOW_DECODERS, formats, is_heic, require_heif
from mexit.errors import BadInput, MexitError, TooLarge, missing_extra

if TYPE_CHECKING:
    from PIL import Image

MAX_ENCODED_BYTES = 64 << 20
MAX_PIXELS = 64_000_000  # Pillow takes 4 bytes per pixel and copy: about 520 MB for a turned photograph
_STRIP_PIXELS = 4_000_000
_TIFF_BITS = 258  # the tag BitsPerSample
SCALED_FORMATS = ("PPM", "JPEG2000")  # whose files declare the range of their values, and Pillow scales them to 16 bits
_COMMON_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "PPM")  # which Pillow reads without loading its other plugins
ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
BACKGROUNDS = {"black": (0, 0, 0, 255), "white": (255, 255, 255, 255)}


def prepare(image: Any, spec: InputSpec) -> NDArray[np.float32]:
    """Prepare one image.

    Args:
        image: encoded bytes (PNG, JPEG, ...), uint8 array (H, W), (H, W, 3) RGB or (H, W, 4) RGBA, or a Pillow image.
        spec: the input of the bundle.

    Returns:
        (C, H, W) float32 in [0, 1].

    Raises:
        BadInput: not an image, or an array with another shape or dtype.
        TooLarge: more than `MAX_PIXELS` pixels or `MAX_ENCODED_BYTES` bytes.
        MissingExtra: Pillow, or pillow-heif for a HEIC file, is needed and not installed.
    """
    return to_float(to_uint8(image, spec), spec)


def read_image(path: Path) -> bytes:
    """Read the encoded bytes of an image file. Raises `NotFound`, `Damaged`, `TooLarge`."""
    return read_bytes(path, "image", MAX_ENCODED_BYTES, too_large=TooLarge)


def prepare_batch(images: Sequence[Any] | NDArray[np.uint8], spec: InputSpec) -> NDArray[np.float32]:
    """Prepare B images, each as `prepare` does, to (B, C, H, W) float32 in [0, 1]."""
    if isinstance(images, np.ndarray) and fits(images[:1], spec, batch=True):
        return to_float(images, spec, batch=True)
    if not len(images):
        return np.zeros((0, *spec.shape), np.float32)
    return np.stack([prepare(image, spec) for image in images])


def to_uint8(image: Any, spec: InputSpec) -> NDArray[np.uint8]:
    """Decode, convert and resize one image to uint8 (H, W) or (H, W, 3) of the input's size."""
    if isinstance(image, np.ndarray) and fits(image, spec):
        return image
    return np.asarray(_resize(_decode(_open(image), spec.prepare, spec.channels), spec), np.uint8)


def decode_rgb(image: Any) -> NDArray[np.uint8]:
    """Decode one image to upright RGB (H, W, 3) uint8, for display. Takes and raises what `prepare` does."""
    return np.array(_decode(_open(image), PrepareSpec(), 3), np.uint8)


def to_float(image: NDArray[np.uint8], spec: InputSpec, *, batch: bool = False) -> NDArray[np.float32]:
    """Convert uint8 (H, W) or (H, W, 3), with a leading batch axis if `batch`, to float32, channels first."""
    grey = image.ndim == 2 + batch
    axis = int(batch)
    planes = np.expand_dims(image, axis) if grey else np.moveaxis(image, -1, axis)
    if planes.shape[axis] != spec.channels:
        planes = np.repeat(planes, spec.channels, axis=axis)
    return np.ascontiguousarray(planes, np.float32) / np.float32(255)


def check_tensor(images: NDArray[Any], spec: InputSpec) -> NDArray[np.float32]:
    """Return `images` if they are an input tensor (B, C, H, W) float32 in [0, 1], else raise `BadInput`."""
    expected = f"float32 (B, {spec.channels}, {spec.size[0]}, {spec.size[1]}) in [0, 1]"
    if images.ndim != 4 or images.shape[1:] != spec.shape or images.dtype != np.float32:
        raise BadInput(f"expected images {expected}, found {images.dtype} {images.shape}")
    if not images.size:
        return images
    low, high = float(images.min()), float(images.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise BadInput(f"expected images {expected}, found values that are not finite (NaN or infinity)")
    if low < 0 or high > 1:
        hint = " (this looks like 0..255: pass uint8, or divide by 255)" if high > 2 else ""
        raise BadInput(f"expected images {expected}, found values from {low:.4g} to {high:.4g}{hint}")
    return images


def fits(image: NDArray[Any], spec: InputSpec, *, batch: bool = False) -> bool:
    """Whether an array needs no Pillow: uint8 of the input's size, grey or with the input's channels."""
    shape = image.shape[1:] if batch else image.shape
    if image.dtype != np.uint8 or spec.prepare.crop != 1.0 or shape[:2] != spec.size:
        return False
    return len(shape) == 2 or (len(shape) == 3 and shape[2] == 3 == spec.channels)


def open_image(content: bytes | Path) -> Image.Image:
    """Read the header of an encoded image as a Pillow image, whose pixels are decoded on first use.

    Args:
        content: the encoded image, or the path of its file, of which the header alone is read.

    Raises:
        BadInput: not an image of a format that is read.
        TooLarge: it announces too many pixels.
        MissingExtra: as `prepare` raises it.
    """
    with _decoder_errors(content if isinstance(content, bytes) else b""):
        image = _identify(io.BytesIO(content) if isinstance(content, bytes) else content)
        try:
            _check_pixels(*image.size, _slow_kind(image))
        except TooLarge:
            image.close()
            raise
        return image


def _open(image: Any) -> io.BytesIO | Image.Image:
    """Return encoded bytes as a stream, an array as a Pillow image, and a Pillow image unchanged."""
    pillow = _pillow()
    if isinstance(image, bytes | bytearray | memoryview):
        if len(image) > MAX_ENCODED_BYTES:
            raise TooLarge(f"the image has {len(image)} bytes; at most {MAX_ENCODED_BYTES} are allowed")
        return io.BytesIO(image)
    if isinstance(image, np.ndarray):
        good = image.dtype == np.uint8 and (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4)))
        if not good or not image.size:
            raise BadInput(f"expected a uint8 image (H, W), (H, W, 3) or (H, W, 4), found {image.dtype} {image.shape}")
        _check_pixels(image.shape[1], image.shape[0])
        return cast("Image.Image", pillow.fromarray(image))
    if isinstance(image, pillow.Image):
        return cast("Image.Image", image)
    hint = ": read the file first, open(path, 'rb').read()" if isinstance(image, str | Path) else ""
    raise BadInput(f"expected encoded bytes, a uint8 array or a Pillow image, found {type(image).__name__}{hint}")


def _decode(opened: io.BytesIO | Image.Image, how: PrepareSpec, channels: int) -> Image.Image:
    """Decode to an upright Pillow image of mode L (1 channel) or RGB (3 channels)."""
    from PIL import ImageOps

    with _decoder_errors(opened.getbuffer() if isinstance(opened, io.BytesIO) else b""):
        image = _identify(opened) if isinstance(opened, io.BytesIO) else opened
        _check_pixels(*image.size, _slow_kind(image))
        image.load()
        _check_pixels(*image.size)  # the decoders of some formats correct the announced size
        declared_bits = _declared_bits(image)
        image = ImageOps.exif_transpose(image) if how.exif else image
        return _flatten(image, how, declared_bits).convert("L" if channels == 1 else "RGB")


@contextmanager
def _decoder_errors(content: bytes | memoryview) -> Iterator[None]:
    """Turn the errors of Pillow's decoders into `BadInput`; `content` is the encoded image."""
    from PIL import UnidentifiedImageError

    pillow = _pillow()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about large images, which _check_pixels refuses
            yield
    except MexitError:
        raise
    except UnidentifiedImageError:
        if is_heic(bytes(content[:HEAD_BYTES])):
            require_heif("Reading a HEIC image")
        raise BadInput(
            f"{len(content)} bytes that are not an image: supported are {', '.join(FORMATS)}, HEIC"
        ) from None
    except pillow.DecompressionBombError:
        raise TooLarge(f"the image announces too many pixels; at most {MAX_PIXELS} are allowed") from None
    except Exception as error:  # Pillow's decoders raise many exceptions on damaged files
        raise BadInput(f"the image is damaged: {error}") from None


def _identify(content: io.BytesIO | Path) -> Image.Image:
    """Read the header of an encoded image. Raises `UnidentifiedImageError`."""
    from PIL import UnidentifiedImageError

    pillow = _pillow()
    try:
        image = pillow.open(content, formats=_COMMON_FORMATS)
    except UnidentifiedImageError:
        image = pillow.open(content, formats=formats())
    tiles = getattr(image, "tile", ())
    if tiles and tiles[0][0] == "ppm":
        from mexit.data import ppm_decoder  # needs Pillow

        image.tile = [(ppm_decoder.NAME, *tiles[0][1:])]
    return cast("Image.Image", image)


def _slow_kind(image: Image.Image) -> str:
    """The kind of file, if its decoder is slow; else ""."""
    return next((SLOW_DECODERS[tile[0]] for tile in getattr(image, "tile", ()) if tile[0] in SLOW_DECODERS), "")


def _check_pixels(width: int, height: int, slow_kind: str = "") -> None:
    most = MAX_SLOW_PIXELS if slow_kind else MAX_PIXELS
    if width * height > most:
        kind = f" of a {slow_kind} file" if slow_kind else ""
        raise TooLarge(f"the image has {width} x {height} pixels; at most {most}{kind} are allowed")


def _declared_bits(image: Image.Image) -> int | None:
    """Bits of a grey value as its file declares them; None if it does not say how many of 16 are used."""
    if image.format in SCALED_FORMATS:
        return 16
    bits = getattr(image, "tag_v2", {}).get(_TIFF_BITS, ())
    return int(bits[0]) if len(bits) == 1 and 8 < bits[0] < 16 else None


def _flatten(image: Image.Image, how: PrepareSpec, declared_bits: int | None) -> Image.Image:
    """Blend transparent pixels with the background, and reduce 16-bit grey to 8 bits."""
    if image.mode.startswith("I"):
        wide = np.asarray(image)
        if wide.min(initial=0) < 0 or wide.max(initial=0) > 65535:
            raise BadInput(f"expected grey values of 8 or 16 bits, found {wide.min()} to {wide.max()}")
        bits = declared_bits or how.grey_bits or 16
        return cast("Image.Image", _pillow().fromarray(np.minimum(wide >> (bits - 8), 255).astype(np.uint8)))
    if image.mode == "F":
        raise BadInput("expected grey values of 8 or 16 bits, found floating-point pixels: store 8 or 16 bits")
    if image.mode in ALPHA_MODES or "transparency" in image.info:
        return _blend(image, BACKGROUNDS[how.alpha])
    return image


def _blend(image: Image.Image, background: tuple[int, int, int, int]) -> Image.Image:
    """Blend transparent pixels with a colour, in strips of bounded memory."""
    pillow, (width, height) = _pillow(), image.size
    blended: Image.Image = pillow.new("RGB", image.size)
    rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height))).convert("RGBA")
        opaque = pillow.alpha_composite(pillow.new("RGBA", strip.size, background), strip)
        blended.paste(opaque.convert("RGB"), (0, top))
    return blended


def _resize(image: Image.Image, spec: InputSpec) -> Image.Image:
    from PIL import ImageOps

    how, size = spec.prepare, (spec.size[1], spec.size[0])  # Pillow's sizes are (width, height)
    if how.crop != 1.0:
        width, height = image.size
        left, top = (min(round(side * (1 - how.crop) / 2), (side - 1) // 2) for side in (width, height))
        image = image.crop((left, top, width - left, height - top))
    if image.size == size:
        return image
    resample = getattr(_pillow().Resampling, how.resize.upper())
    if how.fit == "cover":
        return ImageOps.fit(image, size, resample)
    if how.fit == "contain":
        return _contain(image, size, resample)
    return image.resize(size, resample)


def _contain(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """Scale the whole image to fit and pad with black; each scaled side has at least one pixel."""
    scale = min(target / side for target, side in zip(size, image.size, strict=True))
    width, height = (max(1, round(side * scale)) for side in image.size)
    canvas: Image.Image = _pillow().new(image.mode, size)
    canvas.paste(image.resize((width, height), resample), ((size[0] - width) // 2, (size[1] - height) // 2))
    return canvas


def _pillow() -> Any:
    """Import Pillow on first use: a device that only gets arrays of the right size does not need it."""
    try:
        from PIL import Image
    except ImportError:
        raise missing_extra("pillow", "cpu", "Reading or resizing an image") from None
    return Image
