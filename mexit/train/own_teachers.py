"""The teachers that `at-aka` makes for itself where no `--teacher` is named: runs inside the run, done first.

Teacher m learns on particle m, has the backbone of the run with one exit, and the run's schedule; its seed is the
run's plus m, since teachers that start alike would end alike.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mexit.train.config import TrainSettings
from mexit.train.methods import build_method
from mexit.train.methods.at_aka import AtAka


def own_teachers(run: Path, settings: TrainSettings) -> dict[Path, TrainSettings]:
    """The runs that have to be finished before `run` can begin; none where it has teachers or needs none.

    Raises:
        UsageError: settings with which the run could not begin afterwards.
    """
    objective = build_method(settings.method, settings.options)
    if settings.teachers or not isinstance(objective, AtAka):
        return {}
    return {run / f"teacher-{m}": _teacher(settings, objective, m) for m in range(1, objective.own_teachers + 1)}


def _teacher(settings: TrainSettings, student: AtAka, m: int) -> TrainSettings:
    options = {
        "particle": m,
        "particles": student.own_teachers,
        "repulsion_weight": student.repulsion_weight,
    }
    return replace(
        settings,
        model=settings.model if settings.model.endswith("-single") else f"{settings.model}-single",
        method="at-aka-teacher",
        options=options,
        seed=settings.seed + m,
    )
