"""The structure that a reader relies on: imports go down, no cycles, short files, a light runtime."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mexit

PACKAGE = Path(mexit.__file__).parent
MAX_LINES = 400

# Each layer and what it may import of mexit besides itself.
BELOW_RUNTIME = {"calibrate", "data", "core", "errors"}
BELOW_FLOWS = {"train", "export", "models", "attacks", "runtime"} | BELOW_RUNTIME
ALLOWED = {
    "errors": set(),
    "core": {"errors"},
    "data": {"core", "errors"},
    "models": {"data", "core", "errors"},
    "attacks": {"models", "data", "core", "errors"},
    "train": {"models", "attacks", "data", "core", "errors"},
    "export": {"models", "attacks", "data", "core", "errors"},
    "calibrate": {"core", "errors"},
    "runtime": BELOW_RUNTIME,
    "serving": {"runtime"} | BELOW_RUNTIME,
    "camera": {"runtime"} | BELOW_RUNTIME,
    "evaluate": BELOW_FLOWS,
    "__init__": {"flows", "evaluate", "runtime", "core", "errors"},
    "flows": {"evaluate", "serving", "camera", "__init__"} | BELOW_FLOWS,
    "commands": {"export", "flows", "evaluate", "camera", "runtime", "core", "errors", "__init__"},
    "cli": {"commands", "core", "errors", "__init__"},
    "__main__": {"cli"},
}
# The one arrow upward: the method `Runtime.camera` imports the camera package when it is called.
EXCEPTIONS = {("runtime.runtime", "camera.pipeline")}
FORBIDDEN_PACKAGES = {
    "core": {"torch", "onnx", "onnxruntime", "PIL", "typer", "rich", "matplotlib", "uvicorn", "av"},
    "data": {"torch", "onnx", "onnxruntime", "typer", "rich", "matplotlib", "uvicorn", "av"},
    "calibrate": {"torch", "onnx", "onnxruntime", "PIL", "typer", "rich", "matplotlib"},
    "runtime": {"torch", "onnx", "typer", "rich", "matplotlib"},
    "serving": {"torch", "onnx", "typer", "rich", "matplotlib"},
    "camera": {"torch", "onnx", "typer", "rich", "matplotlib"},
    "models": {"onnx", "onnxruntime", "typer", "rich", "matplotlib"},
    "attacks": {"onnx", "onnxruntime", "typer", "rich", "matplotlib"},
    "train": {"onnx", "onnxruntime", "typer", "rich", "matplotlib"},
    "flows": {"typer", "rich"},
}


def modules() -> dict[str, Path]:
    """Every module by its name below `mexit`, such as `core.bundle`."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
        if parts[-1] == "__init__" and len(parts) > 1:
            parts.pop()
        found[".".join(parts)] = path
    return found


MODULES = modules()


def imports(path: Path) -> Iterator[str]:
    """Full names of what a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full.removeprefix("mexit.") in MODULES else str(node.module)


def mexit_imports(name: str) -> set[str]:
    """The modules of mexit that a module imports."""
    found = set()
    for full in imports(MODULES[name]):
        if full == "mexit":
            found.add("__init__")
        elif full.startswith("mexit."):
            found.add(full.removeprefix("mexit."))
    return found - {name}


def test_imports_go_down() -> None:
    upward = []
    for name in MODULES:
        layer = name.partition(".")[0]
        for target in mexit_imports(name):
            below = any(target == allowed or target.startswith(f"{allowed}.") for allowed in ALLOWED[layer])
            if not (below or target.partition(".")[0] == layer or (name, target) in EXCEPTIONS):
                upward.append(f"mexit.{name} imports mexit.{target}")
    assert not upward, "\n".join(upward)


def test_no_layer_imports_a_package_it_must_do_without() -> None:
    heavy = {}
    for name, path in MODULES.items():
        forbidden = FORBIDDEN_PACKAGES.get(name.partition(".")[0], set())
        if used := {full.partition(".")[0] for full in imports(path)} & forbidden:
            heavy[name] = used
    assert not heavy


def test_no_import_cycles() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for target in sorted(mexit_imports(name)):
                if (name, target) in EXCEPTIONS:
                    continue
                visit(target, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


def test_files_are_short_and_say_what_they_are() -> None:
    texts = {name: path.read_text() for name, path in MODULES.items()}
    assert not [name for name, text in texts.items() if text.count("\n") > MAX_LINES]
    assert not [name for name, text in texts.items() if not ast.get_docstring(ast.parse(text))]


def test_nothing_calls_print() -> None:
    for name, path in MODULES.items():
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert not any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls), name


@pytest.mark.parametrize(
    "statement",
    [
        "import mexit",
        "import mexit.runtime",
        "import mexit.calibrate.frontier",
        "import mexit.serving.http",
        "import mexit.camera.pipeline",
        "import mexit.cli",
        "import mexit; mexit.Runtime.open({bundle!r})",
    ],
    ids=["mexit", "runtime", "calibrate", "server", "camera", "cli", "open a bundle"],
)
def test_the_runtime_is_light(statement, digits_bundle) -> None:
    code = statement.format(bundle=str(digits_bundle)) + (
        "; import sys; heavy = {'torch', 'onnx', 'matplotlib', 'onnxscript', 'safetensors'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
