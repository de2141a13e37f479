"""The options of a server, and the models that it opens."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mexit.core.budget import Macs
from mexit.errors import MexitError
from mexit.runtime import Runtime
from mexit.runtime.rate_limiter import RateLimiter, read_rate_limits
from mexit.runtime.stored_answers import check_answers, warm_up
from mexit.runtime.time_policies import note_timing
from mexit.runtime.token_buckets import RateLimits, TokenBuckets
from mexit.serving.limits import Limits
from mexit.serving.model_folder import FileState, ModelFolder, ModelVersion
from mexit.serving.tls import read_pem

if TYPE_CHECKING:
    from mexit.serving.asgi import App
    from mexit.serving.grpc_server import GrpcServer
    from mexit.serving.middleware import Tokens
    from mexit.serving.model_state import StateJson
    from mexit.serving.repository import Coordinate, ModelRepository

Note = Callable[[str], None]
Files = tuple[FileState, ...]


@dataclass(frozen=True)
class ServeOptions:
    """Options of a server.

    Attributes:
        budget: budget of requests that name none.
        cost: "macs" or "time", as in `Runtime.open`.
        profile: as in `Runtime.open`.
        host: address to listen on, or unix:PATH.
        port: port to listen on; 0 for any free one.
        grpc_port: port of gRPC on the same host; 0 for any free one; None: no gRPC.
        token: bearer token of the requests; required unless the host is loopback. Several tokens, separated by
            commas, identify as many clients; the first one may load and unload models.
        token_file: file with one token a line, in place of `token`; those of lines "TOKEN admin" may load and unload.
        tls_cert, tls_key: PEM files of the certificate and of its private key, which may be in the same file.
        deadline_ms: deadline of requests that name none, milliseconds.
        backend, threads, watch_drift, on_drift: as in `Runtime.open`.
        rate, burst: limit of all clients together, as in `Runtime.open`.
        client_rate, client_burst: the limit of each client. A client is a token, or a network address without tokens.
        batching: "off": every request runs alone; "continuous": requests share runs of a segment.
        name: name of the model in routes, answers and metrics; default the bundle's. For a single bundle only.
        watch: load new and changed versions while the server runs, and unload models whose folder is gone.
        cameras: file of cameras (TOML) that run beside the server.
        workers: worker processes; 0: serve in this process; None: as many as the processors allow, where the other
            options permit several.
        replicas: smallest and largest number of replicas of a Ray Serve deployment; None: no such deployment.
    """

    budget: str = "low"
    cost: str = "macs"
    profile: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int | None = None
    token: str | None = None
    token_file: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
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
    cameras: Path | None = None
    workers: int | None = 0
    replicas: tuple[int, int] | None = None


@contextmanager
def open_models(
    bundle: Path,
    options: ServeOptions,
    limits: Limits,
    note: Note,
    tokens: Tokens,
    *,
    coordinate: Coordinate | None = None,
    share_buckets: Callable[[RateLimits], TokenBuckets] | None = None,
    states: Mapping[str, StateJson] | None = None,
    alone: bool = False,
) -> Iterator[tuple[App, ModelRepository]]:
    """The application and the loaded models of a server.

    Args:
        bundle, options, limits, note: as for `serve_bundle`, which has the errors.
        tokens: those of `options`.
        coordinate: loads and unloads models in all processes; by default this process is the only one.
        share_buckets: opens the token buckets that processes share.
        states: of the models in the other processes, whose versions are loaded; None: load the newest ones.
        alone: whether to load the newest version where that of `states` is not there any more.
    """
    from mexit.serving import http, repository, repository_watch, server_state

    folder = ModelFolder(bundle, options.name)
    watch = repository_watch.RepositoryWatch(folder) if options.watch else None
    gc.freeze()  # modules stay; collecting a replaced version then takes milliseconds
    opened = _open_first(folder, options, note, states)
    runtimes = list(opened.values())
    server = server_state.ServerState(
        limits,
        threads=max((runtime.threads for runtime in runtimes), default=1),
        rate_limiter=_rate_limiter(runtimes, options, share_buckets),
        deadline_ms=options.deadline_ms,
        batching=options.batching,
    )
    models = repository.ModelRepository(
        server, folder, lambda path: opened.pop(_files(path), None) or open_version(path, options, note), coordinate
    )
    try:
        lost = None if states is None else models.restore(states)
        if lost is None or (lost and alone):
            models.load_all(lost)
        opened.clear()
        if watch is not None:
            watch.forget(models.behind())
            watch.start(models.load, models.unload)
        yield http.build_app(models, tokens), models
    finally:
        if watch is not None:
            watch.stop()
        models.close()


def grpc_server(
    models: ModelRepository, tokens: Tokens, addresses: Sequence[str], options: ServeOptions
) -> GrpcServer | None:
    """The gRPC server of the models; None without addresses to listen on. Raises `MissingExtra`."""
    if not addresses:
        return None
    # Imported late because grpcio is an optional dependency.
    from mexit.serving.grpc_server import GrpcServer

    return GrpcServer(models, tokens, addresses, read_pem(options.tls_cert, options.tls_key))


def note_grpc(addresses: Sequence[str], note: Note) -> None:
    """Say where gRPC is served."""
    if addresses:
        note(f"gRPC at {' and '.join(addresses)}")


def _open_first(
    folder: ModelFolder, options: ServeOptions, note: Note, states: Mapping[str, StateJson] | None
) -> dict[Files, Runtime]:
    """One version of each model, except those that fail: the repository finds out why.

    It is that of `states`, or the newest. The number of worker threads and the size of the token buckets depend on it.
    """
    opened = {}
    for name, versions in folder.versions().items():
        serves = (states or {}).get(name, {}).get("serves") or ""
        number = serves.partition(" ")[0]
        chosen = next((version for version in versions if str(version.number) == number), versions[0])
        try:
            files = chosen.fingerprint()
            opened[files] = open_version(chosen.path, options, note)
        except (MexitError, OSError):
            if folder.single and states is None:
                raise
    return opened


def _files(path: Path) -> Files:
    return ModelVersion("", 0, path).fingerprint()


def open_version(path: Path, options: ServeOptions, note: Note) -> Runtime:
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


def _rate_limiter(
    runtimes: Sequence[Runtime], options: ServeOptions, share_buckets: Callable[[RateLimits], TokenBuckets] | None
) -> RateLimiter | None:
    """The rate limiter of all models together; a bucket without a given size is that of the most expensive model."""
    given = (options.rate, options.burst, options.client_rate, options.client_burst)
    costs = [runtime.bundle.manifest.cumulative_macs for runtime in runtimes] or [(1,)]
    limits = [read_rate_limits(cumulative, *given) for cumulative in costs]
    overall = [limit.overall for limit in limits if limit.overall is not None]
    client = [limit.client for limit in limits if limit.client is not None]
    if not overall and not client:
        return None
    largest = RateLimits(*(max(found, key=lambda one: one.burst, default=None) for found in (overall, client)))
    return RateLimiter(costs[0], largest, shared=None if share_buckets is None else share_buckets(largest))
