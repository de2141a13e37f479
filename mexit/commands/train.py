"""`mexit train`: train a multi-exit network into a run directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mexit.commands import output
from mexit.commands.options import DataDir, Device, Json, fraction, image_size, numbers, pairs
from mexit.core.artifact_paths import BUNDLES, is_bundle
from mexit.core.printable import shell_path
from mexit.core.progress import StopSignal

if TYPE_CHECKING:
    from mexit.flows.train import TrainResult


def train(
    *,
    data: Annotated[
        str | None,
        typer.Option(
            help="Data set: digits (default), mnist, fashion-mnist, cifar10, cifar100, tiny-imagenet, imagenet or "
            "folder:PATH."
        ),
    ] = None,
    data_dir: DataDir = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Schedule, method included: pictures, finetune, fast or a published one (docs/training.md). "
            "Default: by data set and network.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="One of mexit models, or your own: efficientnet-lite0, timm:NAME or module:PATH.py:FUNCTION "
            "(executes the file). Default: by preset and data.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Pretrained weights of your own network: safetensors or a state dict. Default: those that it brings.",
            show_default=False,
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="Size of the images, such as 64 or 48x96 (height x width). Default: by network or pictures.",
            show_default=False,
        ),
    ] = None,
    channels: Annotated[
        int | None,
        typer.Option(help="1 (grey) or 3 (RGB). Default: by network or pictures.", show_default=False),
    ] = None,
    robust: Annotated[
        str | None,
        typer.Option(help="Train against attacks of this radius, such as 8/255.", show_default=False),
    ] = None,
    method: Annotated[str | None, typer.Option(help="Training method (docs/methods.md). Default: by preset.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--set", help="Option of the method, such as alpha=3. Repeatable."),
    ] = None,
    attack: Annotated[
        str | None,
        typer.Option(
            help="Training attack: none, single, average or max-average. Default: by method.", show_default=False
        ),
    ] = None,
    eps: Annotated[str | None, typer.Option(help="Radius of the attacks, such as 0.3 or 8/255.")] = None,
    step: Annotated[str | None, typer.Option(help="Step size of the training attack, such as 2/255.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the training attack.")] = None,
    norm: Annotated[str | None, typer.Option(help="Norm of the attacks: linf or l2.")] = None,
    rule: Annotated[
        str | None,
        typer.Option(help="Update rule of the training attack: sign, raw, inverse-clip or penalty."),
    ] = None,
    loss: Annotated[
        str | None, typer.Option(help="Loss of the training attack: ce, margin, dlr, logit or uniform.")
    ] = None,
    restarts: Annotated[
        int | None, typer.Option(help="Random starts of the attacks; the strongest result is kept.")
    ] = None,
    craft_train_mode: Annotated[
        bool | None,
        typer.Option("--craft-train-mode/--craft-eval-mode", help="Mode of BatchNorm and dropout during attacks."),
    ] = None,
    short_attack_until: Annotated[
        float | None,
        typer.Option(help="Share of the run, at its beginning, with an average attack of 3 steps of eps/2."),
    ] = None,
    average_attack_until: Annotated[
        float | None,
        typer.Option(help="Share of the run, at its beginning, with the average attack."),
    ] = None,
    freeze: Annotated[
        bool,
        typer.Option(
            "--freeze",
            help="Train the heads of the exits alone; the network stays as it is.",
        ),
    ] = False,
    finetune: Annotated[
        int | None,
        typer.Option(
            help="Train the heads as with --freeze, then all layers for this many passes.",
            show_default=False,
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training split.")] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="Length of the run instead of --epochs. Default for folders: 10.",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Images per optimisation step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Largest learning rate.")] = None,
    lr_schedule: Annotated[str | None, typer.Option(help="Course of the learning rate: steps or one-cycle.")] = None,
    warmup: Annotated[
        float | None, typer.Option(help="Share of the run in which the learning rate rises, such as 0.15.")
    ] = None,
    nesterov: Annotated[
        bool | None, typer.Option("--nesterov/--no-nesterov", help="Nesterov's momentum.", show_default=False)
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Weight decay, such as 5e-4.")] = None,
    decay_norms: Annotated[
        bool | None,
        typer.Option(
            "--decay-norms/--no-decay-norms", help="Weight decay on BatchNorm and biases too.", show_default=False
        ),
    ] = None,
    augment: Annotated[
        str | None,
        typer.Option(
            help="Augmentation: none, shift, crop-flip, reflect-crop-flip, resized-crop-flip or photo. Default: by "
            "preset."
        ),
    ] = None,
    flip: Annotated[
        bool | None,
        typer.Option(
            "--flip/--no-flip", help="Mirror half of the images. Default: by augmentation.", show_default=False
        ),
    ] = None,
    trades: Annotated[float | None, typer.Option(help="Weight of a TRADES term, such as 6.")] = None,
    awp: Annotated[
        float | None, typer.Option(help="Relative size of the adversarial weight perturbation, such as 0.005.")
    ] = None,
    ema: Annotated[
        float | None, typer.Option(help="Decay of the moving average of the weights, such as 0.995.")
    ] = None,
    recompute_norms: Annotated[
        int | None,
        typer.Option(help="Images on which BatchNorm's statistics are measured again at the end."),
    ] = None,
    exit_weights: Annotated[
        str | None, typer.Option(help="Weight of each exit in cross-entropies and TRADES, such as 2,1,1.")
    ] = None,
    label_smoothing: Annotated[
        float | None, typer.Option(help="Share of the label spread over all classes, such as 0.1.")
    ] = None,
    teacher: Annotated[
        list[Path] | None, typer.Option(help="Finished run used as a teacher. Repeatable.", show_default=False)
    ] = None,
    train_fraction: Annotated[
        float | None, typer.Option("--fraction", help="Share of the training images to use, such as 0.05.")
    ] = None,
    omit_class: Annotated[str | None, typer.Option(help="Name of a class whose training images are left out.")] = None,
    group: Annotated[
        str | None,
        typer.Option(
            help="Pictures that stay in one split: auto, folder, none, or a regular expression on the path "
            "(docs/data.md). Default: auto for folders, else none.",
            show_default=False,
        ),
    ] = None,
    split_seed: Annotated[int | None, typer.Option(help="Seed of the splits. Default: 0.")] = None,
    keep: Annotated[str | None, typer.Option(help="Weights to keep: last, or best on the selection split.")] = None,
    validate_every: Annotated[
        int | None, typer.Option(help="Epochs between measurements on the selection split.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of weights, sample order, augmentation and attack starts.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="Arithmetic: bf16, fp32, or auto (bf16 where the device has it).")
    ] = None,
    device: Device = "auto",
    threads: Annotated[int | None, typer.Option(help="Threads on the CPU. Default: all cores.")] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Threads that load images ahead. Default: one per core for files."),
    ] = None,
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Keep images of files in memory if they fit.")
    ] = True,
    graphs: Annotated[bool, typer.Option("--graphs/--no-graphs", help="CUDA graphs on a CUDA device.")] = True,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also write scalars for TensorBoard into the run.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Run directory. Default: a free name in runs/.")] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue --out, or the newest run; some settings may change (docs/training.md).",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Train a multi-exit network. After Ctrl-C, --resume continues it; without --minutes it gives the same weights."""
    import numpy.random  # noqa: F401  before signals are handled: while it is loaded, it discards a KeyboardInterrupt

    from mexit.flows.train import TrainOptions, train_model

    settings = {
        "model": model,
        "weights": weights,
        "size": image_size(size),
        "channels": channels,
        "robust": fraction(robust),
        "method": method,
        "options": method_options(option or []) or None,
        "attack": attack,
        "eps": fraction(eps),
        "step": fraction(step),
        "steps": steps,
        "norm": norm,
        "rule": rule,
        "loss": loss,
        "restarts": restarts,
        "craft_train_mode": craft_train_mode,
        "short_attack_until": short_attack_until,
        "average_attack_until": average_attack_until,
        "freeze": freeze or None,
        "finetune": finetune,
        "epochs": epochs,
        "minutes": minutes,
        "batch": batch,
        "lr": lr,
        "lr_schedule": lr_schedule,
        "warmup": warmup,
        "nesterov": nesterov,
        "weight_decay": weight_decay,
        "decay_norms": decay_norms,
        "augment": augment,
        "flip": flip,
        "trades": trades,
        "awp": awp,
        "ema": ema,
        "recompute_norms": recompute_norms,
        "exit_weights": numbers(exit_weights, "--exit-weights"),
        "label_smoothing": label_smoothing,
        "teachers": tuple(str(run) for run in teacher or ()) or None,
        "fraction": train_fraction,
        "omit_class": omit_class,
        "group": group,
        "split_seed": split_seed,
        "keep": keep,
        "validate_every": validate_every,
        "seed": seed,
        "precision": precision,
    }
    stop = StopSignal(_note_stop, interrupts=True)
    try:
        with stop:
            result = train_model(
                data=data,
                preset=preset,
                settings=settings,
                data_dir=data_dir,
                out=out,
                resume=resume,
                options=TrainOptions(
                    device=device,
                    threads=threads,
                    workers=workers,
                    tensorboard=tensorboard,
                    graphs=graphs,
                    cache=cache,
                    on_ready=stop.defer,
                    should_stop=lambda: stop.requested,
                ),
                progress=output.RichProgress(),
            )
    except KeyboardInterrupt:
        output.error("stopped")
        raise typer.Exit(stop.exit_code or 130) from None
    if not result.is_main:
        raise typer.Exit(stop.exit_code)
    if not result.finished:
        output.error(f"stopped; continue with: mexit train --resume --out {shell_path(result.run)}")
        raise typer.Exit(stop.exit_code)
    if json:
        output.print_json({"run": str(result.run), "settings": result.settings, "log": list(result.records)})
    else:
        _print_result(result)


def _print_result(result: TrainResult) -> None:
    """Print the accuracy of the last epoch and the next commands."""
    last = result.records[-1]
    rows = [
        [str(k), *(output.percent(values[k - 1]) for values in last["selection"].values())]
        for k in range(1, len(last["selection"]["clean"]) + 1)
    ]
    columns = ["exit", *(f"{name}, selection split" for name in last["selection"])]
    done = f"{last['epoch']} epochs" if last["epoch"] else "heads of the frozen network"
    output.say(f"{result.run}: {done}, {result.seconds:.0f} s")
    output.table("", columns, rows)
    output.say(f"wrote {result.run}" + (f", {result.curves}" if result.curves else ""))
    export = "mexit export --replace" if is_bundle(BUNDLES / result.run.name) else "mexit export"
    output.next_commands(export, f"mexit evaluate {shell_path(result.run)}")


def _note_stop() -> None:
    output.err.print("stopping after this step, with a checkpoint ...", style="dim")


def method_options(texts: list[str]) -> dict[str, Any]:
    """Parse `--set` texts: `true` or `false`, numbers, numbers separated by commas, else text."""
    return {name: _value(value) for name, value in pairs(texts, "--set").items()}


def _value(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        return text
    return values if "," in text else values[0]
