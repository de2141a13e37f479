"""Open the cameras of a file, with their outputs, on one runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from mexit.camera.camera_thread import Camera
from mexit.camera.cameras_file import CameraSettings, CamerasFile
from mexit.camera.fleet import Fleet, share_rate
from mexit.camera.frame import OnEvent
from mexit.camera.live_stream import LiveSettings
from mexit.camera.outputs.open_outputs import open_files, open_messages
from mexit.camera.outputs.output import Output
from mexit.camera.overlay import Overlay
from mexit.camera.parse_source import parse_source
from mexit.camera.prediction import CameraPrediction
from mexit.core.manifest import Manifest
from mexit.runtime import Runtime
from mexit.runtime.rate_limiter import read_rate_limits
from mexit.runtime.request import RequestOptions


@contextmanager
def running_fleet(
    runtime: Runtime,
    file: CamerasFile,
    *,
    keep_trying: bool = True,
    limit: int | None = None,
    on_result: Callable[[CameraPrediction], None] = lambda _: None,
    on_message: OnEvent = lambda _: None,
) -> Iterator[tuple[Fleet, list[Output]]]:
    """Start the cameras of a file; stop them and finish their outputs at the end of the block.

    Args:
        runtime: the opened bundle; its rate limiter becomes that of the file.
        file: cameras and what they share.
        keep_trying: whether a source that fails is opened again and again.
        limit: number of answers after which a camera ends.
        on_result: called with each answer after it was written.
        on_message: called with messages about sources and outputs.

    Yields:
        The cameras, and the outputs that all of them write to.

    Raises:
        BudgetInfeasible, NotCalibrated: of the budget of a camera.
        UsageError: a rate, a budget or an output is not valid.
        MissingExtra: a package for an output is not installed.
    """
    manifest = runtime.bundle.manifest
    names = [settings.name for settings in file.cameras]
    share_rate(runtime, read_rate_limits(manifest.cumulative_macs, file.rate, file.burst).overall, names)
    for settings in file.cameras:
        policy = runtime.policy(settings.budget)
        if settings.save_unsure is not None and policy.reject is None:
            on_message(
                f"{settings.name}: no picture will be saved, because no answer of this bundle is unsure: add a reject "
                "option with mexit calibrate --max-error 0.02"
            )
    with ExitStack() as stack:
        shared = open_messages(file.mqtt, file.webhook, names, manifest.name, on_event=on_message)
        for output in reversed(shared):
            stack.callback(output.close)
        cameras = [_camera(settings, shared, manifest, keep_trying, limit, on_message) for settings in file.cameras]
        fleet = Fleet(runtime, cameras, on_result=on_result, on_message=on_message)
        yield stack.enter_context(fleet), shared


def _camera(
    settings: CameraSettings,
    shared: list[Output],
    manifest: Manifest,
    keep_trying: bool,
    limit: int | None,
    on_message: OnEvent,
) -> Camera:
    request = RequestOptions(deadline_ms=settings.deadline_ms)
    if settings.budget is not None:
        request["budget"] = settings.budget
    region = settings.steady.region
    overlay = Overlay(manifest.numbers, manifest.cumulative_macs, region)
    return Camera(
        name=settings.name,
        source=parse_source(settings.source),
        request=request,
        steady=settings.steady,
        unsure_s=settings.unsure_s,
        frozen_s=settings.frozen_s,
        live=LiveSettings(insecure=settings.insecure),
        keep_trying=keep_trying,
        limit=limit,
        open_outputs=partial(open_files, settings, settings.name, overlay, region=region, on_event=on_message),
        shared=shared,
    )
