"""The command `mexit evaluate`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mexit.commands import output
from mexit.commands.options import Backend, DataDir, Device, Json, SourceArg, fraction
from mexit.core.artifact_paths import is_bundle
from mexit.core.budget import short_macs
from mexit.core.printable import shell_path
from mexit.evaluate.reports import merged_budgets, reject_sentence

if TYPE_CHECKING:
    from mexit.flows.evaluate import EvaluateResult

_ROUNDING = 1e-6  # of a mean cost, relative
_ERROR = "±: standard error"


def evaluate(
    source: SourceArg = None,
    *,
    data_dir: DataDir = None,
    samples: Annotated[int, typer.Option(help="Test images, evenly spaced; 0 for all.")] = 1000,
    eps: Annotated[str | None, typer.Option(help="Radius of the attacks, such as 8/255. Default: the run's.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the attacks. Default: the run's (50).")] = None,
    attacks: Annotated[
        str | None,
        typer.Option(
            help="Groups: pgd, policy, autoattack, slowdown, sanity, corruptions, by commas; all; or clean. "
            "[dim]Default: clean for a run that was trained on clean images, else pgd.[/]",
            show_default=False,
        ),
    ] = None,
    exits: Annotated[str, typer.Option(help="Exits that autoattack attacks, such as 1,3.")] = "all",
    strong_samples: Annotated[
        int, typer.Option(help="Test images for the groups other than pgd and corruptions; 0 for --samples.")
    ] = 200,
    restarts: Annotated[int, typer.Option(help="Random starts of PGD and restarts of Square.")] = 1,
    targets: Annotated[int, typer.Option(help="Wrong classes that policy targets at each exit.")] = 3,
    queries: Annotated[int, typer.Option(help="Queries of Square and RayS per image.")] = 5000,
    transfer: Annotated[
        Path | None,
        typer.Option(help="Another run: images attacked on it are tried on this one.", show_default=False),
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option(
            help="Budgets to evaluate, separated by commas. [dim]Default: all of a bundle; a run has none, and named "
            "ones are calibrated for it.[/]",
            show_default=False,
        ),
    ] = None,
    device: Device = "auto",
    batch: Annotated[
        int | None,
        typer.Option(
            help="Images per pass of the torch network. [dim]Default: 128, on CUDA 512.[/]", show_default=False
        ),
    ] = None,
    backend: Backend = "auto",
    threads: Annotated[
        int | None,
        typer.Option(
            envvar="MEXIT_THREADS",
            help="Threads on the CPU, of torch and of the engine. [dim]Default: those that torch takes, and for the "
            "engine the fastest number measured on this device, else 1.[/]",
            show_default=False,
        ),
    ] = None,
    report: Annotated[
        bool,
        typer.Option(
            "--report/--no-report",
            help="Write report.html: confusion, accuracy per class, the most wrong and the least certain pictures, "
            "reliability.",
        ),
    ] = True,
    json: Json = False,
) -> None:
    """Measure accuracy on the test split, per exit and budget, clean and under attack; write a model card."""
    from mexit.evaluate.config import EvaluateOptions, read_budgets, read_exits, read_groups
    from mexit.flows.evaluate import evaluate_model

    result = evaluate_model(
        source,
        data_dir=data_dir,
        samples=samples or None,
        eps=fraction(eps),
        steps=steps,
        backend=backend,
        options=EvaluateOptions(
            read_groups(attacks),
            read_exits(exits),
            strong_samples or None,
            restarts,
            targets,
            queries,
            transfer=transfer,
            budgets=read_budgets(budgets),
            device=device,
            batch=batch,
            threads=threads,
            report=report,
        ),
        progress=output.RichProgress(),
    )
    output.print_json(result.report) if json else show_evaluation(result)


def show_evaluation(result: EvaluateResult) -> None:
    """Print accuracy per exit and per budget, the transfer between exits, failed checks, and what usually follows."""
    report = result.report
    exits = [f"exit {row['exit']}" for row in report["exits"]]
    _show_exits(report)
    if report["transfer"]:
        _show_transfer(report["transfer"], exits)
    if report["budgets"]:
        _show_budgets(report)
        _show_slowdown(report["budgets"], report["settings"])
    if report["curve"]:
        _show_curve(report["curve"], exits)
    if report["corruptions"]:
        _show_corruptions(report["corruptions"], exits, report["settings"])
    if report["checks"]:
        _show_flags(report)
    if result.written:
        names = ", ".join(path.name for path in result.written)
        output.paragraph(f"wrote into {result.written[0].parent}: {names}")
    if result.kept:
        output.paragraph(f"kept, of other attacks: {', '.join(path.name for path in result.kept)}")
    for page in (path for path in result.written if path.suffix == ".html"):
        output.paragraph(f"{page}: pictures and tables of the clean answers, for a browser")
    source = Path(report["settings"]["source"])
    output.next_commands(f"mexit {'bench' if is_bundle(source) else 'export'} {shell_path(source)}")


def _show_exits(report: Mapping[str, Any]) -> None:
    settings = report["settings"]
    caption = f"{settings['n']} of {settings['of']} test images, {settings['precision']} on {settings['device']}"
    caption += f"; {_ERROR}"
    if report["transfer"]:
        caption += f"; {settings['attack']}"
    if settings["strong_n"]:
        caption += f"\n{settings['strong_n']} of them under every attack: {', '.join(settings['attacks'])}"
    names = dict.fromkeys(name for row in report["exits"] for name in row if name not in ("exit", "worst"))
    conditions = [*names, "worst"] if "worst" in report["exits"][0] else list(names)
    rows = [
        [str(row["exit"]), *(output.with_error(row[name]) if name in row else "-" for name in conditions)]
        for row in report["exits"]
    ]
    output.table(f"{settings['source']}: accuracy per exit", ["exit", *conditions], rows, caption)


def _show_transfer(transfer: list[list[dict[str, Any]]], exits: list[str]) -> None:
    rows = [[name, *(output.percent(cell["value"]) for cell in row)] for name, row in zip(exits, transfer, strict=True)]
    title = "accuracy when one exit is attacked (row) and another answers (column)"
    output.table(title, ["attacked", *exits], rows)


def _show_budgets(report: Mapping[str, Any]) -> None:
    """One row for each policy and condition."""
    rows, exceeded = [], []
    for name, conditions in merged_budgets(report):
        limit, mean = conditions["budget_macs"], conditions["clean"]["mean_macs"]
        over = mean > limit * (1 + _ROUNDING)
        if over:
            exceeded.append(f"{name}: {short_macs(mean)} MACs in the mean, of {short_macs(limit)} in the budget")
        first = name if over else f"{name} ≤{short_macs(limit)}"
        for condition, entry in conditions.items():
            if condition == "budget_macs":
                continue
            cost = ["-", "-"]
            if "exits" in entry:
                cost = [short_macs(entry["mean_macs"]), output.counts(entry["exits"])]
            rows.append([first, condition, output.with_error(entry), *cost])
            first = ""
    columns = ["budget", "images", "accuracy", "mean MACs", "exits taken"]
    attacked = any("worst" in conditions for conditions in report["budgets"].values())
    caption = "worst: correct under every attack, the slowdown attacks included\n" if attacked else ""
    output.table("accuracy and cost of the deployed policy", columns, rows, f"{caption}{output.MACS}; {_ERROR}")
    if exceeded:
        output.paragraph(
            f"the clean test images cost more than the images that selected the thresholds: {'; '.join(exceeded)}"
        )
    if sentence := reject_sentence(report):
        output.paragraph(sentence)


def _show_slowdown(budgets: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    conditions = [name for name in ("clean", "sloth", "hinge") if all(name in row for row in budgets.values())]
    if len(conditions) < 2:
        return
    rows = [
        [name, *(f"{row[one]['efficacy']:.2f} ({short_macs(row[one]['mean_macs'])})" for one in conditions)]
        for name, row in budgets.items()
    ]
    caption = (
        "efficacy is 1 if all images leave at exit 1, and falls when they leave later; in brackets the mean MACs\n"
        f"clean: {settings['n']} images; attacked: {settings['strong_n']} of them"
    )
    output.table("slowdown attacks: efficacy of the exits", ["budget", *conditions], rows, caption)


def _show_curve(curve: list[dict[str, Any]], exits: list[str]) -> None:
    names = [*exits, *curve[0]["budgets"]]
    rows = [
        [f"{row['eps']:.4g}"] + [output.percent(entry["value"]) for entry in (*row["exits"], *row["budgets"].values())]
        for row in curve
    ]
    output.table("accuracy against the radius of the attack", ["eps", *names], rows)


def _show_corruptions(corruptions: Mapping[str, Any], exits: list[str], settings: Mapping[str, Any]) -> None:
    """Accuracy under each corruption, mean over severities: per exit; per budget with its cost; exits taken."""
    clean, mean = corruptions["clean"], corruptions["mean"]
    spaced = [(row["corruption"].replace("_", " "), row) for row in corruptions["per_corruption"]]  # to wrap at words
    named = [("clean", clean), *spaced, ("mean", mean)]
    rows = [[name, *(output.percent(entry["value"]) for entry in row["exits"])] for name, row in named]
    rows.append(["drop, points", *(f"{100 * entry['drop']:.1f}" for entry in mean["exits"])])
    caption = f"{settings['n']} images at each of 5 severities; the report has every severity and standard errors"
    output.table("common corruptions: accuracy per exit, mean over severities", ["corruption", *exits], rows, caption)
    if not clean["budgets"]:
        return
    rows = [
        [name, *(f"{output.percent(one['value'])} {short_macs(one['mean_macs'])}" for one in row["budgets"].values())]
        for name, row in named
    ]
    output.table("common corruptions: accuracy and mean MACs per budget", ["corruption", *clean["budgets"]], rows)
    _show_corrupted_budgets(clean["budgets"], mean["budgets"])


def _show_corrupted_budgets(clean: Mapping[str, Any], mean: Mapping[str, Any]) -> None:
    """The exits that each budget takes, clean and in the mean of all corruptions."""
    rows = []
    for name, corrupted in mean.items():
        taken = [count / clean[name]["n"] for count in clean[name]["exits"]]
        lines = (("clean", clean[name], taken), ("corrupted", corrupted, corrupted["exit_shares"]))
        for condition, entry, shares in lines:
            first = name if condition == "clean" else f"drop {100 * corrupted['drop']:.1f} points"
            percents = " / ".join(f"{100 * share:.0f}" for share in shares)
            rows.append([first, condition, output.with_error(entry), short_macs(entry["mean_macs"]), percents])
    columns = ["budget", "images", "accuracy", "mean MACs", "exits taken, %"]
    output.table("common corruptions: each budget, mean over corruptions and severities", columns, rows)


def _show_flags(report: Mapping[str, Any]) -> None:
    """Print the failed checks of the attacks themselves."""
    if not report["flags"]:
        output.say(f"no flags: {len(report['checks'])} checks of the attacks themselves passed")
        return
    failed = [check for check in report["checks"] if not check["passed"]]
    rows = [[check["name"], check["found"], check["expected"], check["means"]] for check in failed]
    title = f"FLAGS: {len(failed)} of {len(report['checks'])} checks failed; accuracy under attack may be too high"
    output.table(title, ["check", "found", "expected", "meaning"], rows)
