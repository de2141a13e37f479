"""`mexit run`: classify image files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mexit.core.artifact_paths import BUNDLES, is_bundle, newest
from mexit.core.budget import Macs
from mexit.core.printable import shell_path
from mexit.core.progress import Progress, Silent
from mexit.data.image_formats import SUFFIXES
from mexit.data.preprocess import read_image
from mexit.errors import MexitError, NotFound, UsageError
from mexit.runtime import Prediction, Runtime
from mexit.runtime.time_policies import note_timing


@dataclass(frozen=True)
class Answer:
    """The result for one image file.

    Attributes:
        image: path of the file.
        prediction: None if there is an error.
        error: the reason why there is no prediction.
    """

    image: Path
    prediction: Prediction | None
    error: MexitError | None


def classify_files(
    images: Sequence[Path],
    *,
    bundle: Path | None = None,
    budget: str = "low",
    cost: str = "macs",
    profile: Path | None = None,
    backend: str = "auto",
    threads: int | None = None,
    deadline_ms: float | None = None,
    rate: Macs | None = None,
    burst: Macs | None = None,
    progress: Progress | None = None,
) -> list[Answer]:
    """Classify each file. A file that cannot be read gives an answer with an error.

    Args:
        images: paths of the image files.
        bundle: a bundle directory; default the newest.
        budget: mean cost per image, such as "low", "12M" or "40%".
        cost, profile: unit of the budgets, and file of times, as in `Runtime.open`.
        backend: name of the engine, or "auto".
        threads: threads of the engine; default the fastest measured number, else 1.
        deadline_ms: milliseconds per image, after which the deepest exit computed so far answers.
        rate: limit in MACs per second; an image waits for it until its deadline.
        burst: MACs that can be saved up for `rate`; default one second, at least one full image.
        progress: receives the name of the default bundle, and one line about times that were measured.

    Raises:
        MexitError: the bundle or the engine cannot be opened.
    """
    progress = progress or Silent()
    path = bundle or newest(BUNDLES, progress)
    runtime = Runtime.open(
        path, budget, backend=backend, threads=threads, rate=rate, burst=burst, cost=cost, profile=profile
    )
    note_timing(runtime.timing, runtime.why_not_time, progress.note)
    answers = []
    for image in images:
        try:
            _check(image)
            (prediction,) = runtime(read_image(image), deadline_ms=deadline_ms)
            answers.append(Answer(image, prediction, None))
        except MexitError as error:
            answers.append(Answer(image, None, error))
    return answers


def _check(image: Path) -> None:
    """Raise `NotFound` or `UsageError` for a path that is no file."""
    if not image.exists():
        raise NotFound(f"image {image} does not exist: the path of a picture is expected")
    if is_bundle(image):
        raise UsageError(f"{image} is a bundle, a picture is expected: name the bundle before the pictures")
    if image.is_dir():
        raise UsageError(f"{image} is a folder, a picture is expected: name its pictures, {pictures_in(image)}")


def pictures_in(folder: Path) -> str:
    """A shell pattern for pictures of a folder, or of a folder below it where it has none itself."""
    found = next((path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES), folder / "*")
    has_own = any(path.suffix.lower() in SUFFIXES for path in folder.glob("*"))
    return f"{shell_path(folder if has_own else found.parent)}/*"
