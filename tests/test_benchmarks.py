"""Every benchmark program can be imported, and the names that it imports inside functions exist too."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PROGRAMS = sorted(path.stem for path in BENCHMARKS.glob("*.py"))


@pytest.mark.parametrize("program", PROGRAMS)
def test_imports(program: str, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    importlib.import_module(program)
    for node in from_imports(ast.parse((BENCHMARKS / f"{program}.py").read_text())):
        exec(compile(ast.Module([node], []), program, "exec"), {})


def from_imports(tree: ast.AST) -> Iterator[ast.ImportFrom]:
    """Every `from ... import`, except in handlers of `ImportError`, which name modules of other versions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ImportFrom) and node.module != "__future__":
            yield node
        elif not isinstance(node, ast.ExceptHandler):
            yield from from_imports(node)
