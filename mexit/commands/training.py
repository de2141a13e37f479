"""demo, train, evaluate, models: from data to a network that is known to be good.

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
    StopOnSignal,
    fraction,
    method_options,
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


def train(
    *,
    data: Annotated[
        str,
        typer.Option(
            help="digits, mnist, fashion-mnist, cifar10, cifar100, tiny-imagenet, imagenet or folder:PATH."
        ),
    ] = "digits",
    data_dir: DataDir = None,
    model: Annotated[str | None, typer.Option(help="One of mexit models. Default: by data set.")] = None,
    method: Annotated[str, typer.Option(help="One of the table in docs/training.md.")] = "neo-kd",
    attack: Annotated[
        str | None,
        typer.Option(
            help="Trained on: none, single, average or max-average. Default: by method.", show_default=False
        ),
    ] = None,
    eps: Annotated[str | None, typer.Option(help="Radius of the attack, such as 0.3 or 8/255.")] = None,
    step: Annotated[str | None, typer.Option(help="Step size of the attack.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the training attack.")] = None,
    norm: Annotated[str | None, typer.Option(help="Of the attack: linf or l2.")] = None,
    rule: Annotated[
        str | None, typer.Option(help="What a step of the training attack is: sign, raw, inverse-clip or penalty.")
    ] = None,
    loss: Annotated[
        str | None, typer.Option(help="What the training attack climbs: ce, margin, dlr, logit or uniform.")
    ] = None,
    restarts: Annotated[int | None, typer.Option(help="Random starts of the attacks; the worst is kept.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training split.")] = None,
    batch: Annotated[int | None, typer.Option(help="Samples a step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    augment: Annotated[
        str | None,
        typer.Option(help="Views of training images: none, crop-flip or resized-crop-flip. Default: by data set."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, order and attack starts.")] = None,
    keep: Annotated[
        str | None, typer.Option(help="Weights to keep: last, or best on the selection split.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Arithmetic: auto, bf16 or fp32.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--set", help="An option of the method, such as alpha=3. Repeatable."),
    ] = None,
    teacher: Annotated[
        list[Path] | None, typer.Option(help="A finished run that teaches. Repeatable.", show_default=False)
    ] = None,
    part: Annotated[
        float | None, typer.Option("--fraction", help="Share of the training images to use, such as 0.05.")
    ] = None,
    omit_class: Annotated[
        str | None, typer.Option(help="A class whose training images are left out, by name.")
    ] = None,
    trades: Annotated[float | None, typer.Option(help="Weight of a TRADES term, such as 6.")] = None,
    awp: Annotated[
        float | None, typer.Option(help="Adversarial weight perturbation, relative size, such as 0.005.")
    ] = None,
    ema: Annotated[
        float | None, typer.Option(help="Keep averaged weights, with this decay, such as 0.995.")
    ] = None,
    label_smoothing: Annotated[
        float | None, typer.Option(help="Share of the label spread over all classes, such as 0.1.")
    ] = None,
    craft_train_mode: Annotated[
        bool | None,
        typer.Option(
            "--craft-train-mode/--craft-eval-mode", help="BatchNorm and dropout while attacked images are made."
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Published schedule: neo_kd or rdi (demo for digits). Flags win over it.", show_default=False
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Threads on the CPU. Default: all cores.")] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Threads that read images ahead. Default: one a core for image files, else none."),
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write scalars for TensorBoard into the run, too.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="The run directory. Default: a free name in runs/.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue --out, or the newest run, from its checkpoint.")
    ] = False,
    json: Json = False,
) -> None:
    """Train a multi-exit network. Stopped with Ctrl-C, it continues with --resume and ends in the same weights."""
    from mexit.commands.report import show_training
    from mexit.flows.train import train_model as flow

    given = {
        "model": model,
        "method": method,
        "attack": attack,
        "eps": fraction(eps),
        "step": fraction(step),
        "steps": steps,
        "norm": norm,
        "rule": rule,
        "loss": loss,
        "restarts": restarts,
        "epochs": epochs,
        "batch": batch,
        "lr": lr,
        "augment": augment,
        "seed": seed,
        "keep": keep,
        "recipe": recipe,
        "options": method_options(option or []) or None,
        "teachers": tuple(str(run) for run in teacher or ()) or None,
        "fraction": part,
        "omit_class": omit_class,
        "trades": trades,
        "awp": awp,
        "ema": ema,
        "label_smoothing": label_smoothing,
        "craft_train_mode": craft_train_mode,
    }
    with StopOnSignal() as stop:
        result = flow(
            data=data,
            preset=preset,
            given=given,
            data_dir=data_dir,
            out=out,
            resume=resume,
            device=device,
            threads=threads,
            workers=workers,
            tensorboard=tensorboard,
            progress=RichProgress(),
            should_stop=stop.asked,
        )
    if not result.leads:
        raise typer.Exit(stop.exit_code)
    if not result.finished:
        output.error(f"stopped; continue with: mexit train --resume --out {result.run}")
        raise typer.Exit(stop.exit_code)
    if json:
        output.print_json({"run": str(result.run), "settings": result.settings, "log": list(result.records)})
    else:
        show_training(result)


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
