"""A Ray Serve application that answers as `mexit serve` does: serve run ray_serve:app bundle=BUNDLE.

`ray_serve.yaml` deploys it on a cluster with autoscaled replicas. docs/scaling.md says more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mexit.flows.serve import ServeOptions
from mexit.flows.serve_ray import deployment


def app(arguments: dict[str, Any]) -> Any:
    """The application.

    Args:
        arguments: `bundle`, its path on every machine; and optionally `budget`, `cost` ("time": thresholds are
            selected by times that are measured here once, for all replicas; "macs": those of the bundle),
            `token_file`, `min_replicas` and `max_replicas`.
    """
    token_file = arguments.get("token_file")
    bounds = (int(arguments.get("min_replicas", 1)), int(arguments.get("max_replicas", 4)))
    options = ServeOptions(
        budget=arguments.get("budget", "low"),
        cost=arguments.get("cost", "time"),
        token_file=None if token_file is None else Path(token_file),
        replicas=bounds,
    )
    return deployment(Path(arguments["bundle"]), options, note=print)
