"""Client identity and tokens."""

from __future__ import annotations

from typing import NoReturn

import pytest

from mexit.errors import UsageError
from mexit.serving.asgi import Request
from mexit.serving.middleware import client_id, parse_tokens


async def never() -> NoReturn:
    raise AssertionError


def request_from(host: str, **scope: object) -> Request:
    return Request({"type": "http", "headers": [], "client": (host, 1), **scope}, never)


def test_a_client_is_a_token_or_an_address() -> None:
    assert client_id(request_from("203.0.113.7")) == "203.0.113.7"
    assert client_id(request_from("::ffff:203.0.113.7")) == "203.0.113.7"
    assert client_id(request_from("2001:db8::1")) == client_id(request_from("2001:db8::ffff:1"))
    assert client_id(request_from("2001:db8::1")) != client_id(request_from("2001:db8:0:1::1"))
    assert client_id(request_from("fe80::1%eth0")) == "fe80::/64"
    assert client_id(request_from("203.0.113.7", mexit_token=2)) == "token 2"
    headers = [(b"x-forwarded-for", b"198.51.100.1"), (b"forwarded", b"for=198.51.100.1")]
    assert client_id(request_from("203.0.113.7", headers=headers)) == "203.0.113.7"


def test_tokens_are_separated_by_commas() -> None:
    assert parse_tokens(None) == ()
    assert parse_tokens(" one two, three ") == ("one two", "three")
    for text in ("", " ", "one,", ","):
        with pytest.raises(UsageError, match="the token is empty"):
            parse_tokens(text)
    with pytest.raises(UsageError, match="given twice"):
        parse_tokens("one, one")
