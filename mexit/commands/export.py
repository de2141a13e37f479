"""The command `mexit export`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mexit.commands import budget_tables, engines, output
from mexit.commands.options import AttackOption, DataDir, Device, Json, SourceArg, given_options
from mexit.core.artifact_paths import is_bundle
from mexit.core.bundle import Bundle
from mexit.core.printable import shell_path
from mexit.errors import UsageError
from mexit.export.triton_repository import check_target, write_repository

if TYPE_CHECKING:
    from mexit.export.validate import PrecisionReport
    from mexit.flows.export import ExportResult


_OF_A_BUNDLE = ("source", "trt", "trust_engines", "triton", "replace", "json")  # what applies to a bundle


def export(
    context: typer.Context,
    source: SourceArg = None,
    *,
    out: Annotated[Path | None, typer.Option(help="The bundle directory. Default: bundles/NAME.")] = None,
    data_dir: DataDir = None,
    trt: Annotated[bool, typer.Option("--trt", help="Also build TensorRT engines for this device.")] = False,
    trust_engines: Annotated[
        bool,
        typer.Option(
            "--trust-engines",
            help="With --trt: use the engines stored in the bundle. An engine is executable code of its author.",
        ),
    ] = False,
    replace: Annotated[
        bool,
        typer.Option(
            "--replace",
            help="Replace an existing bundle and the directory of --triton; with --trt, rebuild existing engines.",
        ),
    ] = False,
    triton: Annotated[
        Path | None,
        typer.Option(
            "--triton", metavar="DIR", help="Also write a Triton model repository that applies the thresholds to DIR."
        ),
    ] = None,
    with_images: Annotated[
        bool,
        typer.Option("--with-calibration-images", help="Store images in the bundle, for devices without the data set."),
    ] = False,
    no_calibrate: Annotated[bool, typer.Option("--no-calibrate", help="Select no thresholds.")] = False,
    precision: Annotated[
        str, typer.Option(help="fp32, or int8 or fp16 for a second set of segments beside fp32.")
    ] = "fp32",
    single_file: Annotated[
        bool,
        typer.Option("--single-file", help="Also write one ONNX graph with the exits inside, for other runtimes."),
    ] = False,
    exits: Annotated[
        str,
        typer.Option(
            help="The exits to keep: auto for those that save time on this machine (the segments between them are "
            "merged), all, or numbers such as 1,3,7. The last exit is always kept.",
        ),
    ] = "auto",
    profile: Annotated[
        Path | None,
        typer.Option(
            help="With --exits auto: choose by the times in this file, which another device measured with a bundle of "
            "this run and all exits. [dim]Default: this machine's times.[/]",
            show_default=False,
        ),
    ] = None,
    attack: AttackOption = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Export a run as a bundle of ONNX segments (layers between exits), compare it with torch, and calibrate it."""
    if trust_engines and not trt:
        raise UsageError("--trust-engines applies to TensorRT engines: add --trt")
    if triton is not None and no_calibrate:
        raise UsageError("--triton writes the thresholds: leave out --no-calibrate")
    if triton is not None:
        check_target(triton, replace=replace)  # before any work
    fields: dict[str, Any] = {}
    if source is not None and is_bundle(source):
        _check_options_of_bundle(context, source, trt, triton)
        if triton is not None:
            fields = _write_triton(source, triton, replace=replace, json=json)
        if trt:
            engines.build(source, replace=replace, trust_engines=trust_engines, json=json, fields=fields)
        elif json:
            output.print_json(fields)
        return

    from mexit.flows.export import ExportOptions, export_bundle  # needs torch, which building engines does not

    result = export_bundle(
        source,
        out=out,
        data_dir=data_dir,
        replace=replace,
        options=ExportOptions(precision, single_file, not no_calibrate, with_images, device, attack, exits, profile),
        progress=output.RichProgress(),
    )
    fields = {
        "bundle": str(result.bundle),
        "model": result.model,
        "differences": result.differences,
        "exits": result.exits,
        "unfinished": result.unfinished,
        "expected": result.calibration.expected if result.calibration else None,
        "parity": asdict(result.precision_report) if result.precision_report else None,
        "lost": [asdict(one) for one in result.lost],
    }
    if not json:
        show_export(result)
    if triton is not None:
        fields |= _write_triton(result.bundle, triton, replace=replace, json=json)
    if json and not trt:
        output.print_json(fields)
    if trt:
        engines.build(result.bundle, replace=replace, trust_engines=trust_engines, json=json, fields=fields)


def _check_options_of_bundle(context: typer.Context, bundle: Path, trt: bool, triton: Path | None) -> None:
    """Check the options of a command that names a bundle in place of a run."""
    if not trt and triton is None:
        command = f"mexit export {shell_path(bundle)}"
        raise UsageError(
            f"{bundle} is a bundle already; {command} --trt builds its engines, {command} --triton DIR writes a Triton "
            "model repository"
        )
    if others := [option for name, option in given_options(context).items() if name not in _OF_A_BUNDLE]:
        raise UsageError(
            f"{' and '.join(others)}: for the export of a run, and {bundle} is a bundle; name the run, and add "
            "--replace"
        )


def _write_triton(path: Path, folder: Path, *, replace: bool, json: bool) -> dict[str, Any]:
    """Write the model repository of a bundle and print it; returns the fields of the JSON output."""
    bundle = Bundle.open(path)
    models = write_repository(bundle, folder, replace=replace)
    if not json:
        output.say(f"wrote {folder} for Triton: clients call {models[0]}, which runs {', '.join(models[1:])}")
        output.next_commands(f"tritonserver --model-repository {shell_path(folder.absolute())}")
    return {"bundle": str(path), "model": bundle.id, "triton": {"folder": str(folder), "models": list(models)}}


def show_export(result: ExportResult) -> None:
    """Print the budgets, the differences from torch and the comparison of a second precision with fp32."""
    if result.calibration:
        budget_tables.show_policies(result.calibration.entry, result.calibration.profile)
    differences = ", ".join(f"{difference:.1e}" for difference in result.differences)
    output.paragraph(
        f"{result.bundle}: model {result.model[:12]}; largest difference from torch per exit: {differences}"
    )
    report = result.precision_report
    if report:
        _show_precision(report)
    if result.calibration:
        budget_tables.show_expected(result.calibration.expected)
    budget_tables.show_lost(result)
    budget = "low" if result.calibration is None else budget_tables.budget_to_serve(result.calibration.entry)
    output.next_commands(
        *(["mexit calibrate"] if not result.calibration else []),
        *(["mexit calibrate --backend ort:int8"] if report and report.precision == "int8" else []),
        f"mexit serve --budget {budget}",
        "mexit evaluate",
        "mexit bench",
    )


def _show_precision(report: PrecisionReport) -> None:
    """Print the comparison of a second set of segments with fp32, one row per exit."""
    rows = [
        [
            str(row.exit),
            f"{row.largest_difference:.2e}",
            output.percent(row.agreement),
            output.percent(row.accuracy),
            output.percent(row.accuracy_fp32),
        ]
        for row in report.exits
    ]
    columns = ["exit", "largest difference", "same class", f"accuracy {report.precision}", "accuracy fp32"]
    title = f"{report.precision} against fp32 on {report.n} images of the {report.split} split"
    output.table(title, columns, rows, "mexit bench --tune measures the speed")
