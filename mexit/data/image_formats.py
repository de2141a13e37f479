"""The image formats that are read, with their file suffixes and their first bytes.

`FORMATS` is an allow-list. A format of Pillow is on it if Pillow itself decodes it to the size that its header
announces, and tests read files of it. The others:

    EPS, PDF                          Pillow starts Ghostscript, or does not read them
    WMF, EMF, MPEG, BUFR, GRIB, HDF5  Pillow names the format, but does not decode it
    ICO, CUR, ICNS, BLP, DCX, IPTC    hold other pictures, whose size is not checked before they are decoded
    SPIDER, FITS                      floating-point pixels without a range
    FLI, FTEX, GBR, IM, IMT, MCIDAS, PCD, PIXAR, XPM, XVTHUMB    no test file can be made

HEIC, the format of many telephones, is read by the package pillow-heif (`mexit[heic]`).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from mexit.errors import missing_extra

# The order is that in which the content is tried; TGA has no signature.
FORMATS: dict[str, tuple[str, ...]] = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "AVIF": (".avif", ".avifs"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "DIB": (".dib",),
    "DDS": (".dds",),
    "QOI": (".qoi",),
    "PSD": (".psd",),
    "PCX": (".pcx",),
    "SGI": (".sgi", ".rgb", ".rgba", ".bw"),
    "SUN": (".ras",),
    "MSP": (".msp",),
    "XBM": (".xbm",),
    "TGA": (".tga", ".icb", ".vda", ".vst"),
}
HEIC_SUFFIXES = (".heic", ".heif", ".hif")
SUFFIXES = (*(suffix for suffixes in FORMATS.values() for suffix in suffixes), *HEIC_SUFFIXES)
# Pillow's decoders that are loops in Python, at about a second for a million pixels, which would stop a server.
SLOW_DECODERS = {"dds_rgb": "DDS", "qoi": "QOI", "ppm_plain": "plain PPM", "bmp_rle": "run-length BMP"}
MAX_SLOW_PIXELS = 1 << 20

HEAD_BYTES = 32  # that `is_picture` needs
_SIGNATURES = (
    *(b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    *(b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51\0", b"DDS \x7c\0\0\0", b"qoif", b"8BPS\0\1"),
)
_AVIF_BRANDS = (b"avif", b"avis")
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")


def is_picture(head: bytes) -> bool:
    """Whether a file begins with the signature of a format that is read; formats with short ones are left out.

    Args:
        head: the first `HEAD_BYTES` bytes.
    """
    return (
        head.startswith(_SIGNATURES)
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or (
            head[:2] == b"BM"
            and head[6:10] == bytes(4)
            and head[14:18] in (b"\x28\0\0\0", b"\x6c\0\0\0", b"\x7c\0\0\0")
        )
        or (head[4:8] == b"ftyp" and head[8:12] in _AVIF_BRANDS + _HEIC_BRANDS)
    )


def is_heic(head: bytes) -> bool:
    """Whether a file of this beginning is HEIC or another HEIF."""
    return head[4:8] == b"ftyp" and head[8:12] in _HEIC_BRANDS


@lru_cache(maxsize=1)
def formats() -> tuple[str, ...]:
    """The names of the formats that the installed packages read, as `PIL.Image.open` takes them."""
    from PIL import Image

    Image.init()
    names = [name for name in FORMATS if name in Image.OPEN]
    if import_heif() is not None:
        names.append("HEIF")
    return tuple(names)


def import_heif() -> Any:
    """Let Pillow read HEIC files; None without the package pillow-heif."""
    try:
        import pillow_heif
    except ImportError:
        return None
    pillow_heif.register_heif_opener()
    return pillow_heif


def require_heif(purpose: str) -> None:
    """Raise `MissingExtra` if HEIC files cannot be read; `purpose` is what needs them."""
    if "HEIF" not in formats():
        raise missing_extra("pillow-heif", "heic", purpose)
