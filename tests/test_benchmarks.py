"""Every benchmark program can be imported, and the names that it imports inside functions exist too.

Answers of a benchmark grow batch by batch, and the recipes for MNIST are valid settings.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mexit.models import model_spec
from mexit.train.config import resolve

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PROGRAMS = sorted(path.stem for path in BENCHMARKS.glob("*.py"))


@pytest.mark.parametrize("program", PROGRAMS)
def test_imports(program: str, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    importlib.import_module(program)
    for node in from_imports(ast.parse((BENCHMARKS / f"{program}.py").read_text())):
        exec(compile(ast.Module([node], []), program, "exec"), {})


def test_answers_are_stored_batch_by_batch(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    answers = importlib.import_module("stored_answers").Answers(tmp_path / "run-0.npz")
    correct = np.random.default_rng(0).random((3, 21)) < 0.5
    assert answers.count("clean") == 0
    for part in (slice(0, 9), slice(9, 10), slice(10, 21)):
        answers.extend({"clean": correct[:, part], "attacked": ~correct[:1, part]})
        assert answers.count("clean") == answers.count("attacked") == part.stop
    np.testing.assert_array_equal(answers.get("clean"), correct)
    np.testing.assert_array_equal(answers.get("attacked"), ~correct[:1])
    answers.add_note("trained on", "a processor")
    assert answers.note("trained on") == "a processor"
    assert answers.note("evaluated on") == ""


def test_every_recipe_for_mnist_has_valid_settings(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    recipes, methods = (importlib.import_module(name) for name in ("mnist_recipes", "mnist_methods"))
    small = model_spec("small-cnn")
    for trial in recipes.TRIALS.values():
        settings = resolve("mnist", "neo_kd", trial.settings)
        assert model_spec(settings.model).exits == small.exits
        assert settings.eps == recipes.EPS
        assert not settings.exit_weights or len(settings.exit_weights) == small.exits
    for name in ("adversarial", "neo-kd", *methods.MNIST.recipes):
        assert resolve("mnist", methods.MNIST.preset, methods.MNIST.settings(name, 1)).seed == 1


def from_imports(tree: ast.AST) -> Iterator[ast.ImportFrom]:
    """Every `from ... import`, except in handlers of `ImportError`, which name modules of other versions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ImportFrom) and node.module != "__future__":
            yield node
        elif not isinstance(node, ast.ExceptHandler):
            yield from from_imports(node)
