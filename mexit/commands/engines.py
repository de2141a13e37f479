"""The output of `mexit export --trt` and `mexit inspect` about TensorRT engines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mexit.commands import output
from mexit.core.printable import shell_path

if TYPE_CHECKING:
    from mexit.flows.inspect import InspectResult
    from mexit.flows.tensorrt_engines import EngineRow, EnginesResult

GPU_NAMES = {"7.5": "GeForce RTX 20", "8.6": "GeForce RTX 30", "8.9": "GeForce RTX 40", "12.0": "GeForce RTX 50"}


def build(
    bundle: Path,
    *,
    replace: bool,
    trust_engines: bool,
    json: bool,
    fields: Mapping[str, Any] | None = None,
) -> None:
    """Build the engines of a bundle and print them. With `json`, one object with `fields` and the engines.

    The object is printed also if no engines can be built, because the bundle is complete without them.
    """
    from mexit.flows.tensorrt_engines import build_engines

    printed = dict(fields or {})
    try:
        result = build_engines(bundle, replace=replace, trust_engines=trust_engines, progress=output.RichProgress())
        printed = {"bundle": str(result.bundle), "model": result.model, **printed, "engines": result.to_json()}
        if not json:
            _show(result)
    finally:
        if json and printed:
            output.print_json(printed)


def show_stored(result: InspectResult) -> None:
    """Print the engines in the device cache, if there are any."""
    if result.engines:
        _table("TensorRT engines on this device", result.engines, "not run by this command")


def _show(result: EnginesResult) -> None:
    built_by = f"by {result.builder} {result.builder_version}; built, not run"
    _table(f"TensorRT engines of {result.bundle}", result.rows, f"{built_by}\n{_supported_gpus(result)}")
    for variant, reason in result.skipped.items():
        output.say(f"no {variant} engines: {reason}")
    output.say(f"stored for this device in {result.rows[0].file.parents[2]}, signed with its key")
    bundle = shell_path(result.bundle)
    output.next_commands(f"mexit run {bundle} IMAGE --backend trt", f"mexit inspect {bundle}")


def _supported_gpus(result: EnginesResult) -> str:
    """The GPUs that all engines support, and those that some engines do not support."""
    supported = [one for one in result.targets if all(one in row.targets for row in result.rows)]
    text = f"for NVIDIA GPUs of compute capability {', '.join(map(_gpu_name, supported))}"
    missing = [one for one in result.targets if one not in supported]
    if missing:
        text += f"\nnot for {', '.join(map(_gpu_name, missing))}: TensorRT cannot build all of these graphs for that"
    return text


def _gpu_name(target: str) -> str:
    return f"{target} ({GPU_NAMES[target]})" if target in GPU_NAMES else target


def _table(title: str, rows: tuple[EngineRow, ...], caption: str) -> None:
    columns = ["segment", "compute capability", "size", "built in", ""]
    cells = [
        [
            f"{row.variant} {row.segment}",
            ", ".join(row.targets),
            f"{row.bytes / 1e6:.2f} MB",
            f"{row.seconds:.2f} s",
            row.state,
        ]
        for row in rows
    ]
    output.table(title, columns, cells, caption)
