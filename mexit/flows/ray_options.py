"""Which options of a server apply to a deployment of Ray Serve; needs no Ray."""

from __future__ import annotations

from pathlib import Path

from mexit.core.artifact_paths import is_bundle
from mexit.errors import UsageError
from mexit.flows.serve_models import ServeOptions
from mexit.serving.limits import Limits
from mexit.serving.unix_socket import PREFIX as UNIX

DEFAULT_REPLICAS = (1, 4)


def read_replicas(ray: bool, smallest: int | None, largest: int | None) -> tuple[int, int] | None:
    """The bounds of the number of replicas, from options.

    Args:
        ray: whether a deployment of Ray Serve is wanted.
        smallest, largest: the bounds; None: not given.

    Returns:
        Both bounds; None without Ray.

    Raises:
        UsageError: a bound without Ray, or bounds that no number is within.
    """
    if not ray:
        if smallest is not None or largest is not None:
            raise UsageError("--min-replicas and --max-replicas are for a deployment of Ray Serve: add --ray")
        return None
    low = DEFAULT_REPLICAS[0] if smallest is None else smallest
    high = max(low, DEFAULT_REPLICAS[1]) if largest is None else largest
    if not 1 <= low <= high:
        raise UsageError(f"expected 1 <= --min-replicas <= --max-replicas, found {low} and {high}")
    return low, high


def check_ray_options(bundle: Path, options: ServeOptions, limits: Limits) -> None:
    """Check that the options apply to a deployment of Ray Serve.

    Raises:
        UsageError: an option does not apply, or there are several models; the message says what to use instead.
    """
    instead = {
        "--grpc-port": (options.grpc_port is not None, "Ray Serve's proxies have the HTTP routes only"),
        "--host unix:PATH": (options.host.startswith(UNIX), "Ray Serve's proxies listen on ports"),
        "--tls-cert": (
            options.tls_cert is not None or options.tls_key is not None,
            "let the load balancer before the proxies end TLS",
        ),
        "a rate (--rate, --burst, --client-rate, --client-burst)": (
            any(one is not None for one in (options.rate, options.burst, options.client_rate, options.client_burst)),
            "replicas share no rate limiter; bound the replicas by --max-replicas, and requests by the load balancer",
        ),
        "--watch-drift": (bool(options.watch_drift), "the drift watch counts in one process"),
        "--watch": (options.watch, "deploy again for a new version"),
        "--cameras": (options.cameras is not None, "run mexit camera beside it"),
        "--workers": (bool(options.workers), "give --min-replicas and --max-replicas"),
        "--max-connections": (limits.connections != Limits().connections, "Ray Serve's proxies bound requests alone"),
    }
    for name, (given, how) in instead.items():
        if given:
            raise UsageError(f"{name} does not apply with --ray: {how}")
    if bundle.is_dir() and not is_bundle(bundle):
        raise UsageError(f"--ray deploys one bundle, found the folder of models {bundle}: give one of its bundles")
