"""`mexit serve --ray`: a Ray Serve deployment whose replicas answer as one server process does."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray import serve

from mexit.core.atomic_io import sha256_bytes
from mexit.core.bundle import MANIFEST, POLICIES, Bundle
from mexit.core.progress import StopSignal
from mexit.core.resource_limits import read_limits
from mexit.errors import Damaged, MexitError, UsageError
from mexit.flows.ray_options import DEFAULT_REPLICAS, check_ray_options
from mexit.flows.serve_models import Note, ServeOptions, open_models, open_version
from mexit.runtime.autotune import choose
from mexit.runtime.latency_profile import Profile
from mexit.serving import uvicorn_server
from mexit.serving.asgi import Receive, Scope, Send
from mexit.serving.limits import Limits
from mexit.serving.middleware import Tokens, read_tokens

ADDRESS = "RAY_ADDRESS"
APPLICATION = "mexit"
BUDGET = "budget"  # the key of `user_config`
_LOCAL_STORE_BYTES = 100 << 20  # of Ray's object store, which requests do not use
_LOGGING = {"enable_access_log": False}  # a line for each request costs processor time
_LOOK_S = 0.2

_log = logging.getLogger("mexit.server")


@dataclass(frozen=True)
class ReplicaConfig:
    """What every replica of a deployment is made of.

    Attributes:
        bundle: the bundle's directory, on every machine.
        content: sha256 of the manifest and the policies, which decide the answers.
        options: with the engine and its number of threads named.
        limits: of one replica.
        tokens: those of the server.
        profile: the times that thresholds are selected with; None: budgets are in MACs.
    """

    bundle: Path
    content: str
    options: ServeOptions
    limits: Limits
    tokens: Tokens
    profile: Profile | None

    @property
    def replicas(self) -> tuple[int, int]:
        """The smallest and the largest number of replicas."""
        return self.options.replicas or DEFAULT_REPLICAS


class ReplicaApp:
    """The ASGI application of one replica, with Ray Serve's lifespan messages."""

    def __init__(self, config: ReplicaConfig) -> None:
        """Open the bundle. Raises as `open_models`, and `Damaged` if the bundle is not that of the deployment."""
        if _content(config.bundle) != config.content:
            raise Damaged(f"the bundle {config.bundle} of this machine is another one than that of the deployment")
        self._opened = ExitStack()
        options = config.options
        if config.profile is not None:
            folder = self._opened.enter_context(tempfile.TemporaryDirectory(prefix="mexit-ray-"))
            profile = Path(folder) / "profile.json"
            profile.write_text(json.dumps(asdict(config.profile)))
            options = replace(options, profile=profile)
        opened = open_models(config.bundle, options, config.limits, _log.info, config.tokens, coordinate=_refuse)
        self._app, self._models = self._opened.enter_context(opened)
        self._budget = options.budget

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return
        while (kind := (await receive())["type"]) != "lifespan.shutdown":
            await send({"type": f"{kind}.complete"})
        self._opened.close()
        await send({"type": f"{kind}.complete"})

    def use(self, user_config: Mapping[str, Any]) -> None:
        """Use the budget of a `user_config`; that of the deployment without one. Raises `UsageError`, `Infeasible`."""
        if unknown := sorted(set(user_config) - {BUDGET}):
            raise UsageError(f"unknown fields of user_config: {', '.join(unknown)}; expected {BUDGET}")
        for service in self._models.services:
            service.runtime.budget = str(user_config.get(BUDGET, self._budget))


