"""The cameras of `mexit serve --cameras`: they run beside the server, on the engine of its model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mexit.camera.cameras_file import CamerasFile, read_cameras_file
from mexit.camera.decode import import_av
from mexit.camera.parse_source import is_image, parse_source
from mexit.errors import UsageError
from mexit.flows.fleet import running_fleet
from mexit.flows.serve_models import Note, ServeOptions
from mexit.runtime import Runtime

if TYPE_CHECKING:
    from mexit.serving.repository import ModelRepository

_OF_THE_SERVER = ("backend", "threads", "cost", "profile")


def read_server_cameras(path: Path) -> CamerasFile:
    """Read and check the cameras of a server.

    Raises:
        UsageError: the file sets what the server sets; or an error of `read_cameras_file`.
        MissingExtra: PyAV is needed and not installed.
    """
    file = read_cameras_file(path)
    if given := [key for key in _OF_THE_SERVER if getattr(file, key) is not None]:
        raise UsageError(
            f"{path}: {given[0]}: the cameras run on the engine of the server; leave the key out, and type "
            f"--{given[0]} if needed"
        )
    sources = [parse_source(camera.source) for camera in file.cameras]
    if any(not source.files or not all(map(is_image, source.files)) for source in sources):
        import_av()
    return file


@contextmanager
def cameras_beside(models: ModelRepository, options: ServeOptions, note: Note) -> Iterator[None]:
    """Run the cameras of the option `cameras`, if there are any, until the end of the block.

    They keep the version of the model that is in service now.

    Args:
        models: of the server, loaded.
        options: of the server.
        note: called with messages about sources and outputs.

    Raises:
        UsageError: the server has several models; or an error of `read_server_cameras` and `running_fleet`.
    """
    if options.cameras is None:
        yield
        return
    file = read_server_cameras(options.cameras)
    services = models.services
    if len(services) != 1:
        raise UsageError(f"cameras need a server with one model, found {len(services)}: serve a single bundle")
    runtime = _camera_runtime(services[0].runtime, file.budget or options.budget, options)
    with running_fleet(runtime, file, on_message=note) as (fleet, _):
        models.server.show_cameras(fleet)
        yield


def _camera_runtime(served: Runtime, budget: str, options: ServeOptions) -> Runtime:
    """A runtime on the engine of the served model, with a rate limiter and statistics of its own."""
    runtime = Runtime(served.bundle, served.backend, "full", threads=served.threads)
    if options.cost == "time":
        runtime.use_time(options.profile)
    runtime.budget = budget
    return runtime
