"""Teacher networks: loading the runs named by `--teacher`, and the runs that AT-AKA trains as its own teachers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mexit.errors import UsageError
from mexit.models import MultiExit
from mexit.train import checkpoint
from mexit.train.config import TrainSettings
from mexit.train.methods import METHODS, build_method, method_class
from mexit.train.methods.at_aka import AtAka
from mexit.train.precision import Precision


def load_teachers(settings: TrainSettings, classes: tuple[str, ...], precision: Precision) -> tuple[MultiExit, ...]:
    """Load the networks of `settings.teachers`, frozen and in eval mode.

    Args:
        settings: settings of the student.
        classes: names of the student's classes.
        precision: device and memory format of the result.

    Raises:
        UsageError: the method takes no teachers, or a teacher has another input shape or number of classes.
        NotFound, Damaged: a run cannot be loaded, see `checkpoint.load_model`.
    """
    if settings.teachers and not method_class(settings.method).uses_teachers:
        able = ", ".join(name for name, method in METHODS.items() if method.uses_teachers)
        raise UsageError(f"method {settings.method} takes no --teacher; methods that do: {able}")
    teachers = []
    expected = settings.model_spec().input_shape
    for path in settings.teachers:
        teacher, teacher_settings, _ = checkpoint.load_model(Path(path))
        if teacher.classes != len(classes) or teacher.input_shape != expected:
            raise UsageError(
                f"teacher {path} ({teacher_settings.model}) has {teacher.classes} classes and images "
                f"{teacher.input_shape}, {settings.model} here needs {len(classes)} and {expected}"
            )
        teachers.append(precision.prepare(teacher).eval().requires_grad_(False))
    return tuple(teachers)


def own_teachers(run: Path, settings: TrainSettings) -> dict[Path, TrainSettings]:
    """The teacher runs that must be finished before a run of `at-aka` without `--teacher` can start.

    Teacher m is trained on particle m. It has the run's backbone with one exit and the run's schedule. Its seed is
    the run's seed plus m, because teachers with equal initial weights would become equal.

    Args:
        run: directory of the student's run; the teachers are directories inside it.
        settings: settings of the student.

    Returns:
        Directory and settings of each teacher; empty for other methods and for runs with teachers.

    Raises:
        UsageError: the settings are invalid for the student itself.
    """
    method = build_method(settings.method, settings.options)
    if settings.teachers or not isinstance(method, AtAka):
        return {}
    model = settings.model if settings.model.endswith("-single") else f"{settings.model}-single"
    return {
        run / f"teacher-{m}": replace(
            settings,
            model=model,
            method="at-aka-teacher",
            options={"particle": m, "particles": method.own_teachers, "repulsion_weight": method.repulsion_weight},
            seed=settings.seed + m,
            exit_weights=(),
        )
        for m in range(1, method.own_teachers + 1)
    }
