"""Bearer tokens and the identity of clients."""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from mexit.errors import UsageError
from mexit.serving.asgi import HTTPError, Request, Response
from mexit.serving.responses import error_response
from mexit.serving.secret_file import read_secret

# For load balancers, which hold no token, for readers of the description, and for the dashboard, which asks for the
# token. The last two are the same on every server.
PUBLIC_ROUTES = ("/v2/health/live", "/v2/health/ready", "/openapi.json", "/docs", "/")
PUBLIC_FOLDER = "/dashboard/"
_IPV6_NETWORK_BITS = 64  # a host chooses the other bits of its IPv6 address freely
_TOKEN_LINE = re.compile(r"(?P<token>[!-~]+)(?P<admin>[ \t]+admin)?")


@dataclass(frozen=True)
class Tokens:
    """The bearer tokens of a server.

    Attributes:
        values: the tokens; each one identifies a client. Without tokens, every request is accepted.
        admins: those that may load and unload models.
    """

    values: tuple[str, ...] = ()
    admins: tuple[str, ...] = ()


def read_tokens(text: str | None, path: Path | None) -> Tokens:
    """The tokens of a text or a file.

    Args:
        text: as for `parse_tokens`; the first one may load and unload models.
        path: a file with one token a line. A line `TOKEN admin` is of one that may load and unload models. Empty
            lines and those that begin with # are ignored.

    Raises:
        UsageError: both are given, the file is open to other users, or a token is empty, repeated or malformed.
        NotFound: there is no such file.
    """
    if path is None:
        values = parse_tokens(text)
        return Tokens(values, values[:1])
    if text is not None:
        raise UsageError("give --token or --token-file, not both")
    lines = read_secret(path, "the tokens").decode("latin-1").splitlines()
    entries = [(number, line.strip()) for number, line in enumerate(lines, start=1)]
    parsed = [_parse_line(number, line, path) for number, line in entries if line and not line.startswith("#")]
    values = tuple(token for token, _ in parsed)
    if not values:
        raise UsageError(f"the token file {path} has no token: write one a line")
    if len(set(values)) < len(values):
        raise UsageError(f"the token file {path} has a token twice: give each client one of its own")
    return Tokens(values, tuple(token for token, admin in parsed if admin))


def _parse_line(number: int, line: str, path: Path) -> tuple[str, bool]:
    """The token of a line, and whether it may load and unload models. Messages do not show the line."""
    match = _TOKEN_LINE.fullmatch(line)
    if match is None:
        raise UsageError(f"line {number} of the token file {path}: expected TOKEN or TOKEN admin")
    return match["token"], match["admin"] is not None


def parse_tokens(text: str | None) -> tuple[str, ...]:
    """Tokens separated by commas. Raises `UsageError` for an empty or repeated token."""
    if text is None:
        return ()
    tokens = tuple(part.strip() for part in text.split(","))
    if not all(tokens):
        raise UsageError("the token is empty: give a long random one, or none to serve this machine only")
    if len(set(tokens)) < len(tokens):
        raise UsageError("a token is given twice: give each client one of its own")
    return tokens


def client_id(request: Request) -> str:
    """The client's identity for the rate limiter: the number of its token, else its network address.

    An IPv6 client is identified by its /64 network. Headers such as X-Forwarded-For are ignored, because any
    client can set them.
    """
    return client_name(request.scope.get("mexit_token"), request.host)


def client_name(token: int | None, host: str | None) -> str:
    """The identity of a client from the number of its token, else from its network address."""
    if token is not None:
        return f"token {token}"
    return "" if host is None else _network(host)


def check_admin(is_admin: bool) -> None:
    """Raise status 403 for a token that may not load and unload models."""
    if not is_admin:
        raise HTTPError(403, "only an admin token of the server may load and unload models")


@lru_cache(maxsize=1024)
def _network(host: str) -> str:
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, _IPV6_NETWORK_BITS), strict=False))


class BearerTokens:
    """Answers 401 to requests without a valid `Authorization: Bearer TOKEN`.

    The scope gets the number of the token, from 1, as `mexit_token`, and whether it may load and unload models as
    `mexit_admin`.
    """

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = [token.encode() for token in tokens.values]
        self._admins = {number for number, token in enumerate(tokens.values, start=1) if token in tokens.admins}

    def check(self, request: Request) -> Response | None:
        """The refusal of a request, or None. Without tokens, no request is refused."""
        if not self._tokens:
            return None
        values = [value for name, value in request.scope["headers"] if name == b"authorization"]
        request.scope["mexit_token"] = number = self.number(values)
        request.scope["mexit_admin"] = self.is_admin(number)
        if number or request.path in PUBLIC_ROUTES or request.path.startswith(PUBLIC_FOLDER):
            return None
        return error_response("send the header: Authorization: Bearer TOKEN", 401, {"www-authenticate": "Bearer"})

    def is_admin(self, number: int | None) -> bool:
        """Whether the token with this number may load and unload models; None: the server has no tokens."""
        return number is None or number in self._admins

    def number(self, values: Sequence[bytes]) -> int | None:
        """The number of a request's token, from 1; 0 if there is no valid token; None if the server has no tokens.

        Args:
            values: of the header or metadata `authorization`.
        """
        if not self._tokens:
            return None
        scheme, _, token = values[0].partition(b" ") if len(values) == 1 else (b"", b"", b"")
        # Every token is compared in constant time, so that the time of the answer tells nothing about them.
        matches = [hmac.compare_digest(token.strip(), valid) for valid in self._tokens]
        return matches.index(True) + 1 if scheme.lower() == b"bearer" and any(matches) else 0
