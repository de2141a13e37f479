"""Routes, requests and the application."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from mexit.serving.asgi import App, ClientDisconnected, HTTPError, Request, Response, Route, Routes


async def first(request: Request) -> Response:
    return Response(b"first")


async def second(request: Request) -> Response:
    if request.path_params["name"] == "bug":
        raise ValueError
    return Response(str(dict(request.path_params)).encode(), headers={"X-Name": "1"})


ROUTES = Routes([Route("/a/stats", first), Route("/a/{name}", second, "POST"), Route("/a/{name}/b.c", second)])


def scope_of(path: str, method: str = "GET", query: bytes = b"", headers: Any = ()) -> dict[str, Any]:
    return {"type": "http", "path": path, "method": method, "query_string": query, "headers": list(headers)}


@pytest.mark.parametrize(
    ("method", "path", "handler", "parameters"),
    [
        ("GET", "/a/stats", first, {}),
        ("HEAD", "/a/stats", first, {}),
        ("POST", "/a/stats", second, {"name": "stats"}),
        ("POST", "/a/x y", second, {"name": "x y"}),
        ("GET", "/a/x/b.c", second, {"name": "x"}),
        ("POST", "/a/{name}", second, {"name": "{name}"}),
    ],
)
def test_routes(method: str, path: str, handler: object, parameters: dict[str, str]) -> None:
    assert ROUTES.find(method, path) == (handler, parameters)


@pytest.mark.parametrize("path", ["/", "/a", "/a/", "/a/stats/", "/a/x/b.c\n", "/a/x/bxc", "/a/x/y/b.c", "//a/stats"])
def test_no_such_route(path: str) -> None:
    with pytest.raises(HTTPError) as raised:
        ROUTES.find("GET", path)
    assert raised.value.status == 404


def test_another_method() -> None:
    with pytest.raises(HTTPError) as raised:
        ROUTES.find("PUT", "/a/stats")
    assert (raised.value.status, raised.value.headers) == (405, {"Allow": "GET, HEAD, POST"})


def test_headers_and_query() -> None:
    headers = [(b"x-a", b"1"), (b"x-a", b"2"), (b"x-b", b"\xe9")]
    request = Request(scope_of("/", query=b"a=1&b=&a=%C3%A9+", headers=headers), first)  # type: ignore[arg-type]
    assert request.query == {"a": "\u00e9 ", "b": ""}
    assert (request.header("X-A"), request.header_values("x-a")) == ("1", ["1", "2"])
    assert (request.header("X-B"), request.header("X-C"), request.host) == ("\u00e9", "", None)


def test_a_body_in_parts_and_a_client_that_disconnects() -> None:
    messages: list[dict[str, Any]] = [
        {"type": "http.request", "body": b"ab", "more_body": True},
        {"type": "http.request", "body": b"c"},
        {"type": "http.request", "body": b"d", "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def run() -> None:
        request = Request(scope_of("/"), receive)
        assert [chunk async for chunk in request.chunks()] == [b"ab", b"c"]
        with pytest.raises(ClientDisconnected):
            [chunk async for chunk in request.chunks()]

    asyncio.run(run())


def ask(path: str, method: str = "POST") -> tuple[list[dict[str, Any]], list[int]]:
    """The messages that the application sends, and the statuses that it counts as errors."""
    sent: list[Any] = []
    counted: list[int] = []
    app = App(
        ROUTES,
        None,
        check=lambda request: Response(status=401) if request.path == "/a/secret" else None,
        on_error=lambda _, error: Response(type(error).__name__.encode(), 500),
        count_error=counted.append,
    )

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope_of(path, method), lambda: pytest.fail("the body was read"), send))
    return sent, counted


def test_a_response() -> None:
    (head, body), counted = ask("/a/x")
    headers = [(b"x-name", b"1"), (b"content-length", b"13")]
    assert head == {"type": "http.response.start", "status": 200, "headers": headers}
    assert body == {"type": "http.response.body", "body": b"{'name': 'x'}"}
    assert counted == []


def test_errors_are_answered_and_counted() -> None:
    (head, body), counted = ask("/a/bug")
    assert (head["status"], body["body"], counted) == (500, b"ValueError", [500])
    (head, _), counted = ask("/a/secret")
    assert (head["status"], counted) == (401, [401])
    (_, body), _ = ask("/nowhere")
    assert body["body"] == b"HTTPError"
