"""Source strings: a camera of this machine, a live stream, or files to read in order.

    0, /dev/video0, /dev/v4l/by-id/...              camera
    rtsp:// rtsps:// rtmp:// rtmps:// tcp:// udp:// rtp:// http:// https://    live stream
    http(s)://.../clip.mp4, .../picture.jpg         one file, read to its end (`identify_source` asks the server)
    clip.mp4, picture.png, FOLDER, GLOB             files, in natural order (frame2 before frame10)

An address may hold a password. `Source.name` holds none; only the name is shown or stored.
"""

from __future__ import annotations

import glob
import re
import stat
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mexit.core.redact import redact
from mexit.data.image_formats import SUFFIXES as IMAGE_SUFFIXES
from mexit.errors import NotFound, UsageError

STREAM_SCHEMES = ("rtsp", "rtsps", "rtmp", "rtmps", "tcp", "udp", "rtp", "http", "https")
_HOSTLESS = ("tcp", "udp", "rtp")  # may name a port of this machine alone
VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts"),
    *(".wmv", ".flv", ".3gp", ".ogv", ".h264", ".264", ".h265", ".265"),
)
SOURCE_HELP = "give a camera number (0), a stream (rtsp://...), a video or image file, a folder of images or a glob"
_USER_AND_PASSWORD = re.compile(r"[^/]*:[^/].*@")  # of an address without a scheme


@dataclass(frozen=True)
class Source:
    """A source to open.

    Attributes:
        kind: "device" or "stream" (both live), "download" (one file on the web) or "files".
        name: name for messages and results, without credentials.
        address: device or URL to open, possibly with credentials.
        files: the files of the kind "files".
        is_picture: whether a download is a picture, not a video.
    """

    kind: str
    name: str
    address: str = field(default="", repr=False)
    files: tuple[Path, ...] = ()
    is_picture: bool = False

    @property
    def live(self) -> bool:
        """Whether frames arrive at the source's own pace."""
        return self.kind in ("device", "stream")


def parse_source(text: str) -> Source:
    """Parse a source string.

    Raises:
        UsageError: the text is empty or a URL that is not supported.
        NotFound: the camera, file or folder does not exist, or the glob matches nothing.
    """
    text = text.strip()
    if not text:
        raise UsageError(f"the source is empty: {SOURCE_HELP}")
    if text.isascii() and text.isdigit():
        return _device(int(text))
    if device := re.fullmatch(r"/dev/video(\d+)", text):
        return _device(int(device[1]))
    if text.startswith("/dev/v4l/") or _is_device(Path(text)):
        return _device_file(text)
    scheme, separator, rest = text.partition("://")
    if not separator:
        _refuse_half_address(text)
        return _files(text)
    if scheme.lower() == "file":
        return _files(unquote(rest))
    return _url(scheme.lower(), f"{scheme.lower()}://{rest}")  # FFmpeg accepts schemes in small letters only


def is_image(name: str | Path) -> bool:
    """Whether a file name has the suffix of an image."""
    return Path(name).suffix.lower() in IMAGE_SUFFIXES


def _device(number: int) -> Source:
    if sys.platform == "darwin":
        return Source("device", str(number), str(number))
    path = Path(f"/dev/video{number}")
    if not path.exists():
        raise NotFound(f"camera {number} ({path}) does not exist; present: {_present_devices()}")
    return Source("device", str(path), str(path))


def _device_file(name: str) -> Source:
    """A camera by another name than its number, such as those of /dev/v4l/by-id, which stay the same."""
    if not Path(name).exists():
        raise NotFound(f"camera {name} does not exist; present: {_present_devices()}")
    return Source("device", name, name)


def _is_device(path: Path) -> bool:
    try:
        return stat.S_ISCHR(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def _present_devices() -> str:
    devices = [device for pattern in ("video*", "v4l/by-id/*") for device in sorted(Path("/dev").glob(pattern))]
    return ", ".join(map(str, devices)) or "none"


def _refuse_half_address(text: str) -> None:
    """Refuse an address without `//`, before a message shows it as a missing file."""
    scheme, colon, rest = text.partition(":")
    if colon and scheme.lower() in STREAM_SCHEMES and not Path(text).exists():
        name = redact(f"{scheme}://{rest.lstrip('/')}")
        raise UsageError(
            f"the source has no '//' after '{scheme}:'; type {name}, with user and password if it needs them"
        )


def _url(scheme: str, url: str) -> Source:
    name = redact(url)
    if scheme not in STREAM_SCHEMES:
        known = ", ".join(f"{known}://" for known in STREAM_SCHEMES)
        raise UsageError(f"'{name}' is no source: {scheme}:// is not one of {known}")
    try:
        parts = urlsplit(url)
        has_host = bool(parts.hostname) or (scheme in _HOSTLESS and bool(parts.netloc))
    except ValueError:
        has_host = False
    if not has_host:
        raise UsageError(f"'{name}' is no address: {scheme}://HOST[:PORT]/PATH is expected")
    if scheme in ("http", "https") and Path(parts.path).suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES:
        return Source("download", name, url, is_picture=is_image(parts.path))
    return Source("stream", name, url)


def _files(text: str) -> Source:
    try:
        path = Path(text).expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:  # a name that is too long, a folder without access, an unknown home
        why = getattr(error, "strerror", None) or str(error)
        raise NotFound(f"source {_without_password(text)} cannot be read: {why}") from None
    if is_folder:
        return Source("files", text, files=_images_in(path))
    if exists:
        return Source("files", text, files=(path,))
    if any(character in text for character in "*?["):
        return Source("files", text, files=_matches(str(path)))
    if _USER_AND_PASSWORD.match(text):
        name = _without_password(text)
        raise NotFound(f"source {name} does not exist; an address begins with its scheme, such as rtsp://")
    raise NotFound(f"source {text} does not exist: {SOURCE_HELP}")


def _without_password(text: str) -> str:
    """A source without a scheme, as messages show it."""
    return f"...@{text.rpartition('@')[2]}" if _USER_AND_PASSWORD.match(text) else text


def _images_in(folder: Path) -> tuple[Path, ...]:
    visible = (path for path in folder.iterdir() if not path.name.startswith("."))
    files = _natural_order(path for path in visible if is_image(path) and path.is_file())
    if not files:
        raise NotFound(
            f"folder {folder} holds no images ({', '.join(IMAGE_SUFFIXES[:4])}, ...); for videos or for images in "
            f"subfolders give a glob, such as '{folder}/*.mp4' or '{folder}/**/*.jpg'"
        )
    return files


def _matches(pattern: str) -> tuple[Path, ...]:
    paths = [Path(name) for name in glob.glob(pattern, recursive=True)]
    media = [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES and path.is_file()]
    if not media:
        others = f" ({len(paths)} other files match)" if paths else ""
        raise NotFound(f"no image or video matches {pattern}{others}")
    return _natural_order(media)


def _natural_order(paths: Iterable[Path]) -> tuple[Path, ...]:
    """Paths sorted with numbers by value: frame2 before frame10."""
    return tuple(sorted(paths, key=lambda path: [_natural_key(part) for part in path.parts]))


def _natural_key(name: str) -> list[tuple[int, int, str]]:
    pieces = re.split(r"([0-9]+)", name)
    return [(1, int(piece), piece) if i % 2 else (0, 0, piece) for i, piece in enumerate(pieces)]
