"""The command `mexit inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mexit.commands import budget_tables, calibrate, engines, output
from mexit.commands.bench import show_tuning
from mexit.commands.options import BundleArg, Json
from mexit.core.budget import format_macs, short_macs

if TYPE_CHECKING:
    from mexit.flows.inspect import InspectResult
    from mexit.runtime.latency_profile import Profile


def inspect(bundle: BundleArg = None, *, json: Json = False) -> None:
    """Check every byte of a bundle and show its content."""
    from mexit.flows.inspect import inspect_bundle

    result = inspect_bundle(bundle, progress=output.RichProgress())
    output.print_json(result.to_json()) if json else show_inspection(result)


def show_inspection(result: InspectResult) -> None:
    """Print exits, splits, engines and policies."""
    manifest = result.bundle.manifest
    static = manifest.static
    reference, profile = manifest.cumulative_macs[-1] if static is None else static.macs, result.profile
    times_us = [None] * len(manifest.exits) if profile is None else profile.exits_us
    rows = [
        [
            str(spec.number),
            format_macs(spec.cumulative_macs),
            output.percent(spec.cumulative_macs / reference),
            *_time(exit_us),
            short_macs(spec.trunk_macs),
            short_macs(spec.head_macs),
            f"{spec.parameters:,}",
        ]
        for spec, exit_us in zip(manifest.exits, times_us, strict=True)
    ]
    if static is not None:
        time = _time(None if profile is None else profile.static_us)
        cells = [format_macs(static.macs), output.percent(1), *time, "", ""]
        rows.append(["static network", *cells, f"{static.parameters:,}"])
    shape = " x ".join(str(side) for side in manifest.input.shape)
    title = f"{manifest.name}, model {result.bundle.id[:12]}: input {shape}, {len(manifest.classes)} classes"
    columns = ["exit", "cost", "of static", *(["us"] if profile else []), "trunk", "head", "parameters"]
    caption = f"every file matches its recorded checksum\n{output.MACS}{_time_caption(profile)}"
    output.table(title, columns, rows, caption)
    if manifest.splits:
        parts = ", ".join(f"{name} {part.n}" for name, part in manifest.splits.parts.items())
        output.paragraph(f"trained on {manifest.splits.data_set}: {parts}")
    show_tuning(result.tuning, every_engine=False)
    if result.policies is None:
        output.next_commands("mexit calibrate")
    else:
        for entry, table, times in zip(result.policies.entries, result.expected, result.times, strict=True):
            output.say(f"calibrated for {entry.engine} {entry.precision} with {calibrate.score_name(entry)}")
            budget_tables.show_policies(entry, times.profile if times else None)
            if times is not None and times.timed is not None:
                budget_tables.show_times(times.timed)
            budget_tables.show_expected(table)
            budget_tables.show_reject(entry, table)
            calibrate.say_certificates(entry)
    engines.show_stored(result)


def _time(time_us: float | None) -> list[str]:
    """The cell of a time in microseconds; none without a profile."""
    return [] if time_us is None else [f"{time_us:,.0f}"]


def _time_caption(profile: Profile | None) -> str:
    if profile is None:
        return "\nno times: mexit calibrate or the first mexit serve on this device measures them"
    return (
        f"\nus: a single image on this device, end to end, in {profile.engine} {profile.precision} with "
        f"{profile.threads} thread(s)"
    )
