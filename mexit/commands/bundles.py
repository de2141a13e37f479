"""export, calibrate, inspect, bench: everything about a bundle.

Parse, call a flow, print. Flows are imported by the command that needs them, so that each starts fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mexit.commands import engines, output
from mexit.commands.options import Backend, BundleArg, DataDir, Json, SourceArg, Threads, pairs
from mexit.commands.output import RichProgress
from mexit.errors import UsageError


def export(
    source: SourceArg = None,
    *,
    out: Annotated[Path | None, typer.Option(help="The bundle directory. Default: bundles/NAME.")] = None,
    data_dir: DataDir = None,
    trt: Annotated[bool, typer.Option("--trt", help="Also build this device's TensorRT engines.")] = False,
    trust_engines: Annotated[
        bool,
        typer.Option(
            "--trust-engines",
            help="With --trt: take engines that came in the bundle. Opening one runs what its maker put there.",
        ),
    ] = False,
    replace: Annotated[
        bool,
        typer.Option(
            "--replace", help="Put the bundle in place of an existing one; build engines that exist anew."
        ),
    ] = False,
    with_images: Annotated[
        bool,
        typer.Option(
            "--with-calibration-images", help="Put images into the bundle, for devices without the data set."
        ),
    ] = False,
    no_calibrate: Annotated[bool, typer.Option("--no-calibrate", help="Set no thresholds yet.")] = False,
    precision: Annotated[
        str, typer.Option(help="fp32, or a second set of segments beside it: int8 or fp16.")
    ] = "fp32",
    single_file: Annotated[
        bool,
        typer.Option(
            "--single-file", help="Also write one ONNX graph that leaves early by itself, for other programs."
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Export a run as a bundle of ONNX segments, check it against torch, and calibrate it."""
    from dataclasses import asdict

    from mexit.commands.report import show_export
    from mexit.core.artifact_paths import is_bundle
    from mexit.flows.export import export_bundle as flow

    if trust_engines and not trt:
        raise UsageError("--trust-engines is about TensorRT engines: add --trt")
    if source is not None and is_bundle(source):
        if not trt:
            raise UsageError(f"{source} is a bundle already; mexit export {source} --trt builds its engines")
        if precision != "fp32":
            raise UsageError("--precision is decided when a run is exported: name the run, and --replace")
        if single_file:
            raise UsageError("--single-file is decided when a run is exported: name the run, and --replace")
        engines.build(source, replace=replace, trust_engines=trust_engines, json=json)
        return
    result = flow(
        source,
        out=out,
        data_dir=data_dir,
        replace=replace,
        with_calibration=not no_calibrate,
        with_images=with_images,
        precision=precision,
        single_file=single_file,
        progress=RichProgress(),
    )
    found = {
        "bundle": str(result.bundle),
        "model": result.model,
        "differences": result.differences,
        "parity": asdict(result.parity) if result.parity else None,
    }
    if not json:
        show_export(result)
    elif not trt:
        output.print_json(found)
    if trt:
        engines.build(result.bundle, replace=replace, trust_engines=trust_engines, json=json, found=found)


def calibrate(
    bundle: BundleArg = None,
    *,
    data: Annotated[
        str | None,
        typer.Option(help="Other data than the bundle's own: folder:PATH, or bundle for the images in it."),
    ] = None,
    data_dir: DataDir = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(help="A further budget, NAME=VALUE, such as night=30%. Repeatable."),
    ] = None,
    measure: Annotated[
        str, typer.Option(help="Confidence: auto, max-probability, margin, entropy or agreement.")
    ] = "auto",
    ensemble: Annotated[
        bool | None,
        typer.Option(help="Exit k answers with the mean of exits 1..k. Default: as auto finds."),
    ] = None,
    policy: Annotated[str, typer.Option(help="Thresholds: search, or geometric (MSDNet).")] = "search",
    max_risk: Annotated[
        float | None, typer.Option(help="Certify that the loss is at most this, such as 0.02.")
    ] = None,
    confidence: Annotated[float, typer.Option(help="Of the certificate.")] = 0.95,
    loss: Annotated[
        str, typer.Option(help="Certified: early-error, disagreement or accuracy-gap.")
    ] = "early-error",
    risk_method: Annotated[
        str, typer.Option(help="auto, binomial, hoeffding-bentkus, betting or conformal.")
    ] = "auto",
    max_cost: Annotated[
        str | None, typer.Option(help="Certify this bound on the mean cost too, as a budget.")
    ] = None,
    attack: Annotated[str, typer.Option(help="Also measure under: average, max-average or none.")] = "average",
    backend: Backend = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Set confidence thresholds per budget on held-out data, for the engine that will be deployed."""
    from dataclasses import asdict

    from mexit.commands.report import show_calibration
    from mexit.flows.calibrate import calibrate_bundle as flow

    result = flow(
        bundle,
        data=data,
        data_dir=data_dir,
        budgets=pairs(budget or [], "--budget"),
        measure=measure,
        ensemble=ensemble,
        policy=policy,
        max_risk=max_risk,
        confidence=confidence,
        loss=loss,
        risk_method=risk_method,
        max_cost=max_cost,
        attack=attack,
        backend=backend,
        threads=threads,
        progress=RichProgress(),
    )
    if json:
        output.print_json({"bundle": str(result.bundle), "entry": asdict(result.entry)})
    else:
        show_calibration(result)


def inspect(bundle: BundleArg = None, *, json: Json = False) -> None:
    """Check a bundle byte by byte and say what it holds."""
    from mexit.commands.report import show_inspection
    from mexit.flows.inspect import inspect as flow

    result = flow(bundle, progress=RichProgress())
    if json:
        output.print_json(result.to_json())
        return
    show_inspection(result)
    engines.show_kept(result)


def bench(
    bundle: BundleArg = None,
    *,
    backend: Backend = "auto",
    threads: Threads = None,
    batch: Annotated[list[int] | None, typer.Option(help="Batch sizes. Default: 1, 8, 64.")] = None,
    repeats: Annotated[int, typer.Option(help="Timed calls of each path.")] = 200,
    tune: Annotated[
        bool, typer.Option("--tune", help="First time every engine here; --backend auto goes by it from then on.")
    ] = False,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Time a bundle on this machine, per path and batch."""
    from mexit.commands.report import show_bench
    from mexit.flows.bench import BATCHES
    from mexit.flows.bench import bench as flow

    result = flow(
        bundle,
        backend=backend,
        threads=threads,
        batches=batch or BATCHES,
        repeats=repeats,
        tune=tune,
        data_dir=data_dir,
        progress=RichProgress(),
    )
    output.print_json(result.to_json()) if json else show_bench(result)
