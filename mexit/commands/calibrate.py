"""The command `mexit calibrate`, and the certificates that `inspect` shows too."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from mexit.commands import output
from mexit.commands.budget_tables import (
    budget_to_serve,
    show_expected,
    show_lost,
    show_policies,
    show_reject,
    show_times,
)
from mexit.commands.options import AttackOption, Backend, BundleArg, CostOption, DataDir, Device, Json, Threads, pairs
from mexit.core.glossary import GLOSSARY

if TYPE_CHECKING:
    from mexit.core.policies_file import PolicyEntry
    from mexit.flows.calibrate import CalibrateResult


def calibrate(
    bundle: BundleArg = None,
    *,
    data: Annotated[
        str | None,
        typer.Option(help="Data other than the bundle's own: folder:PATH, or bundle for the images stored in it."),
    ] = None,
    data_dir: DataDir = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(help="A further budget NAME=VALUE, such as night=30%; repeatable."),
    ] = None,
    measure: Annotated[
        str, typer.Option(help="Confidence score: auto, max-probability, margin, entropy or agreement.")
    ] = "auto",
    ensemble: Annotated[
        bool | None,
        typer.Option(help="Exit k answers with the mean of exits 1..k. Default: chosen with the score."),
    ] = None,
    policy: Annotated[str, typer.Option(help="Thresholds: search, or geometric (MSDNet).")] = "search",
    max_risk: Annotated[
        float | None, typer.Option(help="Certify that the loss is at most this value, such as 0.02.")
    ] = None,
    confidence: Annotated[
        float | None,
        typer.Option(
            help="Confidence of --max-risk, --target-drop and --max-error, each for itself. Default: 0.95.",
            show_default=False,
        ),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            help="With --max-risk, the certified loss: early-error (default), disagreement or accuracy-gap.",
            show_default=False,
        ),
    ] = None,
    risk_method: Annotated[
        str | None,
        typer.Option(help="With --max-risk, the test: auto (default), binomial or betting.", show_default=False),
    ] = None,
    max_cost: Annotated[
        str | None,
        typer.Option(help="With --max-risk: certify this bound on the mean cost too, written as a budget."),
    ] = None,
    target_drop: Annotated[
        float | None,
        typer.Option(
            help="Certify the budget target: the cheapest that loses at most this accuracy against the static network, "
            "such as 0.005."
        ),
    ] = None,
    cost: CostOption = "time",
    max_error: Annotated[
        float | None,
        typer.Option(help="Answer 'unsure' so that at most this share of the answers given is wrong, such as 0.02."),
    ] = None,
    reject_from: Annotated[
        str | None,
        typer.Option(help="Pictures of other things, most of which must be 'unsure': folder:PATH, or a data set."),
    ] = None,
    max_unknown: Annotated[
        float | None,
        typer.Option(
            help="Largest share of the --reject-from pictures that is answered. Default: 0.1.", show_default=False
        ),
    ] = None,
    attack: AttackOption = None,
    device: Device = "auto",
    backend: Backend = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Select confidence thresholds per budget on held-out data, for the engine to be deployed."""
    from mexit.flows.calibrate import CalibrateOptions, calibrate_bundle

    options = CalibrateOptions(
        budgets=pairs(budget or [], "--budget"),
        measure=measure,
        ensemble=ensemble,
        policy=policy,
        attack=attack,
        max_risk=max_risk,
        confidence=confidence,
        loss=loss,
        risk_method=risk_method,
        max_cost=max_cost,
        target_drop=target_drop,
        cost=cost,
        max_error=max_error,
        reject_from=reject_from,
        max_unknown=max_unknown,
        device=device,
    )
    result = calibrate_bundle(
        bundle,
        options=options,
        data=data,
        data_dir=data_dir,
        backend=backend,
        threads=threads,
        progress=output.RichProgress(),
    )
    if json:
        output.print_json(
            {
                "bundle": str(result.bundle),
                "entry": asdict(result.entry),
                "expected": result.expected,
                "timed": None if result.timed is None else asdict(result.timed),
                "lost": [asdict(one) for one in result.lost],
            }
        )
    else:
        show_calibration(result)


def show_calibration(result: CalibrateResult) -> None:
    """Print how the scores rank, the policies, the certificates, and expected and test results."""
    if result.scores:
        conditions = ["clean", "attacked"][: len(result.scores[0].auroc)]
        rows = [
            [quality.measure, "yes" if quality.ensemble else "no", *(f"{value:.4f}" for value in quality.auroc)]
            for quality in result.scores
        ]
        title = "how well each score separates correct from wrong answers (AUROC)"
        columns = ["score", "ensemble", *conditions]
        caption = f"chosen: {score_name(result.entry)}\nAUROC: {GLOSSARY['AUROC']}"
        output.table(title, columns, rows, caption)
    show_policies(result.entry, result.profile)
    say_certificates(result.entry)
    if result.timed is not None:
        show_times(result.timed)
        say_certificates(result.timed)
    written = [str(path.relative_to(result.bundle)) for path in result.written]
    output.paragraph(f"wrote into {result.bundle}: {', '.join(['policies.json', *written])}")
    show_expected(result.expected)
    show_reject(result.entry, result.expected)
    if result.unavailable:
        names = ", ".join(result.unavailable)
        output.say(f"not available: {names}: the answers of early exits alone break the bound of --max-error")
    show_lost(result)
    output.next_commands(f"mexit serve --budget {budget_to_serve(result.entry)}", "mexit evaluate")


def say_certificates(entry: PolicyEntry) -> None:
    """Print the certificates that `policies.json` stores."""
    for certificate in entry.certificates:
        measured = ", ".join(
            f"{value:.4f} ({name}, n {certificate['n'][name]})" for name, value in certificate["risk"].items()
        )
        heading = f"certificate {certificate['id']} ({certificate['method']})"
        output.say(f"{heading}: {certificate['promise']} Measured: {measured}.")
        output.say(f"  {certificate['limits']}")


def score_name(entry: PolicyEntry) -> str:
    """Return the name of the confidence score of a policy entry."""
    return entry.measure + (", ensemble of exits" if entry.ensemble else "")
