"""Networks that teach: finished runs, frozen, in eval mode."""

from __future__ import annotations

from pathlib import Path

from mexit.errors import UsageError
from mexit.models import MultiExit, model_spec
from mexit.train import checkpoint
from mexit.train.config import TrainSettings
from mexit.train.methods import METHODS, method_class
from mexit.train.precision import Precision


def load_teachers(settings: TrainSettings, classes: tuple[str, ...], recipe: Precision) -> tuple[MultiExit, ...]:
    """The networks named by `settings.teachers`.

    Raises:
        UsageError: the method takes no teachers, or one is of other images or of another number of classes.
        NotFound, Damaged: see `checkpoint.load_model`.
    """
    if settings.teachers and not method_class(settings.method).uses_teachers:
        able = ", ".join(name for name, method in METHODS.items() if method.uses_teachers)
        raise UsageError(f"method {settings.method} takes no --teacher; methods that do: {able}")
    teachers = []
    expected = model_spec(settings.model).input_shape
    for path in settings.teachers:
        teacher, its_settings, _ = checkpoint.load_model(Path(path))
        if teacher.classes != len(classes) or teacher.input_shape != expected:
            raise UsageError(
                f"teacher {path} ({its_settings.model}) knows {teacher.classes} classes of images "
                f"{teacher.input_shape}, {settings.model} here needs {len(classes)} of {expected}"
            )
        teachers.append(recipe.place(teacher).eval().requires_grad_(False))
    return tuple(teachers)
