"""THE path from an image to the input tensor. Training, calibration, run, server and camera all take it, so
the same picture gives bit-identical tensors everywhere.

An array of the right size and channels passes through numpy alone; whatever must be decoded, recoloured or
resized goes through Pillow. Sizes are checked before memory is taken.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mexit.core.atomic_io import read_bytes
from mexit.core.manifest import InputSpec, PrepareSpec
from mexit.errors import BadInput, TooLarge, missing_extra

MAX_ENCODED_BYTES = 64 << 20
MAX_PIXELS = 32_000_000  # decoded with transparency, about 400 MB at the peak
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
BACKGROUNDS = {"black": (0, 0, 0, 255), "white": (255, 255, 255, 255)}


def prepare(image: Any, spec: InputSpec) -> NDArray[np.float32]:
    """One image to the input tensor.

    Args:
        image: encoded bytes (PNG, JPEG, ...), uint8 array (H, W), (H, W, 3) or (H, W, 4), or a Pillow image.
        spec: the bundle's input.

    Returns:
        (C, H, W) float32 in [0, 1].

    Raises:
        BadInput: no image, or an array of another shape or dtype.
        TooLarge: more than `MAX_PIXELS` or `MAX_ENCODED_BYTES`.
    """
    return to_float(to_uint8(image, spec), spec)


def read_image(path: Path) -> bytes:
    """The encoded bytes of an image file. Raises `NotFound`, `Damaged`, `TooLarge`."""
    return read_bytes(path, "image", MAX_ENCODED_BYTES, too_large=TooLarge)


def prepare_batch(images: Sequence[Any] | NDArray[np.uint8], spec: InputSpec) -> NDArray[np.float32]:
    """Several images to (B, C, H, W) float32 in [0, 1]; each as `prepare` would."""
    if isinstance(images, np.ndarray) and fits(images[:1], spec, batch=True):
        return to_float(images, spec, batch=True)
    if not len(images):
        return np.zeros((0, *spec.shape), np.float32)
    return np.stack([prepare(image, spec) for image in images])


def to_uint8(image: Any, spec: InputSpec) -> NDArray[np.uint8]:
    """Everything but the change to floats: uint8 (H, W) or (H, W, 3) of the input's size."""
    if isinstance(image, np.ndarray) and fits(image, spec):
        return image
    picture = _decode(_open(image), spec)
    return np.asarray(_resize(picture, spec), np.uint8)


def to_float(image: NDArray[np.uint8], spec: InputSpec, *, batch: bool = False) -> NDArray[np.float32]:
    """uint8 (H, W) or (H, W, 3), with a batch axis in front if `batch`, to float32 with the channels first."""
    grey = image.ndim == 2 + batch
    axis = int(batch)
    planes = np.expand_dims(image, axis) if grey else np.moveaxis(image, -1, axis)
    if planes.shape[axis] != spec.channels:
        planes = np.repeat(planes, spec.channels, axis=axis)
    return np.ascontiguousarray(planes, np.float32) / np.float32(255)


def check_tensor(images: NDArray[Any], spec: InputSpec) -> NDArray[np.float32]:
    """A ready input tensor (B, C, H, W) float32 in [0, 1], or `BadInput` with what was found."""
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
    """Whether an array needs no Pillow: uint8, the input's size, and grey or the input's channels."""
    shape = image.shape[1:] if batch else image.shape
    if image.dtype != np.uint8 or spec.prepare.crop != 1.0 or shape[:2] != spec.size:
        return False
    return len(shape) == 2 or (len(shape) == 3 and shape[2] == 3 == spec.channels)


