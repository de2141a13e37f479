"""run, serve, camera: answers for files, clients and video.

Parse, call a flow, print. Flows are imported by the command that needs them, so that each starts fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mexit.commands import output
from mexit.commands.options import Backend, BudgetOption, BundleArg, Deadline, Json, Threads
from mexit.commands.output import RichProgress
from mexit.errors import UsageError

Rate = Annotated[
    str | None,
    typer.Option(help="Hard bound: MACs a second (40M, 1.5G), whatever arrives.", show_default=False),
]
Burst = Annotated[
    str | None,
    typer.Option(
        help="MACs that can be saved up for --rate. [dim]Default: one second's worth, or one full image.[/]",
        show_default=False,
    ),
]


def run(
    paths: Annotated[
        list[Path], typer.Argument(metavar="[BUNDLE] IMAGE...", help="Images; a bundle directory may come first.")
    ],
    *,
    budget: BudgetOption = "low",
    backend: Backend = "auto",
    threads: Threads = None,
    deadline: Deadline = None,
    rate: Rate = None,
    burst: Burst = None,
    json: Json = False,
) -> None:
    """Classify image files."""
    from mexit.commands.report import run_json, show_answers
    from mexit.core.artifact_paths import is_bundle
    from mexit.flows.run import run as flow

    bundle, images = (paths[0], paths[1:]) if is_bundle(paths[0]) else (None, paths)
    if not images:
        raise UsageError("no image named: mexit run [BUNDLE] IMAGE...")
    answers = flow(
        images,
        bundle=bundle,
        budget=budget,
        backend=backend,
        threads=threads,
        deadline_ms=deadline,
        rate=rate,
        burst=burst,
        progress=RichProgress(),
    )
    output.print_json(run_json(answers)) if json else show_answers(answers)
    failed = [answer.error for answer in answers if answer.error]
    if failed:
        raise typer.Exit(failed[0].exit_code)


def serve(
    bundle: BundleArg = None,
    *,
    budget: BudgetOption = "low",
    host: Annotated[
        str, typer.Option(envvar="MEXIT_HOST", help="Address; another than loopback needs --token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="MEXIT_PORT", help="Port; 0 takes a free one.")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="MEXIT_TOKEN",
            help="Clients must send it as Bearer token; several, separated by commas, are as many clients. "
            "As variable it stays out of the process list.",
        ),
    ] = None,
    backend: Backend = "auto",
    threads: Threads = None,
    deadline: Deadline = None,
    rate: Rate = None,
    burst: Burst = None,
    client_rate: Annotated[
        str | None,
        typer.Option(help="The same for each client: its token, else its address.", show_default=False),
    ] = None,
    client_burst: Annotated[
        str | None, typer.Option(help="MACs that each can save up for --client-rate.", show_default=False)
    ] = None,
    watch_drift: Annotated[
        float, typer.Option(help="Share of early answers that are compared with the full network's, such as 0.01.")
    ] = 0.0,
    on_drift: Annotated[
        str, typer.Option(help="When the data has changed: alarm (log, metric) or safer (another policy).")
    ] = "alarm",
    batching: Annotated[
        str,
        typer.Option(
            envvar="MEXIT_BATCHING",
            help="off: each request has its own runs of a segment; continuous: they share them.",
        ),
    ] = "off",
) -> None:
    """Serve a bundle over HTTP: Open Inference Protocol v2, POST /v1/classify, Prometheus /metrics."""
    from mexit.commands.report import say_serving
    from mexit.core.artifact_paths import BUNDLES, newest
    from mexit.flows.serve import serve as flow

    path = bundle or newest(BUNDLES, RichProgress())
    flow(
        path,
        budget=budget,
        host=host,
        port=port,
        token=token,
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
        ready=lambda url: say_serving(url, path, budget, with_token=token is not None),
    )


def camera(
    bundle: BundleArg = None,
    *,
    source: Annotated[str, typer.Option(help="0, rtsp://..., a video, an image, a folder or a glob.")],
    budget: BudgetOption = "low",
    out: Annotated[Path | None, typer.Option(help="Annotated H.264 video.")] = None,
    jsonl: Annotated[Path | None, typer.Option(help="One JSON line a frame.")] = None,
    backend: Backend = "auto",
    threads: Threads = None,
    deadline: Deadline = None,
    rate: Rate = None,
    burst: Burst = None,
    limit: Annotated[int | None, typer.Option(help="Stop after this many frames.")] = None,
    json: Json = False,
) -> None:
    """Classify every frame of a video or folder, or the newest frame of a live camera."""
    from mexit.commands.report import LabelChanges, camera_json, show_camera
    from mexit.core.artifact_paths import BUNDLES, newest
    from mexit.flows.camera import camera as flow

    progress = RichProgress()
    path = bundle or newest(BUNDLES, progress)
    result = flow(
        path,
        source=source,
        budget=budget,
        backend=backend,
        threads=threads,
        deadline_ms=deadline,
        rate=rate,
        burst=burst,
        out=out,
        jsonl=jsonl,
        limit=limit,
        on_result=None if json or out or jsonl else LabelChanges(),
        on_event=progress.note,
    )
    output.print_json(camera_json(result)) if json else show_camera(result)
    if result.signal is not None:
        raise typer.Exit(128 + result.signal)
