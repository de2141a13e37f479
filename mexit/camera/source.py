"""What a source string names: a camera of this machine, a live stream, or files to read in order.

    0, /dev/video0                                  camera
    rtsp:// rtsps:// rtmp:// rtmps:// tcp:// udp:// rtp:// http:// https://    live stream
    http(s)://.../clip.mp4, .../picture.jpg         one file, read to its end
    clip.mp4, picture.png, FOLDER, GLOB             files, in natural order (frame2 before frame10)

An address may hold a password; `Source.name` never does, and it is the only one that is shown or stored.
"""

from __future__ import annotations

import glob
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mexit.data.image_files import SUFFIXES as IMAGE_SUFFIXES
from mexit.errors import NotFound, UsageError

STREAM_SCHEMES = ("rtsp", "rtsps", "rtmp", "rtmps", "tcp", "udp", "rtp", "http", "https")
VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts"),
    *(".wmv", ".flv", ".3gp", ".ogv", ".h264", ".264", ".h265", ".265"),
)
HOW_TO_WRITE = (
    "give a camera number (0), a stream (rtsp://...), a video or image file, a folder of images or a glob"
)
_HIDDEN = "***"
_SECRET_KEYS = "user|username|usr|pass|passwd|password|pwd|token|access_token|auth|key|apikey|api_key|secret|sig"
# A value ends at the next separator, or where a camera joins its next field with an underscore.
_SECRET_VALUE = re.compile(rf"(?i)\b((?:{_SECRET_KEYS}|signature))=(.*?)(?=_[a-z]+=|[&;#?/\s'\"]|$)")
_JOINED_SECRET = re.compile(rf"(?i)(_(?:{_SECRET_KEYS}))=(.*?)(?=_[a-z]+=|[&;#?/\s'\"]|$)")
_USER_INFO = re.compile(r"://([^\s'\"]*)@")


@dataclass(frozen=True)
class Source:
    """What to open.

    Attributes:
        kind: "device", "stream" (both live), "download" (one file on the web) or "files".
        name: for people, logs and results; holds no credentials.
        address: what to open; may hold credentials, so it is not shown.
        files: of the kind "files".
    """

    kind: str
    name: str
    address: str = field(default="", repr=False)
    files: tuple[Path, ...] = ()

    @property
    def live(self) -> bool:
        """Whether frames come whether or not anybody is ready for them."""
        return self.kind in ("device", "stream")


def parse_source(text: str) -> Source:
    """Read a source string.

    Raises:
        UsageError: it names nothing that could be a source.
        NotFound: no such camera, file or folder, or nothing matches the glob.
    """
    text = text.strip()
    if not text:
        raise UsageError(f"the source is empty: {HOW_TO_WRITE}")
    if text.isascii() and text.isdigit():
        return _device(int(text))
    if device := re.fullmatch(r"/dev/video(\d+)", text):
        return _device(int(device[1]))
    scheme, separator, rest = text.partition("://")
    if not separator:
        return _files(text)
    if scheme.lower() == "file":
        return _files(unquote(rest))
    return _stream(scheme.lower(), text)


def is_image(name: str | Path) -> bool:
    """Whether the name ends like that of an image."""
    return Path(name).suffix.lower() in IMAGE_SUFFIXES


def redact(text: str) -> str:
    """The text with user names, passwords and keys of every address in it hidden."""
    text = _USER_INFO.sub(_hide_user, text)
    return _JOINED_SECRET.sub(rf"\1={_HIDDEN}", _SECRET_VALUE.sub(rf"\1={_HIDDEN}", text))


def _hide_user(match: re.Match[str]) -> str:
    """Hide what stands before the `@`, also a password with an unescaped slash; keep `host/a@2x.png`."""
    before = match[1]
    authority = re.split(r"[/?#]", before, maxsplit=1)[0]
    host, colon, port = authority.rpartition(":")
    is_host = authority != before and (not colon or port.isdigit() or host.startswith("["))
    return match[0] if is_host or not before else f"://{_HIDDEN}@"


def _device(number: int) -> Source:
    if sys.platform == "darwin":
        return Source("device", str(number), str(number))
    path = Path(f"/dev/video{number}")
    if not path.exists():
        present = ", ".join(sorted(str(other) for other in Path("/dev").glob("video*"))) or "none"
        raise NotFound(f"camera {number} ({path}) does not exist; present: {present}")
    return Source("device", str(path), str(path))


def _stream(scheme: str, address: str) -> Source:
    name = redact(address)
    if scheme not in STREAM_SCHEMES:
        known = ", ".join(f"{known}://" for known in STREAM_SCHEMES)
        raise UsageError(f"'{name}' is no source: {scheme}:// is not one of {known}")
    try:
        parts = urlsplit(address)
        nothing = not parts.netloc
    except ValueError:
        nothing = True
    if nothing:
        raise UsageError(f"'{name}' is no address: {scheme}://HOST[:PORT]/PATH is expected")
    if scheme in ("http", "https") and Path(parts.path).suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES:
        return Source("download", name, address)
    return Source("stream", name, address)


def _files(text: str) -> Source:
    path = Path(text).expanduser()
    if path.is_dir():
        return Source("files", text, files=_images_in(path))
    if path.exists():
        return Source("files", text, files=(path,))
    if any(sign in text for sign in "*?["):
        return Source("files", text, files=_matches(str(path)))
    raise NotFound(f"source {text} does not exist: {HOW_TO_WRITE}")


def _images_in(folder: Path) -> tuple[Path, ...]:
    files = in_natural_order(path for path in folder.iterdir() if is_image(path) and path.is_file())
    if not files:
        raise NotFound(
            f"folder {folder} holds no images ({', '.join(IMAGE_SUFFIXES)}); for videos or for images in "
            f"subfolders give a glob, such as '{folder}/*.mp4' or '{folder}/**/*.jpg'"
        )
    return files


def _matches(pattern: str) -> tuple[Path, ...]:
    found = [Path(name) for name in glob.glob(pattern, recursive=True)]
    wanted = [path for path in found if path.suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES and path.is_file()]
    if not wanted:
        others = f" ({len(found)} other files match)" if found else ""
        raise NotFound(f"no image or video matches {pattern}{others}")
    return in_natural_order(wanted)


def in_natural_order(paths: Iterable[Path]) -> tuple[Path, ...]:
    """Sorted as people number files: frame2 before frame10."""
    return tuple(sorted(paths, key=lambda path: [_natural(part) for part in path.parts]))


def _natural(name: str) -> list[tuple[int, int, str]]:
    pieces = re.split(r"([0-9]+)", name)
    return [(1, int(piece), piece) if place % 2 else (0, 0, piece) for place, piece in enumerate(pieces)]