def _open(image: Any) -> Any:
    """A stream of encoded bytes or a Pillow image, whichever was given; arrays become Pillow images."""
    pillow = _pillow()
    if isinstance(image, bytes | bytearray | memoryview):
        if len(image) > MAX_ENCODED_BYTES:
            raise TooLarge(f"the image has {len(image)} bytes; at most {MAX_ENCODED_BYTES} are taken")
        return io.BytesIO(image)
    if isinstance(image, np.ndarray):
        good = image.dtype == np.uint8 and (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4)))
        if not good or not image.size:
            raise BadInput(
                f"expected a uint8 image (H, W), (H, W, 3) or (H, W, 4), found {image.dtype} {image.shape}"
            )
        _check_pixels(image.shape[1], image.shape[0])
        return pillow.fromarray(image)
    if isinstance(image, pillow.Image):
        return image
    raise BadInput(f"expected encoded bytes, a uint8 array or a Pillow image, found {type(image).__name__}")


def _decode(opened: Any, spec: InputSpec) -> Any:
    """A Pillow image, upright, of mode L or RGB as the input wants it."""
    from PIL import ImageOps, UnidentifiedImageError

    pillow = _pillow()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large images; the check below refuses them
            picture = pillow.open(opened, formats=FORMATS) if isinstance(opened, io.BytesIO) else opened
            _check_pixels(*picture.size)
            picture.load()
            picture = ImageOps.exif_transpose(picture) if spec.prepare.exif else picture
            return _flatten(picture, spec.prepare).convert("L" if spec.channels == 1 else "RGB")
    except BadInput:
        raise
    except UnidentifiedImageError:
        size = opened.getbuffer().nbytes
        raise BadInput(f"{size} bytes that are no image ({', '.join(FORMATS)} are read)") from None
    except pillow.DecompressionBombError:
        raise TooLarge(f"the image announces too many pixels; at most {MAX_PIXELS} are taken") from None
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        raise BadInput(f"the image is damaged: {error}") from None


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise TooLarge(f"the image has {width} x {height} pixels; at most {MAX_PIXELS} are taken")


def _flatten(picture: Any, spec: PrepareSpec) -> Any:
    """Put transparent pixels on the background, and bring 16-bit greys down to 8."""
    if picture.mode.startswith("I"):
        wide = np.asarray(picture, np.int64)
        if wide.min(initial=0) < 0 or wide.max(initial=0) > 65535:
            raise BadInput(f"expected grey values of 8 or 16 bits, found {wide.min()} to {wide.max()}")
        return _pillow().fromarray((wide >> 8).astype(np.uint8))
    if picture.mode == "F":
        raise BadInput("expected grey values of 8 or 16 bits, found floating-point pixels")
    if picture.mode in ALPHA_MODES or "transparency" in picture.info:
        solid = _pillow().new("RGBA", picture.size, BACKGROUNDS[spec.alpha])
        return _pillow().alpha_composite(solid, picture.convert("RGBA"))
    return picture


def _resize(picture: Any, spec: InputSpec) -> Any:
    from PIL import ImageOps

    how, size = spec.prepare, (spec.size[1], spec.size[0])
    if how.crop != 1.0:
        width, height = picture.size
        left, top = (min(round(side * (1 - how.crop) / 2), (side - 1) // 2) for side in (width, height))
        picture = picture.crop((left, top, width - left, height - top))
    if picture.size == size:
        return picture
    resample = getattr(_pillow().Resampling, how.resize.upper())
    if how.fit == "cover":
        return ImageOps.fit(picture, size, resample)
    if how.fit == "contain":
        return _contain(picture, size, resample)
    return picture.resize(size, resample)


def _contain(picture: Any, size: tuple[int, int], resample: Any) -> Any:
    """The whole picture on black; however long and thin it is, at least one pixel of it is seen."""
    scale = min(whole / side for whole, side in zip(size, picture.size, strict=True))
    width, height = (max(1, round(side * scale)) for side in picture.size)
    canvas = _pillow().new(picture.mode, size)
    canvas.paste(picture.resize((width, height), resample), ((size[0] - width) // 2, (size[1] - height) // 2))
    return canvas


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise missing_extra("pillow", "cpu", "Reading or resizing an image") from None
    return Image
