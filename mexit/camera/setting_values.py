"""Checks of the values in a file of cameras: each returns the value, or raises `ValueError` with what was expected."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mexit.camera.outputs.mqtt_address import check_topic, parse_broker
from mexit.camera.region import Region
from mexit.core.budget import Budget, parse_macs
from mexit.core.redact import redact_text
from mexit.errors import UsageError

Parse = Callable[[Any], Any]
_SHOWN = 60  # characters of a value in a message
_NOT_IN_NAMES = "/#+"  # they have a meaning in addresses and in topics of MQTT
_LONGEST_NAME = 64
_LARGEST = 1e9  # of a number: 30 years in seconds, more bytes in MB than a disk holds
_LARGEST_WHOLE = 10_000  # of a number of votes, threads, files or attempts


def text(value: Any) -> str:
    """A text that is not empty."""
    if not isinstance(value, str) or not value.strip():
        raise _unexpected(value, "a text in quotes")
    return value


def name(value: Any) -> str:
    """The name of a camera."""
    valid = isinstance(value, str) and value.strip() == value and value.isprintable() and value not in (".", "..")
    if not valid or not 0 < len(value) <= _LONGEST_NAME or any(character in value for character in _NOT_IN_NAMES):
        raise _unexpected(value, f"1 to {_LONGEST_NAME} printable characters without {', '.join(_NOT_IN_NAMES)}")
    return str(value)


def flag(value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise _unexpected(value, "true or false")
    return value


def number(value: Any, *, zero: bool = False, most: float = _LARGEST) -> float:
    """A number above zero, at most `most`; with `zero`, zero too."""
    if not _is_number(value) or not 0 <= value <= most or (not zero and value == 0):
        raise _unexpected(value, f"a number {'of at least' if zero else 'above'} 0 and at most {most:.0f}")
    return float(value)


def share(value: Any) -> float:
    """A number from 0 to below 1."""
    if not _is_number(value) or not 0 <= value < 1:
        raise _unexpected(value, "a share from 0 to below 1")
    return float(value)


def whole(value: Any, *, least: int = 1) -> int:
    """A whole number from `least` to 10,000."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _LARGEST_WHOLE:
        raise _unexpected(value, f"a whole number of at least {least} and at most {_LARGEST_WHOLE}")
    return value


def choice(value: Any, *, known: Sequence[str]) -> str:
    """One of the known words."""
    if value not in known:
        raise _unexpected(value, f"one of {', '.join(known)}")
    return str(value)


def words(value: Any, *, known: Sequence[str]) -> tuple[str, ...]:
    """A list of known words."""
    if not isinstance(value, list) or not value:
        raise _unexpected(value, f"a list of {', '.join(known)}")
    return tuple(choice(word, known=known) for word in value)


def file_path(value: Any, *, suffix: str = "") -> Path:
    """The path of a file or folder; `~` is the home directory."""
    text(value)
    try:
        path = Path(value).expanduser()
        path.resolve()
        path.exists()
    except (OSError, RuntimeError, ValueError):  # too long, links in a circle, an unknown home, a zero byte
        raise _unexpected(value, "a path that this system can use") from None
    if suffix and path.suffix.lower() != suffix:
        raise _unexpected(value, f"a path that ends in {suffix}")
    return path


def url(value: Any, *, schemes: Sequence[str]) -> str:
    """An address with a host. The message does not show the value, which may hold a password."""
    expected = " or ".join(f"{scheme}://HOST" for scheme in schemes)
    try:
        parts = urlsplit(text(value))
        valid = parts.scheme in schemes and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        valid = False
    if not valid:
        raise ValueError(f"no address; expected {expected}")
    return str(value)


def broker(value: Any) -> str:
    """The address of an MQTT broker, see `parse_broker`. The message does not show the value."""
    address = url(value, schemes=("mqtt", "mqtts"))
    try:
        parse_broker(address)
    except UsageError as error:
        raise ValueError(str(error)) from None
    return address


def topic(value: Any, *, empty: bool = False) -> str:
    """The beginning of topics of MQTT, see `check_topic`; with `empty`, it may be empty."""
    if empty and value == "":
        return ""
    try:
        check_topic(text(value))
    except UsageError as error:
        raise ValueError(str(error)) from None
    return str(value)


def check_budget(value: Any) -> str:
    """A budget, see `core.budget`."""
    try:
        return Budget.parse(text(value)).text
    except UsageError as error:
        raise ValueError(str(error)) from None


def macs_per_second(value: Any) -> str:
    """A number of MACs as `40M`, `500M/s` or 40000000; without the unit of time."""
    plain = value.removesuffix("/s").rstrip() if isinstance(value, str) else value
    try:
        parse_macs(plain if isinstance(plain, int | float | str) else "", "rate")
    except UsageError:
        raise _unexpected(value, "a number of MACs such as 800k, 40M/s or 1.5G/s") from None
    return str(plain)


def check_region(value: Any) -> Region:
    """A list of x, y, width and height, see `Region`."""
    is_list = isinstance(value, list) and len(value) == 4
    if not is_list or not all(_is_number(side) and not side > _LARGEST for side in value):
        raise _unexpected(value, "[x, y, width, height], shares of the picture (0 to 1) or pixels")
    try:
        return Region.of(value)
    except UsageError as error:
        raise ValueError(str(error)) from None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _unexpected(value: Any, expected: str) -> ValueError:
    shown = redact_text(repr(value))
    shown = shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 3]}..."
    return ValueError(f"found {shown}; expected {expected}")