class Replica:
    """A replica; `serve.ingress` adds `app`."""

    app: ReplicaApp

    def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Called by Ray Serve at the start and with every new `user_config`."""
        self.app.use(user_config)


def deployment(bundle: Path, options: ServeOptions, limits: Limits | None = None, note: Note = lambda _: None) -> Any:
    """The application of Ray Serve that answers as `mexit serve` with these options does.

    The engine, its number of threads and the latency profile are chosen here, once. All replicas use them, so they
    select the same thresholds. A replica reserves one processor for each thread.

    Args:
        bundle: the bundle's directory, at the same place on every machine.
        options: options of the server; `replicas` bounds the number of replicas.
        limits: of each replica; default `Limits()`.
        note: called with one line about the times that were measured, if they were.

    Returns:
        A `ray.serve.Application`, for `serve.run`. Its `user_config` is `{"budget": BUDGET}`.

    Raises:
        UsageError: an option that does not apply with Ray, or a folder of models.
        MexitError: an error of `Runtime.open`.
    """
    return _application(_replica_config(bundle, options, limits or Limits(), note))


def serve_on_ray(
    bundle: Path, options: ServeOptions, limits: Limits, ready: Callable[[str], None] | None, note: Note
) -> None:
    """Deploy on the cluster that `RAY_ADDRESS` names, or on a local one, until SIGTERM or SIGINT.

    Args:
        bundle, options, limits, ready, note: as for `flows.serve.serve_bundle`.

    Raises:
        UsageError: see `deployment` and `uvicorn_server.bind`; or Ray Serve runs on the cluster already.
        MexitError: see `deployment`; or the cluster cannot be reached, or no replica starts.
    """
    config = _replica_config(bundle, options, limits, note)
    bound = uvicorn_server.bind(options.host, options.port, has_token=bool(config.tokens.values))
    url, port = uvicorn_server.url_of(bound[0]), bound[0].getsockname()[1]
    uvicorn_server.close_all(bound)  # for the proxies, which bind it on every machine that has a replica
    http = {"host": options.host, "port": port, "keep_alive_timeout_s": limits.keep_alive_s}
    with _cluster(config), StopSignal(interrupts=True) as signals:  # in place of Ray's handlers
        try:
            _run(config, http, signals, lambda: None if ready is None else ready(url))
        except KeyboardInterrupt:
            if not signals.requested:
                raise
            note("stopped before the server was ready")


def _run(config: ReplicaConfig, http: Mapping[str, Any], signals: StopSignal, ready: Callable[[], None]) -> None:
    """Deploy, and wait for a stop signal."""
    if serve.status().proxies:
        raise UsageError(
            "Ray Serve runs on this cluster already: stop it with serve shutdown, or add the application of "
            "mexit.flows.serve_ray.deployment to it"
        )
    try:
        serve.start(proxy_location="EveryNode", http_options=dict(http), logging_config=_LOGGING)
        serve.run(_application(config), name=APPLICATION)
        signals.defer()
        ready()
        while not signals.requested:
            time.sleep(_LOOK_S)
    except RuntimeError as error:
        raise MexitError(f"Ray Serve could not deploy the bundle: {error}") from None
    finally:
        serve.shutdown()


@contextmanager
def _cluster(config: ReplicaConfig) -> Iterator[None]:
    """Connect to the cluster of `RAY_ADDRESS`, or start one that ends with the `with` block."""
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    if os.environ.get(ADDRESS) is None:
        cpus = max(read_limits().threads, config.replicas[0] * (config.options.threads or 1))
        quiet |= {"address": "local", "include_dashboard": False}
        quiet |= {"num_cpus": cpus, "object_store_memory": _LOCAL_STORE_BYTES}
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        ray.init(**quiet)
    except (ConnectionError, ValueError) as error:
        raise MexitError(f"the cluster at {ADDRESS} {os.environ.get(ADDRESS)} cannot be reached: {error}") from None
    try:
        yield
    finally:
        ray.shutdown()


def _replica_config(bundle: Path, options: ServeOptions, limits: Limits, note: Note) -> ReplicaConfig:
    """Choose the engine, and select thresholds once, so that all replicas select the same."""
    check_ray_options(bundle, options, limits)
    choice = choose(Bundle.open(bundle), options.backend, options.threads)
    options = replace(options, backend=choice.backend, threads=choice.threads)
    with closing(open_version(bundle, options, note)) as runtime:
        profile = None if runtime.timing is None else runtime.timing.profile
    return ReplicaConfig(
        bundle.absolute(),
        _content(bundle),
        replace(options, cost="macs" if profile is None else "time", profile=None),
        replace(limits, workers=1),  # as many requests run at once as there are replicas
        read_tokens(options.token, options.token_file),
        profile,
    )


def _application(config: ReplicaConfig) -> Any:
    def build() -> ReplicaApp:
        return ReplicaApp(config)

    smallest, largest = config.replicas
    replica = serve.deployment(
        serve.ingress(build)(Replica),
        name="Replica",
        autoscaling_config={"min_replicas": smallest, "max_replicas": largest},
        ray_actor_options={"num_cpus": config.options.threads},
        user_config={BUDGET: config.options.budget},
        max_ongoing_requests=config.limits.requests,
        max_queued_requests=config.limits.requests,
        graceful_shutdown_timeout_s=config.limits.drain_s,
        logging_config=_LOGGING,
    )
    return replica.bind()


def _content(bundle: Path) -> str:
    """The sha256 of the manifest, which has those of the segments, and of the policies."""
    files = [bundle / name for name in (MANIFEST, POLICIES)]
    return sha256_bytes(b"".join(file.read_bytes() for file in files if file.exists()))


def _refuse(action: str, _: str) -> None:
    raise UsageError(f"a replica does not {action} models: deploy again, which replaces all replicas")
