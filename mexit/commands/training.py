"""demo, evaluate, models: from data to a network that is known to be good.

Parse, call a flow, print. Flows are imported by the command that needs them, so that each starts fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mexit.commands import output
from mexit.commands.options import (
    Backend,
    DataDir,
    Json,
    SourceArg,
    fraction,
)
from mexit.commands.output import RichProgress


def demo(
    threads: Annotated[int | None, typer.Option(help="Threads for training. Default: all cores.")] = None,
    json: Json = False,
) -> None:
    """The whole pipeline on embedded real data (UCI handwritten digits), in under two minutes on two cores."""
    from mexit.commands.report import show_demo
    from mexit.flows.demo import demo as flow

    result = flow(threads=threads, progress=RichProgress())
    output.print_json(result.report) if json else show_demo(result)


def evaluate(
    source: SourceArg = None,
    *,
    data_dir: DataDir = None,
    samples: Annotated[int, typer.Option(help="Test images, evenly spaced; 0 for all.")] = 1000,
    eps: Annotated[str | None, typer.Option(help="Radius of the attacks. Default: the run's.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the attacks. Default: the run's (50).")] = None,
    attacks: Annotated[
        str, typer.Option(help="Of pgd, policy, autoattack, slowdown, sanity, with commas; or all.")
    ] = "pgd",
    exits: Annotated[str, typer.Option(help="Exits for autoattack, such as 1,3.")] = "all",
    strong_samples: Annotated[int, typer.Option(help="Test images for all but pgd; 0 for as many.")] = 200,
    restarts: Annotated[int, typer.Option(help="Random starts of PGD, restarts of Square.")] = 1,
    targets: Annotated[int, typer.Option(help="Wrong classes that policy tries at each exit.")] = 3,
    queries: Annotated[int, typer.Option(help="Of Square and RayS, for each image.")] = 5000,
    transfer: Annotated[
        Path | None, typer.Option(help="Another run, whose attacks policy tries as well.", show_default=False)
    ] = None,
    backend: Backend = "auto",
    json: Json = False,
) -> None:
    """Accuracy on the test split, per exit and per budget, clean and under attack. Writes a model card."""
    from mexit.commands.report import show_evaluation
    from mexit.evaluate.config import EvaluationConfig, read_exits, read_groups
    from mexit.flows.evaluate import evaluate_model as flow

    result = flow(
        source,
        data_dir=data_dir,
        samples=samples or None,
        eps=fraction(eps),
        steps=steps,
        backend=backend,
        plan=EvaluationConfig(
            read_groups(attacks), read_exits(exits), strong_samples or None, restarts, targets, queries,
            transfer=transfer,
        ),
        progress=RichProgress(),
    )  # fmt: skip
    output.print_json(result.report) if json else show_evaluation(result)


def models(*, json: Json = False) -> None:
    """Every network: input, classes, and what leaving at each exit costs."""
    from mexit.commands.report import show_models
    from mexit.flows.models import models as flow

    result = flow()
    output.print_json([row.to_json() for row in result]) if json else show_models(result)
