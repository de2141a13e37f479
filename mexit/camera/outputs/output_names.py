"""Names of cameras and times in the names of files and topics."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timezone
from hashlib import sha256

from mexit.errors import UsageError

_OTHER = re.compile(r"[^a-z0-9-]+")
_MAX_LENGTH = 64
FILE_TIME = r"\d{8}T\d{6}\.\d{3}Z"  # what `file_time` returns


def utc_now() -> datetime:
    """The present time."""
    return datetime.now(timezone.utc)


def file_time(time: datetime) -> str:
    """A time in the names of files, such as 20260131T235959.123Z; names sort by time."""
    return f"{time:%Y%m%dT%H%M%S}.{time.microsecond // 1000:03}Z"


def camera_slug(name: str) -> str:
    """A name in lower case with `_` for everything but letters, digits and dashes of ASCII.

    A long name, and one with other letters, gets eight digits of its hash, because several such names would give the
    same text.
    """
    slug = _OTHER.sub("_", name.lower()).strip("_")
    if name.isascii() and 0 < len(slug) <= _MAX_LENGTH:
        return slug
    digits = sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{slug[:_MAX_LENGTH]}_{digits}".strip("_")


def camera_slugs(names: Sequence[str]) -> dict[str, str]:
    """The slug of each camera. Raises `UsageError` if two cameras have the same."""
    slugs: dict[str, str] = {}
    for name in names:
        slug = camera_slug(name)
        for other, taken in slugs.items():
            if taken == slug:
                raise UsageError(
                    f"cameras '{other}' and '{name}' have the same name in topics and files, {slug}: rename one"
                )
        slugs[name] = slug
    return slugs
