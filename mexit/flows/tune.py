"""`mexit bench --tune`, and the end of `mexit export`: time the engines of this device and keep the result."""

from __future__ import annotations

from pathlib import Path

from mexit.core.artifact_paths import BUNDLES, newest
from mexit.core.bundle import Bundle
from mexit.core.progress import Progress, Silent
from mexit.runtime import autotune

SECONDS = 1.0


def tune(
    bundle: Path | None = None,
    *,
    seconds: float = SECONDS,
    builds: bool = True,
    progress: Progress | None = None,
) -> autotune.Explanation:
    """Time every engine that opens here with several numbers of threads; `--backend auto` goes by it from now on.

    Args:
        bundle: a directory; default the newest bundle.
        seconds: of timing, all engines together.
        builds: also time engines that are built for the device when they are first opened, which can take minutes.
        progress: who listens.

    Raises:
        NotFound, Damaged: no such bundle, or not what was written.
        MexitError: the result cannot be kept; see `runtime.latency_profile.keep_fact`.
    """
    progress = progress or Silent()
    opened = Bundle.open(bundle or newest(BUNDLES, progress))
    autotune.save(opened, autotune.measure(opened, seconds, builds=builds))
    explanation = autotune.explain(opened)
    choice = explanation.choice
    progress.note(f"on this device {choice.backend} with {choice.threads} thread(s) serves {opened.path}")
    return explanation
