"""`mexit run`: answer image files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mexit.core.artifact_paths import BUNDLES, newest
from mexit.core.budget import Macs
from mexit.core.progress import Progress, Silent
from mexit.data.preprocess import read_image
from mexit.errors import MexitError
from mexit.runtime import Prediction, Runtime


@dataclass(frozen=True)
class Answer:
    """One file: its prediction, or why there is none."""

    image: Path
    prediction: Prediction | None
    error: MexitError | None


def classify_files(
    images: Sequence[Path],
    *,
    bundle: Path | None = None,
    budget: str = "low",
    backend: str = "auto",
    threads: int | None = None,
    deadline_ms: float | None = None,
    rate: Macs | None = None,
    burst: Macs | None = None,
    progress: Progress | None = None,
) -> list[Answer]:
    """Answer each file; a file that is no image does not keep the others from being answered.

    With a rate (see `Runtime.open`), an image waits until there are tokens for it, to its deadline if it has one.
    """
    path = bundle or newest(BUNDLES, progress or Silent())
    runtime = Runtime.open(path, budget, backend=backend, threads=threads, rate=rate, burst=burst)
    answers = []
    for image in images:
        try:
            answers.append(Answer(image, runtime(read_image(image), deadline_ms=deadline_ms)[0], None))
        except MexitError as error:
            answers.append(Answer(image, None, error))
    return answers
