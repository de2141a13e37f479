"""`mexit serve`: serve a bundle, or the bundles of a folder, over HTTP."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mexit.core.budget import Macs
from mexit.errors import MexitError, UsageError, missing_extra
from mexit.runtime import Runtime
from mexit.runtime.rate_limiter import RateLimiter, RateLimits, read_rate_limits
from mexit.runtime.stored_answers import check_answers, warm_up
from mexit.runtime.time_policies import note_timing
from mexit.serving.limits import Limits
from mexit.serving.model_folder import ModelFolder

Note = Callable[[str], None]

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
        name: name of the model in routes, answers and metrics; default the bundle's. For a single bundle only.
        watch: load new and changed versions while the server runs, and unload models whose folder is gone.
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
    watch: bool = False


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
        bundle: the bundle's directory, or a folder of models; see `serving.model_folder`.
        options: options of the server.
        limits: sizes, counts and times that bound the server; default `Limits()`.
        ready: called with the URL once the server accepts connections.
        note: called with one line about the times that were measured, if they were.

    Raises:
        UsageError: a public host without a token, a port in use, or an invalid deadline, token, batching or name.
        LoadFailed: no model of a folder can be used.
        MissingExtra: a package of `mexit[serve]` is not installed.
        MexitError: an error of `Runtime.open` for a single bundle.
    """
    _check_packages()
    # Imported late because the web framework is an optional dependency.
    from mexit.serving import http, middleware, repository, repository_watch, server_state, uvicorn_server

    if options.deadline_ms is not None and not options.deadline_ms > 0:
        raise UsageError(
            f"the deadline must be above zero, found {options.deadline_ms} ms: give --deadline 10 for 10 ms, or none"
        )
    if options.batching not in server_state.BATCHING:
        raise UsageError(f"unknown batching '{options.batching}': choose from {', '.join(server_state.BATCHING)}")
    tokens = middleware.parse_tokens(options.token)
    folder = ModelFolder(bundle, options.name)
    watch = repository_watch.RepositoryWatch(folder) if options.watch else None
    bound = uvicorn_server.bind(options.host, options.port, has_token=bool(tokens))
    gc.freeze()  # modules stay; collecting a replaced version then takes milliseconds
    try:
        opened = _open_newest(folder, options, note)
        runtimes = list(opened.values())
        server = server_state.ServerState(
            limits or Limits(),
            threads=max((runtime.threads for runtime in runtimes), default=1),
            rate_limiter=_rate_limiter(runtimes, options),
            deadline_ms=options.deadline_ms,
            batching=options.batching,
        )
        models = repository.ModelRepository(
            server, folder, lambda path: opened.pop(path, None) or _open_version(path, options, note)
        )
        models.load_all()
        if watch is not None:
            watch.start(models.load, models.unload)
        uvicorn_server.run(http.build_app(models, tokens), server, bound, ready)
        models.close()
    finally:
        if watch is not None:
            watch.stop()
        for one in bound:
            one.close()


def _open_newest(folder: ModelFolder, options: ServeOptions, note: Note) -> dict[Path, Runtime]:
    """The newest version of each model, by path, except those that fail: the repository finds out why.

    The number of worker threads and the size of the token buckets depend on the models.
    """
    opened = {}
    for newest, *_ in folder.versions().values():
        try:
            opened[newest.path] = _open_version(newest.path, options, note)
        except MexitError:
            if folder.single:
                raise
    return opened


def _open_version(path: Path, options: ServeOptions, note: Note) -> Runtime:
    """Open a bundle, check it with stored answers, and warm it up."""
    runtime = Runtime.open(
        path,
        options.budget,
        backend=options.backend,
        threads=options.threads,
        watch_drift=options.watch_drift,
        on_drift=options.on_drift,
        cost=options.cost,
        profile=options.profile,
    )
    note_timing(runtime.timing, runtime.why_not_time, note)
    check_answers(runtime)
    warm_up(runtime)
    return runtime


def _rate_limiter(runtimes: Sequence[Runtime], options: ServeOptions) -> RateLimiter | None:
    """The rate limiter of all models together; a bucket without a given size is that of the most expensive model."""
    given = (options.rate, options.burst, options.client_rate, options.client_burst)
    costs = [runtime.bundle.manifest.cumulative_macs for runtime in runtimes]
    limits = [read_rate_limits(cumulative, *given) for cumulative in costs]
    overall = [limit.overall for limit in limits if limit.overall is not None]
    client = [limit.client for limit in limits if limit.client is not None]
    if not overall and not client:
        return None
    largest = RateLimits(*(max(found, key=lambda one: one.burst, default=None) for found in (overall, client)))
    return RateLimiter(costs[0], largest)


def _check_packages() -> None:
    for module, package in _PACKAGES.items():
        try:
            importlib.import_module(module)
        except ImportError:
            raise missing_extra(package, "serve", "Serving") from None
