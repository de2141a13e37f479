"""The sockets of the server: hosts with several addresses, and ports in use."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from servers import Client, hook_runtime, serve_runtime

from mexit.errors import UsageError
from mexit.serving import uvicorn_server


def test_two_sockets_bound_to_one_port() -> None:
    """Two servers can bind the same port while their bundles load. The second to listen gets a clear error."""
    [first] = uvicorn_server.bind("127.0.0.1", 0, has_token=False)
    [second] = uvicorn_server.bind("127.0.0.1", first.getsockname()[1], has_token=False)
    with first, second:
        uvicorn_server.start_listening([first])
        with pytest.raises(UsageError, match=f"port {first.getsockname()[1]} is in use"):
            uvicorn_server.start_listening([second])


def localhost_of_both_families(port: int = 0) -> tuple[socket.socket, ...]:
    """The sockets of a host with the addresses 127.0.0.1 and ::1, whatever the system's table of hosts says."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this system has no IPv6")
    resolve = socket.getaddrinfo

    def both(host: str, *rest: Any, **options: Any) -> list[Any]:
        return resolve("::1", *rest, **options) + resolve("127.0.0.1", *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", both)
        return uvicorn_server.bind("localhost", port, has_token=False)


def test_localhost_answers_on_both_families(digits_bundle: Path) -> None:
    bound = localhost_of_both_families()
    port = bound[0].getsockname()[1]
    assert [one.getsockname()[:2] for one in bound] == [("127.0.0.1", port), ("::1", port)]
    runtime = hook_runtime(digits_bundle, lambda _: None)
    with serve_runtime(runtime, bound=bound) as client:
        assert client.url == f"http://127.0.0.1:{port}"
        assert client.json("GET", "/v2/health/live") == (200, {"live": True})
        assert Client(f"http://[::1]:{port}").json("GET", "/v2/health/live") == (200, {"live": True})


def test_a_port_that_is_in_use_on_one_family_only() -> None:
    """Clients of localhost would reach either server."""
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as other:
        port = other.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port} is in use"):
            localhost_of_both_families(port)


def test_a_host_with_an_address_that_is_not_here() -> None:
    """A name may have an IPv6 address while the system has none; the other address is served."""
    resolve = socket.getaddrinfo
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            socket,
            "getaddrinfo",
            lambda _, *rest, **options: [
                *resolve("127.0.0.1", *rest, **options),
                *resolve("2001:db8::1", *rest, **options),
            ],
        )
        [bound] = uvicorn_server.bind("box", 0, has_token=True)
        with bound, pytest.raises(UsageError, match="can be reached from other machines"):
            uvicorn_server.bind("box", 0, has_token=False)
