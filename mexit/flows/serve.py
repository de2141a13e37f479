"""`mexit serve`: a bundle over HTTP."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

from mexit.core.budget import Macs
from mexit.errors import UsageError, missing_extra
from mexit.runtime import Runtime

_NEEDED = {"starlette": "starlette", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"}


def serve(
    bundle: Path,
    *,
    budget: str,
    host: str,
    port: int,
    token: str | None,
    backend: str = "auto",
    threads: int | None = None,
    deadline_ms: float | None = None,
    watch_drift: float = 0.0,
    on_drift: str = "alarm",
    rate: Macs | None = None,
    burst: Macs | None = None,
    client_rate: Macs | None = None,
    client_burst: Macs | None = None,
    batching: str = "off",
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; then finish what is in flight and return.

    Args:
        bundle: the directory.
        budget: for requests that name none.
        host, port: where to listen; port 0 takes any free one.
        token: that requests must bear; needed for every host but this machine. Several, separated by commas, are
            as many clients.
        backend, threads: see `Runtime.open`.
        deadline_ms: for requests that name none.
        watch_drift, on_drift, rate, burst, client_rate, client_burst: see `Runtime.open`. A client is a token, or
            a peer's address where there are none.
        batching: "off": every request has its own runs of a segment; "continuous": they share them, see
            `runtime.batcher`.
        ready: told the address once the server listens.

    Raises:
        UsageError: a host that others reach without a token, a port in use, a deadline or a way of batching
            that is none.
        MissingExtra: the packages of `mexit[serve]` are not installed.
        MexitError: whatever `Runtime.open` raises.
    """
    _check_installed()
    # Only now: the web framework is an optional part, and the other flows do without it.
    from mexit.serving import http, limits, middleware, service, uvicorn_server

    if deadline_ms is not None and not deadline_ms > 0:
        raise UsageError(
            f"the deadline must be above zero, found {deadline_ms} ms: give --deadline 10 for 10 ms, or none"
        )
    if batching not in service.BATCHING:
        raise UsageError(f"unknown batching '{batching}': choose from {', '.join(service.BATCHING)}")
    tokens = middleware.tokens_of(token)
    opened = uvicorn_server.bind(host, port, guarded=bool(tokens))
    try:
        runtime = Runtime.open(
            bundle,
            budget,
            backend=backend,
            threads=threads,
            watch_drift=watch_drift,
            on_drift=on_drift,
            rate=rate,
            burst=burst,
            client_rate=client_rate,
            client_burst=client_burst,
        )
        served = service.Service(
            runtime, limits.Limits(), threads=runtime.threads, deadline_ms=deadline_ms, batching=batching
        )
        uvicorn_server.run(http.build_app(served, tokens), served, opened, ready)
    finally:
        opened.close()


def _check_installed() -> None:
    for module, package in _NEEDED.items():
        try:
            importlib.import_module(module)
        except ImportError:
            raise missing_extra(package, "serve", "Serving") from None
