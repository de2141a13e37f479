"""The gRPC port, which the kernel divides among worker processes (SO_REUSEPORT)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mexit.serving.uvicorn_server import bind, close_all

OPTION = "--grpc-port"


@contextmanager
def reserve(host: str, port: int | None, *, has_token: bool) -> Iterator[tuple[str, ...]]:
    """Keep a port for the worker processes of this server during the `with` block.

    Args:
        host: address or host name.
        port: from 1 to 65535, 0 for any free one, or None: no gRPC.
        has_token: whether calls need a token; required unless every address is loopback.

    Yields:
        The addresses to listen on, such as "127.0.0.1:8001"; empty without a port.

    Raises:
        UsageError: as `uvicorn_server.bind`.
    """
    if port is None:
        yield ()
        return
    # A shared port can be bound beside a server that listens on it, so it is first bound alone.
    alone = bind(host, port, has_token=has_token, option=OPTION)
    free = alone[0].getsockname()[1]
    close_all(alone)
    kept = bind(host, free, has_token=has_token, option=OPTION, shared=True)
    try:
        names = [one.getsockname()[:2] for one in kept]
        yield tuple(f"[{ip}]:{number}" if ":" in ip else f"{ip}:{number}" for ip, number in names)
    finally:
        close_all(kept)
