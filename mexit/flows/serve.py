"""`mexit serve`: serve a bundle over HTTP."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mexit.core.budget import Macs
from mexit.core.manifest import NAME_PATTERN
from mexit.errors import UsageError, missing_extra
from mexit.runtime import Runtime
from mexit.runtime.time_policies import note_timing
from mexit.serving.limits import Limits

_PACKAGES = {
    "anyio": "anyio",
    "httptools": "httptools",
    "uvicorn": "uvicorn",
    "prometheus_client": "prometheus-client",
}


@dataclass(frozen=True)
class ServeOptions:
    """Options of a server.

    Attributes:
        budget: budget of requests that name none.
        cost: "macs" or "time", as in `Runtime.open`.
        profile: as in `Runtime.open`.
        host: address to listen on.
        port: port to listen on; 0 for any free one.
        token: bearer token of the requests; required unless the host is loopback. Several tokens, separated by
            commas, identify as many clients.
        deadline_ms: deadline of requests that name none, milliseconds.
        backend, threads, watch_drift, on_drift: as in `Runtime.open`.
        rate, burst: limit of all clients together, as in `Runtime.open`.
        client_rate, client_burst: the limit of each client. A client is a token, or a network address without tokens.
        batching: "off": every request runs alone; "continuous": requests share runs of a segment.
        name: name of the model in routes, answers and metrics; default the bundle's.
    """

    budget: str = "low"
    cost: str = "macs"
    profile: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    backend: str = "auto"
    threads: int | None = None
    deadline_ms: float | None = None
    watch_drift: float = 0.0
    on_drift: str = "alarm"
    rate: Macs | None = None
    burst: Macs | None = None
    client_rate: Macs | None = None
    client_burst: Macs | None = None
    batching: str = "off"
    name: str | None = None


def serve_bundle(
    bundle: Path,
    options: ServeOptions,
    *,
    limits: Limits | None = None,
    ready: Callable[[str], None] | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> None:
    """Serve until SIGTERM or SIGINT; then answer the requests in flight and return.

    Args:
        bundle: the bundle's directory.
        options: options of the server.
        limits: sizes, counts and times that bound the server; default `Limits()`.
        ready: called with the URL once the server accepts connections.
        note: called with one line about the times that were measured, if they were.

    Raises:
        UsageError: a public host without a token, a port in use, or an invalid deadline, token, batching or name.
        MissingExtra: a package of `mexit[serve]` is not installed.
        MexitError: an error of `Runtime.open`.
    """
    _check_packages()
    # Imported late because the web framework is an optional dependency.
    from mexit.serving import http, middleware, service, uvicorn_server

    if options.deadline_ms is not None and not options.deadline_ms > 0:
        raise UsageError(
            f"the deadline must be above zero, found {options.deadline_ms} ms: give --deadline 10 for 10 ms, or none"
        )
    if options.batching not in service.BATCHING:
        raise UsageError(f"unknown batching '{options.batching}': choose from {', '.join(service.BATCHING)}")
    if options.name is not None and not NAME_PATTERN.fullmatch(options.name):
        raise UsageError(
            f"'{options.name}' cannot be a model's name, which is part of URLs: use at most 64 letters, digits, "
            "'.', '_' and '-', the first a letter or digit"
        )
    tokens = middleware.parse_tokens(options.token)
    bound = uvicorn_server.bind(options.host, options.port, has_token=bool(tokens))
    try:
        runtime = Runtime.open(
            bundle,
            options.budget,
            backend=options.backend,
            threads=options.threads,
            watch_drift=options.watch_drift,
            on_drift=options.on_drift,
            rate=options.rate,
            burst=options.burst,
            client_rate=options.client_rate,
            client_burst=options.client_burst,
            cost=options.cost,
            profile=options.profile,
        )
        note_timing(runtime.timing, runtime.why_not_time, note)
        served = service.Service(
            runtime,
            limits or Limits(),
            name=options.name,
            deadline_ms=options.deadline_ms,
            batching=options.batching,
        )
        uvicorn_server.run(http.build_app(served, tokens), served, bound, ready)
    finally:
        for one in bound:
            one.close()


def _check_packages() -> None:
    for module, package in _PACKAGES.items():
        try:
            importlib.import_module(module)
        except ImportError:
            raise missing_extra(package, "serve", "Serving") from None
