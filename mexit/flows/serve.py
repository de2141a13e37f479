"""`mexit serve`: serve a bundle, or the bundles of a folder, over HTTP and gRPC."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path

from mexit.core.progress import StopSignal
from mexit.errors import UsageError, missing_extra, requires_extra
from mexit.flows.ray_options import check_ray_options
from mexit.flows.serve_cameras import cameras_beside, read_server_cameras
from mexit.flows.serve_models import Note, ServeOptions, grpc_server, note_grpc, open_models
from mexit.serving.limits import Limits
from mexit.serving.model_folder import ModelFolder
from mexit.serving.open_files import allow_connections
from mexit.serving.systemd_notify import SystemdNotify
from mexit.serving.unix_socket import PREFIX as UNIX

__all__ = ["ServeOptions", "serve_bundle"]

_PACKAGES = {
    "anyio": "anyio",
    "httptools": "httptools",
    "uvicorn": "uvicorn",
    "prometheus_client": "prometheus-client",
}


def serve_bundle(
    bundle: Path,
    options: ServeOptions,
    *,
    limits: Limits | None = None,
    ready: Callable[[str], None] | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> None:
    """Serve until SIGTERM or SIGINT; then answer the requests in flight and return.

    A signal before the server is ready ends the start. A second signal ends the process.
    systemd is told when requests are accepted, as long as they are answered, and when the server stops.

    Args:
        bundle: the bundle's directory, or a folder of models: NAME/bundle.json, or NAME/1, NAME/2, ...
        options: options of the server.
        limits: sizes, counts and times that bound the server; default `Limits()`.
        ready: called with the URL once the server accepts connections.
        note: called with one line about the times that were measured, if they were, one about gRPC, and one about a
            stop before the server is ready.

    Raises:
        UsageError: a public host without a token, a port in use, an invalid deadline, token, batching or name, a key
            or token file that other users can read, or more connections than the system allows.
        NotFound: there is no such bundle or file, or no such source of a camera.
        LoadFailed: no model of a folder can be used.
        MissingExtra: a package of `mexit[serve]`, or for gRPC of `mexit[grpc]`, is not installed.
        MexitError: an error of `Runtime.open` for a single bundle.
    """
    with StopSignal(interrupts=True) as signals:
        try:
            _serve(bundle, options, limits or Limits(), ready, note, signals)
        except KeyboardInterrupt:
            if not signals.requested:
                raise
            note("stopped before the server was ready")


def _serve(
    bundle: Path,
    options: ServeOptions,
    limits: Limits,
    ready: Callable[[str], None] | None,
    note: Note,
    signals: StopSignal,
) -> None:
    _check_packages(options)
    if options.replicas is not None:
        check_ray_options(bundle, options, limits)
    _check_options(bundle, options)
    if options.replicas is not None:
        _check_package("ray.serve", "ray[serve]", "ray", "Serving with Ray")
        # Imported late because Ray is an optional dependency.
        from mexit.flows.serve_ray import serve_on_ray

        serve_on_ray(bundle, options, limits, ready, note)
        return
    allow_connections(limits.connections)
    # Imported late because the web framework is an optional dependency.
    from mexit.flows import serve_processes

    if options.workers == 0 or (options.workers is None and serve_processes.why_not(options)):
        _serve_here(bundle, options, limits, ready, note, signals)
    else:
        serve_processes.serve(bundle, options, limits, ready, note, signals)


def _serve_here(
    bundle: Path,
    options: ServeOptions,
    limits: Limits,
    ready: Callable[[str], None] | None,
    note: Note,
    signals: StopSignal,
) -> None:
    """Serve in this process."""
    from mexit.serving import grpc_port, middleware, tls, uvicorn_server

    tokens = middleware.read_tokens(options.token, options.token_file)
    context = tls.server_context(options.tls_cert, options.tls_key)
    has_token = bool(tokens.values)
    bound = uvicorn_server.bind(options.host, options.port, has_token=has_token)
    try:
        with (
            grpc_port.reserve(options.host, options.grpc_port, has_token=has_token) as addresses,
            open_models(bundle, options, limits, note, tokens) as (app, models),
            cameras_beside(models, options, note),
        ):
            note_grpc(addresses, note)
            grpc = grpc_server(models, tokens, addresses, options)
            systemd = SystemdNotify(os.environ)
            uvicorn_server.run(app, models.server, bound, ready, grpc, context, signals, systemd)
    finally:
        uvicorn_server.close_all(bound)


def model_names(folder: Path) -> tuple[str, ...]:
    """The names of the models in a folder of bundles. Raises as `serve_bundle`."""
    return tuple(ModelFolder(folder).versions())


def _check_options(bundle: Path, options: ServeOptions) -> None:
    """Check what needs no model. Raises `UsageError`, `NotFound`."""
    from mexit.serving import middleware, server_state, tls

    if options.deadline_ms is not None and not options.deadline_ms > 0:
        raise UsageError(
            f"the deadline must be above zero, found {options.deadline_ms} ms: give --deadline 10 for 10 ms, or none"
        )
    if options.batching not in server_state.BATCHING:
        raise UsageError(f"unknown batching '{options.batching}': choose from {', '.join(server_state.BATCHING)}")
    if options.grpc_port is not None and options.host.startswith(UNIX):
        raise UsageError(f"gRPC needs a host with ports, found {options.host}: leave out --grpc-port")
    if options.cameras is not None:
        read_server_cameras(options.cameras)
    middleware.read_tokens(options.token, options.token_file)
    tls.server_context(options.tls_cert, options.tls_key)
    ModelFolder(bundle, options.name)


def _check_packages(options: ServeOptions) -> None:
    for module, package in _PACKAGES.items():
        _check_package(module, package, "serve", "Serving")
    if options.grpc_port is not None:
        with requires_extra("grpc", "Serving over gRPC"):
            importlib.import_module("grpc")
            importlib.import_module("google.protobuf")


def _check_package(module: str, package: str, extra: str, purpose: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError:
        raise missing_extra(package, extra, purpose) from None
