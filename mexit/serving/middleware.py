"""Bearer tokens and the identity of clients."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Sequence
from functools import lru_cache

from mexit.errors import UsageError
from mexit.serving.asgi import HTTPError, Request, Response
from mexit.serving.responses import error_response

PUBLIC_ROUTES = ("/v2/health/live", "/v2/health/ready")  # for load balancers, which hold no token
_ADMIN = 1  # number of the token that may load and unload models
_IPV6_NETWORK_BITS = 64  # a host chooses the other bits of its IPv6 address freely


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


def check_admin(token: int | None) -> None:
    """Raise status 403 for a token that may not load and unload models; None: the server has no tokens."""
    if token not in (None, _ADMIN):
        raise HTTPError(403, "only the first token of the server may load and unload models")


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

    The number of the token, from 1, is stored in the scope as `mexit_token`.
    """

    def __init__(self, tokens: Sequence[str]) -> None:
        self._tokens = [token.encode() for token in tokens]

    def check(self, request: Request) -> Response | None:
        """The refusal of a request, or None. Without tokens, no request is refused."""
        if not self._tokens:
            return None
        values = [value for name, value in request.scope["headers"] if name == b"authorization"]
        request.scope["mexit_token"] = number = self.number(values)
        if request.path in PUBLIC_ROUTES or number:
            return None
        return error_response("send the header: Authorization: Bearer TOKEN", 401, {"www-authenticate": "Bearer"})

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
