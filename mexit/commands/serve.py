"""The command `mexit serve`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from mexit.commands import output
from mexit.commands.options import (
    Backend,
    BudgetOption,
    BundleArg,
    Burst,
    CostOption,
    Deadline,
    ProfileOption,
    Rate,
    Threads,
)
from mexit.core.artifact_paths import BUNDLES, is_bundle, newest
from mexit.core.printable import shell_path
from mexit.flows.serve_limits import DEFAULT, MIB, with_body

_UNIX = "unix:"


def serve(
    bundle: BundleArg = None,
    *,
    budget: BudgetOption = "low",
    cost: CostOption = "time",
    profile: ProfileOption = None,
    host: Annotated[
        str,
        typer.Option(
            envvar="MEXIT_HOST",
            help="Address to listen on, or unix:PATH for a Unix socket; addresses but loopback require a token.",
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="MEXIT_PORT", help="Port to listen on; 0 selects a free port.")] = 8000,
    grpc_port: Annotated[
        int | None,
        typer.Option(
            envvar="MEXIT_GRPC_PORT",
            help="Port for gRPC on the same host (GRPCInferenceService); 0 selects a free port; default: no gRPC.",
            show_default=False,
        ),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="MEXIT_TOKEN",
            help="Bearer token that requests must carry. Several tokens, separated by commas, tell clients apart. "
            "The variable keeps the token out of the process list. The first one may load and unload models.",
        ),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            envvar="MEXIT_TOKEN_FILE",
            help="File with one token a line, readable by you only. The token of a line 'TOKEN admin' may load and "
            "unload models.",
            show_default=False,
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option(
            envvar="MEXIT_TLS_CERT",
            help="Serve HTTPS, and gRPC in TLS, with this certificate chain, a PEM file.",
            show_default=False,
        ),
    ] = None,
    tls_key: Annotated[
        Path | None,
        typer.Option(
            envvar="MEXIT_TLS_KEY",
            help="PEM file of the certificate's private key, readable by you only; default: it is in --tls-cert.",
            show_default=False,
        ),
    ] = None,
    max_body: Annotated[
        int, typer.Option(envvar="MEXIT_MAX_BODY", min=1, help="MiB of a request body, also after decompression.")
    ] = DEFAULT.body_bytes // MIB,
    max_connections: Annotated[
        int, typer.Option(envvar="MEXIT_MAX_CONNECTIONS", min=1, help="Open connections; further ones get 503.")
    ] = DEFAULT.connections,
    max_requests: Annotated[
        int,
        typer.Option(
            envvar="MEXIT_MAX_REQUESTS",
            min=1,
            help="Requests that wait for a worker or run in one; further ones get 503.",
        ),
    ] = DEFAULT.requests,
    keep_alive: Annotated[
        int, typer.Option(envvar="MEXIT_KEEP_ALIVE", min=1, help="Seconds until an idle connection is closed.")
    ] = DEFAULT.keep_alive_s,
    drain: Annotated[
        float, typer.Option(envvar="MEXIT_DRAIN", min=0, help="Seconds for requests in flight after a stop signal.")
    ] = DEFAULT.drain_s,
    backend: Backend = "auto",
    threads: Threads = None,
    deadline: Deadline = None,
    rate: Rate = None,
    burst: Burst = None,
    client_rate: Annotated[
        str | None,
        typer.Option(
            help="The limit of each client. Clients are told apart by token, else by address.", show_default=False
        ),
    ] = None,
    client_burst: Annotated[
        str | None, typer.Option(help="MACs that a client can save up for --client-rate.", show_default=False)
    ] = None,
    watch_drift: Annotated[
        float,
        typer.Option(
            help="Share of early answers to compare with those of the full network, such as 0.01; docs/calibration.md "
            "says how soon it finds which change."
        ),
    ] = 0.0,
    on_drift: Annotated[
        str, typer.Option(help="Reaction to changed data: alarm (log, metric) or safer (a safer policy).")
    ] = "alarm",
    batching: Annotated[
        str,
        typer.Option(
            envvar="MEXIT_BATCHING",
            help="off: each request runs alone; continuous: requests share the runs of a segment.",
        ),
    ] = "off",
    workers: Annotated[
        int | None,
        typer.Option(
            envvar="MEXIT_WORKERS",
            help="Worker processes; 0 serves in one process; default: processors divided by --threads, at most 4, "
            "and 0 with --watch-drift, --batching or --cameras.",
            show_default=False,
        ),
    ] = None,
    ray: Annotated[
        bool,
        typer.Option(
            "--ray",
            help="Deploy on Ray Serve: on the cluster that RAY_ADDRESS names, or on a local one. See docs/scaling.md.",
        ),
    ] = False,
    min_replicas: Annotated[
        int | None, typer.Option(help="Fewest replicas with --ray; default 1.", show_default=False)
    ] = None,
    max_replicas: Annotated[
        int | None, typer.Option(help="Most replicas with --ray; default 4, or the fewest.", show_default=False)
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            envvar="MEXIT_NAME",
            help="Name of the model in URLs, answers and metrics; default the bundle's. For one bundle only.",
            show_default=False,
        ),
    ] = None,
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Load new and changed versions, and unload models whose folder is gone."),
    ] = False,
    cameras: Annotated[
        Path | None,
        typer.Option(
            envvar="MEXIT_CAMERAS",
            metavar="FILE",
            help="Also run the cameras of a TOML file (docs/camera.md); GET /v1/cameras shows them.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Serve a bundle over HTTP and gRPC: Open Inference Protocol v2, /v1/classify, Prometheus /metrics.

    A folder of bundles (NAME/bundle.json, or NAME/1, NAME/2, ...) serves them all; the highest number is the version.
    """
    from mexit.flows.ray_options import read_replicas
    from mexit.flows.serve import ServeOptions, model_names, serve_bundle

    replicas = read_replicas(ray, min_replicas, max_replicas)
    path = bundle or newest(BUNDLES, output.RichProgress())
    models = () if is_bundle(path) else model_names(path)

    def announce(url: str) -> None:
        try:
            show_address(url)
        except (OSError, SystemExit):  # rich exits on a closed pipe; a server goes on
            output.RichProgress().note(f"standard output cannot be written; serving at {url}")

    def show_address(url: str) -> None:
        output.say(f"serving {path} at {url} with budget {budget}; Ctrl-C stops it")
        header = '-H "Authorization: Bearer $MEXIT_TOKEN" ' if token is not None or token_file is not None else ""
        if url.startswith(_UNIX):
            header, url = f"--unix-socket {shell_path(url.removeprefix(_UNIX))} {header}", _unix_url(tls_cert)
        else:
            output.say(f"dashboard: {url}/")
        classify = f"{url}/v1/classify"
        lines = [f"curl {header}{url}/metrics"]
        if models:
            classify = f"'{classify}?model={models[0]}'"  # a shell may expand the question mark
            lines.insert(0, f"curl {header}-X POST {url}/v2/repository/index")
        output.next_commands(f"curl {header}--data-binary @IMAGE.png {classify}", *lines)

    options = ServeOptions(
        budget=budget,
        cost=cost,
        profile=profile,
        host=host,
        port=port,
        grpc_port=grpc_port,
        token=token,
        token_file=token_file,
        tls_cert=tls_cert,
        tls_key=tls_key,
        backend=backend,
        threads=threads,
        deadline_ms=deadline,
        watch_drift=watch_drift,
        on_drift=on_drift,
        rate=rate,
        burst=burst,
        client_rate=client_rate,
        client_burst=client_burst,
        batching=batching,
        name=name,
        workers=workers,
        watch=watch,
        cameras=cameras,
        replicas=replicas,
    )
    limits = replace(
        with_body(DEFAULT, max_body),
        connections=max_connections,
        requests=max_requests,
        keep_alive_s=keep_alive,
        drain_s=drain,
    )
    serve_bundle(path, options, limits=limits, ready=announce, note=output.RichProgress().note)


def _unix_url(tls_cert: Path | None) -> str:
    """A URL for curl --unix-socket; its host has no meaning."""
    return "http://localhost" if tls_cert is None else "https://localhost"
