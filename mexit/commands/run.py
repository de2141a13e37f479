"""The command `mexit run`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mexit.commands import output
from mexit.commands.options import (
    Backend,
    BudgetOption,
    Burst,
    CostOption,
    Deadline,
    Json,
    ProfileOption,
    Rate,
    Threads,
)
from mexit.core.artifact_paths import is_bundle
from mexit.core.budget import short_macs
from mexit.core.wrong_path import BUNDLE, found_instead
from mexit.errors import MexitError, NotFound, UsageError

if TYPE_CHECKING:
    from mexit.flows.run import Answer


def run(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="[BUNDLE] IMAGE...", help="Image files; a bundle directory may come first."),
    ],
    *,
    budget: BudgetOption = "low",
    cost: CostOption = "time",
    profile: ProfileOption = None,
    backend: Backend = "auto",
    threads: Threads = None,
    deadline: Deadline = None,
    rate: Rate = None,
    burst: Burst = None,
    json: Json = False,
) -> None:
    """Classify image files. A file that cannot be read gets an error line; the others are answered.

    The exit code is that of the errors (docs/errors.md), or 1 if their codes differ.
    """
    from mexit.flows.run import classify_files

    bundle, images = bundle_and_images(paths)
    answers = classify_files(
        images,
        bundle=bundle,
        budget=budget,
        cost=cost,
        profile=profile,
        backend=backend,
        threads=threads,
        deadline_ms=deadline,
        rate=rate,
        burst=burst,
        progress=output.RichProgress(),
    )
    output.print_json(answers_to_json(answers)) if json else show_answers(answers)
    errors = [answer.error for answer in answers if answer.error]
    if errors:
        if len(answers) > 1:
            output.error(f"{len(errors)} of {len(answers)} pictures failed")
        codes = {error.exit_code for error in errors}
        raise typer.Exit(codes.pop() if len(codes) == 1 else MexitError.exit_code)


def bundle_and_images(paths: Sequence[Path]) -> tuple[Path | None, Sequence[Path]]:
    """The bundle, if the first path names one, and the pictures.

    A first path that is neither a bundle nor a file is an error, because another bundle must not answer in its place.
    Exception: it has a suffix, or is written with the same folder as another picture; it is then one of the pictures,
    and the others are answered.

    Raises:
        NotFound, UsageError: the first path cannot be used, or no picture is named.
    """
    first, others = paths[0], paths[1:]
    if is_bundle(first):
        if not others:
            raise UsageError("no image named: mexit run [BUNDLE] IMAGE...")
        return first, others
    beside = len(first.parts) > 1 and any(path.parent == first.parent and path.is_file() for path in others)
    if (first.is_dir() or first.suffix == ".onnx") and not (beside and found_instead(first, BUNDLE) is None):
        from mexit.flows.run import pictures_in

        pattern = pictures_in(first)
        hint = f"name its pictures, {pattern}, or use mexit camera --source '{pattern}'"
        raise UsageError(found_instead(first, BUNDLE) or f"{first} is a folder, not an image: {hint}")
    if others and not first.exists() and not first.suffix and not beside:
        raise NotFound(
            f"bundle {first} does not exist: a bundle directory or a picture is expected first, and no other bundle "
            "answers in its place"
        )
    return None, paths


def answers_to_json(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return the object that `--json` prints."""
    rows = []
    for answer in answers:
        fields = answer.prediction.to_json() if answer.prediction else {"error": str(answer.error)}
        rows.append({"image": str(answer.image), **fields})
    return {"predictions": rows}


def show_answers(answers: Sequence[Answer]) -> None:
    """Print one line per classified image, its name last because it may be long, then the errors.

    An unsure answer has no class, so its line has no confidence either.
    """
    rows = []
    for answer in answers:
        prediction = answer.prediction
        if prediction is not None:
            saved = prediction.saved_macs / (prediction.macs + prediction.saved_macs)
            rows.append(
                [
                    prediction.label or "-",
                    output.percent(None if prediction.label is None else prediction.confidence),
                    str(prediction.exit),
                    prediction.reason,
                    short_macs(prediction.macs),
                    output.percent(saved),
                    f"{prediction.latency_ms:.2f} ms",
                    answer.image.name,
                ]
            )
    if rows:
        columns = ["label", "confidence", "exit", "reason", "MACs", "saved", "time", "image"]
        droppable = ("saved", "MACs", "time", "reason", "exit")
        dropped = output.aligned(columns, rows, drop=droppable, shorten=("label", "image"))
        if dropped:
            output.RichProgress().note(f"left out at {output.out.width} columns: {', '.join(dropped)}; --json has all")
    if any(answer.prediction is not None and answer.prediction.label is None for answer in answers):
        output.RichProgress().note(
            "unsure: below the threshold of mexit calibrate --max-error, so no class is answered; --json has the "
            "probabilities"
        )
    for answer in answers:
        if answer.error is not None:
            output.error(
                str(answer.error) if str(answer.image) in str(answer.error) else f"{answer.image}: {answer.error}"
            )
