"""Serving in several processes: the supervisor's side of `mexit serve`, and what a worker process runs."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from mexit.core.progress import StopSignal
from mexit.core.resource_limits import read_limits
from mexit.errors import MexitError, UsageError
from mexit.flows.serve_models import Note, ServeOptions, grpc_server, note_grpc, open_models
from mexit.runtime.device_cache import cache_root, make_private
from mexit.runtime.token_buckets import RateLimits, TokenBuckets
from mexit.serving import grpc_port, uvicorn_server
from mexit.serving.channel import Channel
from mexit.serving.limits import Limits
from mexit.serving.metrics import METRICS_FOLDER, remove_live
from mexit.serving.middleware import Tokens, read_tokens
from mexit.serving.model_changes import WorkerChanges, error_message
from mexit.serving.supervisor import Supervisor
from mexit.serving.systemd_notify import SystemdNotify
from mexit.serving.tls import server_context
from mexit.serving.worker import WorkerServer, channel_of
from mexit.serving.worker_process import WorkerProcess

_MODULE = "mexit.flows.serve_processes"
_PATHS = ("profile", "token_file", "tls_cert", "tls_key")  # options, as text in messages to workers


def why_not(options: ServeOptions) -> str:
    """Why a server with these options runs in one process; "" if it may run in several."""
    if not hasattr(socket, "send_fds"):
        return "this system cannot pass connections to another process"
    if options.batching != "off":
        return "a batch is formed in one process: --batching continuous"
    if options.cameras is not None:
        return "cameras run in the process of the server: --cameras"
    return "the drift watch counts in one process: --watch-drift" if options.watch_drift else ""


def serve(
    bundle: Path,
    options: ServeOptions,
    limits: Limits,
    ready: Callable[[str], None] | None,
    note: Note,
    signals: StopSignal,
) -> None:
    """Serve in worker processes; arguments and errors as `flows.serve.serve_bundle`, which handles the signals."""
    if reason := why_not(options):
        raise UsageError(f"{reason}, which needs --workers 0")
    if options.workers is not None and options.workers < 0:
        raise UsageError(f"the number of workers must be at least 0, found {options.workers}")
    tokens = read_tokens(options.token, options.token_file)
    has_token = bool(tokens.values)
    bound = uvicorn_server.bind(options.host, options.port, has_token=has_token)
    try:
        with (
            grpc_port.reserve(options.host, options.grpc_port, has_token=has_token) as addresses,
            tempfile.TemporaryDirectory(prefix="mexit-serve-") as folder,
        ):
            note_grpc(addresses, note)
            start = {"bundle": str(bundle), "limits": asdict(limits), "tokens": asdict(tokens), "grpc": addresses}
            environment = _environment(Path(folder))

            def spawn(index: int, workers: int | None, states: Mapping[str, Any], alone: bool) -> WorkerProcess:
                one = replace(options, workers=workers, watch=options.watch and index == 0)
                given = {**asdict(one), **{name: _text(getattr(one, name)) for name in _PATHS}}
                command = [sys.executable, "-m", _MODULE]
                message = {**start, "options": given, "states": dict(states) or None, "alone": alone}
                return WorkerProcess(index, command, environment, message)

            supervisor = Supervisor(
                bound,
                spawn,
                limits,
                workers=options.workers,
                ready=ready,
                note=note,
                tls=options.tls_cert is not None,
                on_death=partial(remove_live, folder),
                watch=options.watch,
                signals=signals,
                systemd=SystemdNotify(os.environ),
            )
            supervisor.run()
    finally:
        uvicorn_server.close_all(bound)


def _environment(folder: Path) -> dict[str, str]:
    """The environment of workers: the modules of this process, shared metrics, and one cache of measured times."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        METRICS_FOLDER: str(folder),
    }
    try:
        make_private(cache_root())
    except (OSError, MexitError):  # then the first worker measures for all
        environment["MEXIT_CACHE"] = str(folder / "cache")
    return environment


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())


def main(argument: str) -> None:
    """A worker process, from the file descriptor of its channel."""
    channel = channel_of(argument)
    [(start, _)] = channel.receive()
    try:
        _work(channel, start)
    except MexitError as error:
        channel.send({"is": "failed", **error_message(error)})
        sys.exit(error.exit_code)


def _work(channel: Channel, start: dict[str, Any]) -> None:
    given = start["options"]
    paths = {name: Path(given[name]) for name in _PATHS if given[name] is not None}
    options = ServeOptions(**{**given, **paths})
    tokens = Tokens(**{name: tuple(values) for name, values in start["tokens"].items()})
    tls = server_context(options.tls_cert, options.tls_key)
    limits, cpus = Limits(**start["limits"]), read_limits().threads
    share = _share(limits, options.workers or max(1, min(limits.workers, cpus)))

    def note(text: str) -> None:
        channel.send({"is": "note", "text": text})

    changes = WorkerChanges(channel)
    opened = open_models(
        Path(start["bundle"]),
        options,
        share,
        note,
        tokens,
        coordinate=changes.ask,
        share_buckets=_share_buckets,
        states=start["states"],
        alone=start["alone"],
    )
    with opened as (app, models):
        threads = max((service.runtime.threads for service in models.services), default=1)
        workers = options.workers or max(1, min(limits.workers, cpus // threads))
        grpc = grpc_server(models, tokens, start["grpc"], options)
        ready = {"workers": workers, "alone": start["alone"]}
        server = WorkerServer(app, models, channel, changes, ready, grpc, tls)
        server.run([])
    if server.orphaned:  # the supervisor was killed and has left its folder
        shutil.rmtree(os.environ[METRICS_FOLDER], ignore_errors=True)


def _share_buckets(limits: RateLimits) -> TokenBuckets:
    # Imported here because the locks of files are missing on Windows.
    from mexit.runtime.shared_buckets import SharedBuckets

    return SharedBuckets(Path(os.environ[METRICS_FOLDER]) / "rate-limiter", limits, time.monotonic_ns())


def _share(limits: Limits, workers: int) -> Limits:
    """The limits of one of several workers, which together keep those of the server."""
    requests = max(1, limits.requests // workers)
    held_bytes = max(limits.body_bytes, limits.held_bytes // workers)
    return replace(limits, workers=1, requests=requests, held_bytes=held_bytes)


if __name__ == "__main__":
    main(sys.argv[1])
