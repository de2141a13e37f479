"""Leave passwords out of addresses and of texts that hold addresses."""

from __future__ import annotations

import re

_DOTTED_HOST = re.compile(r"(\[[^\]]*\]|[^:/?#@]*\.[^:/?#@]*)(:\d+)?(?=[/?#]|$)")
_SECRET_START = re.compile(r"[?#]|[^/?#]*=")  # some cameras take user=...&password=... in the path
_END = r"(?::\d+)?(?:[/?#\s'\",;)]|[.:]?(?:\s|$))"  # of a host in a text
_PLAIN_HOST = rf"(?:\[[^\]\s]*\]|[^\s/@:?#'\"]*\.[^\s/@:?#'\"]*|(?!\S*@)[^\s/@:?#'\"]*){_END}"
# A path of Python holds one slash of the two.
_START = r"(?:[a-z][a-z0-9+.-]*://|\b(?:https?|rtsps?|rtmps?|ftps?|tcp|udp|rtp|srt|mqtts?|wss?):/(?!/))"
_USER_IN_TEXT = re.compile(rf"({_START})(?!{_PLAIN_HOST}).*@", re.IGNORECASE)
_SECRET_IN_TEXT = re.compile(r"((?:user|login|usr|pass|pwd|token|key|secret|auth)\w*=)[^\s&;'\"]+", re.IGNORECASE)
_SCHEME = "://"


def redact(url: str) -> str:
    """A URL without user, password, query and fragment, and without path segments from the first `key=value` on.

    A password may hold unescaped slashes and at signs, so everything up to the last `@` is dropped unless the URL
    begins with an address or a host name with a dot, and no other such host follows an `@`.
    """
    scheme, _, rest = url.partition(_SCHEME)
    before, _, after = rest.rpartition("@")
    if not _DOTTED_HOST.match(rest) or (before and _DOTTED_HOST.match(after)):
        rest = after
    return f"{scheme}{_SCHEME}{_SECRET_START.split(rest, maxsplit=1)[0]}"


def redact_text(text: str) -> str:
    """A text whose addresses have no user and password, and no values of parameters such as `password=`."""
    if ":/" not in text:
        return text
    return _SECRET_IN_TEXT.sub(r"\1...", _USER_IN_TEXT.sub(r"\1", text))
