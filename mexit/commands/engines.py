"""What `mexit export --trt` and `mexit inspect` say about TensorRT engines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mexit.commands import output

if TYPE_CHECKING:
    from mexit.flows.inspect import InspectResult
    from mexit.flows.tensorrt_engines import EngineRow, EnginesResult

# Compute capability to the GPUs that people know it by.
KNOWN_AS = {"7.5": "GeForce RTX 20", "8.6": "GeForce RTX 30", "8.9": "GeForce RTX 40", "12.0": "GeForce RTX 50"}


def build(
    bundle: Path,
    *,
    replace: bool,
    trust_engines: bool,
    json: bool,
    found: Mapping[str, Any] | None = None,
) -> None:
    """Build a bundle's engines and say so. With `json`, one object, of what was `found` before and the engines.

    What was found is printed, too, where no engines can be built: the bundle is complete without.
    """
    from mexit.flows.tensorrt_engines import build_engines

    said = dict(found or {})
    try:
        result = build_engines(
            bundle, replace=replace, trust_engines=trust_engines, progress=output.RichProgress()
        )
        said = {"bundle": str(result.bundle), "model": result.model, **said, "engines": result.to_json()}
        if not json:
            _show(result)
    finally:
        if json and said:
            output.print_json(said)


def show_kept(result: InspectResult) -> None:
    """The engines in this device's cache, if there are any."""
    if result.engines:
        _table("TensorRT engines on this device", result.engines, "not run by this command")


def _show(result: EnginesResult) -> None:
    made_by = f"by {result.builder} {result.builder_version}; built, not run"
    _table(f"TensorRT engines of {result.bundle}", result.rows, f"{made_by}\n{_for_whom(result)}")
    for variant, why in result.skipped.items():
        output.say(f"no {variant} engines: {why}")
    output.say(f"kept for this device in {result.rows[0].file.parents[2]}, signed with its key")
    output.next_commands(f"mexit run {result.bundle} IMAGE --backend trt", f"mexit inspect {result.bundle}")


def _for_whom(result: EnginesResult) -> str:
    """For which GPUs every engine is, and for which some are not."""
    everywhere = [one for one in result.targets if all(one in row.targets for row in result.rows)]
    said = f"for NVIDIA GPUs of compute capability {', '.join(map(_known, everywhere))}"
    missing = [one for one in result.targets if one not in everywhere]
    if missing:
        said += f"\nnot for {', '.join(map(_known, missing))}: TensorRT cannot build all of these graphs for that"
    return said


def _known(target: str) -> str:
    return f"{target} ({KNOWN_AS[target]})" if target in KNOWN_AS else target


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
