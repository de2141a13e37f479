"""The command `mexit export`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mexit.commands import calibrate, engines, output
from mexit.commands.options import DataDir, Json, SourceArg
from mexit.core.artifact_paths import is_bundle
from mexit.errors import UsageError

if TYPE_CHECKING:
    from mexit.flows.export import ExportResult


def export(
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
        typer.Option("--replace", help="Replace an existing bundle; with --trt, rebuild existing engines."),
    ] = False,
    with_images: Annotated[
        bool,
        typer.Option(
            "--with-calibration-images", help="Store images in the bundle, for devices without the data set."
        ),
    ] = False,
    no_calibrate: Annotated[bool, typer.Option("--no-calibrate", help="Select no thresholds.")] = False,
    precision: Annotated[
        str, typer.Option(help="fp32, or int8 or fp16 for a second set of segments beside fp32.")
    ] = "fp32",
    single_file: Annotated[
        bool,
        typer.Option("--single-file", help="Also write one ONNX graph with the exits inside, for other runtimes."),
    ] = False,
    json: Json = False,
) -> None:
    """Export a run as a bundle of ONNX segments, compare it with torch, and calibrate it."""
    from mexit.flows.export import export_bundle

    if trust_engines and not trt:
        raise UsageError("--trust-engines applies to TensorRT engines: add --trt")
    if source is not None and is_bundle(source):
        if not trt:
            raise UsageError(f"{source} is a bundle already; mexit export {source} --trt builds its engines")
        for flag, given in (("--precision", precision != "fp32"), ("--single-file", single_file)):
            if given:
                raise UsageError(f"{flag} applies to the export of a run: name the run, and add --replace")
        engines.build(source, replace=replace, trust_engines=trust_engines, json=json)
        return
    result = export_bundle(
        source,
        out=out,
        data_dir=data_dir,
        replace=replace,
        with_calibration=not no_calibrate,
        with_images=with_images,
        precision=precision,
        single_file=single_file,
        progress=output.RichProgress(),
    )
    fields = {
        "bundle": str(result.bundle),
        "model": result.model,
        "differences": result.differences,
        "parity": asdict(result.parity) if result.parity else None,
    }
    if not json:
        show_export(result)
    elif not trt:
        output.print_json(fields)
    if trt:
        engines.build(result.bundle, replace=replace, trust_engines=trust_engines, json=json, fields=fields)


def show_export(result: ExportResult) -> None:
    """Print the policies, the differences from torch and the parity of another precision."""
    if result.calibration:
        calibrate.show_policies(result.calibration.entry)
    differences = ", ".join(f"{difference:.1e}" for difference in result.differences)
    output.say(
        f"wrote {result.bundle}, model {result.model[:12]}; largest difference from torch per exit: {differences}"
    )
    _show_parity(result)
    output.next_commands(
        *(["mexit calibrate"] if not result.calibration else []),
        *(["mexit calibrate --backend ort:int8"] if result.parity and result.parity.precision == "int8" else []),
        "mexit serve --budget low",
        "mexit evaluate",
        "mexit bench",
    )


def _show_parity(result: ExportResult) -> None:
    """Print how a second set of segments compares with fp32, if there is one."""
    parity = result.parity
    if parity is None:
        return
    rows = [
        [
            str(row.exit),
            f"{row.largest_difference:.2e}",
            output.percent(row.agreement),
            output.percent(row.accuracy),
            output.percent(row.accuracy_fp32),
        ]
        for row in parity.exits
    ]
    columns = ["exit", "largest difference", "same answer", f"accuracy {parity.precision}", "accuracy fp32"]
    title = f"{parity.precision} against fp32 on {parity.n} images of the {parity.split} split"
    output.table(title, columns, rows, "answers only; mexit bench --tune measures the speed")
