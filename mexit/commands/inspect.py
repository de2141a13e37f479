"""The command `mexit inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mexit.commands import budget_tables, calibrate, engines, output
from mexit.commands.bench import show_tuning
from mexit.commands.options import BundleArg, Json
from mexit.core.budget import format_macs

if TYPE_CHECKING:
    from mexit.flows.inspect import InspectResult


def inspect(bundle: BundleArg = None, *, json: Json = False) -> None:
    """Check every byte of a bundle and show its content."""
    from mexit.flows.inspect import inspect_bundle

    result = inspect_bundle(bundle, progress=output.RichProgress())
    output.print_json(result.to_json()) if json else show_inspection(result)


def show_inspection(result: InspectResult) -> None:
    """Print exits, splits, engines and policies."""
    manifest = result.bundle.manifest
    static = manifest.static
    reference = manifest.cumulative_macs[-1] if static is None else static.macs
    rows = [
        [
            str(spec.number),
            format_macs(spec.cumulative_macs),
            output.percent(spec.cumulative_macs / reference),
            format_macs(spec.trunk_macs),
            format_macs(spec.head_macs),
            f"{spec.parameters:,}",
        ]
        for spec in manifest.exits
    ]
    if static is not None:
        rows.append(["static network", format_macs(static.macs), output.percent(1), "", "", f"{static.parameters:,}"])
    shape = " x ".join(str(side) for side in manifest.input.shape)
    title = f"{manifest.name}, model {result.bundle.id[:12]}: input {shape}, {len(manifest.classes)} classes"
    columns = ["exit", "cost", "of static", "trunk", "head", "parameters"]
    output.table(title, columns, rows, f"every file matches its recorded checksum\n{output.MACS}")
    if manifest.splits:
        parts = ", ".join(f"{name} {part.n}" for name, part in manifest.splits.parts.items())
        output.paragraph(f"trained on {manifest.splits.data_set}: {parts}")
    show_tuning(result.tuning)
    if result.policies is None:
        output.next_commands("mexit calibrate")
    else:
        for entry, table in zip(result.policies.entries, result.expected, strict=True):
            output.say(f"calibrated for {entry.engine} {entry.precision} with {calibrate.score_name(entry)}")
            budget_tables.show_policies(entry)
            budget_tables.show_expected(table)
            budget_tables.show_reject(entry, table)
            calibrate.say_certificates(entry)
    engines.show_stored(result)
