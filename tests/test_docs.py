"""The documentation agrees with the code: commands, options, names, errors and examples.

`python tests/test_docs.py` regenerates docs/cli.md and docs/methods.md.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from method_page import method_page
from typer.main import get_command
from typer.testing import CliRunner

import mexit
from mexit import errors
from mexit.cli import COMMANDS, app
from mexit.core.glossary import GLOSSARY

ROOT = Path(__file__).parents[1]
CLI_PAGE, METHOD_PAGE = ROOT / "docs" / "cli.md", ROOT / "docs" / "methods.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def command_page() -> str:
    """Return the content of docs/cli.md."""
    parts = ["# Commands\n\nWritten by `python tests/test_docs.py` from `mexit COMMAND --help`.\n"]
    for name in [None, *(command.__name__ for command in COMMANDS)]:
        shown = CliRunner().invoke(
            app,
            [*([name] if name else []), "--help"],
            prog_name="mexit",
            env={"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb", "MEXIT_DATA": ""},
        )
        text = "\n".join(line.rstrip() for line in shown.stdout.strip().splitlines())
        parts.append(f"## mexit{' ' + name if name else ''}\n\n```\n{text}\n```\n")
    return "\n".join(parts)


def shell_lines(page: Path) -> list[str]:
    """Return the lines of shell blocks that call mexit."""
    blocks = re.findall(r"```(?:sh|bash|)\n(.*?)```", page.read_text(), re.S)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line.removeprefix(".venv/bin/") for line in lines if line.removeprefix(".venv/bin/").startswith("mexit ")]


def test_generated_pages_are_current() -> None:
    assert CLI_PAGE.read_text() == command_page(), "run: python tests/test_docs.py"
    assert METHOD_PAGE.read_text() == method_page(), "run: python tests/test_docs.py"


def test_the_glossary_of_the_docs_is_that_of_the_reports() -> None:
    table = (ROOT / "docs" / "concepts.md").read_text().split("## Glossary")[1]
    assert dict(re.findall(r"^\| (?!word|---)(.*?) \| (.*?) \|$", table, re.M)) == GLOSSARY


def test_every_option_of_a_method_has_a_description() -> None:
    assert not re.findall(r"^\| `\w+` \| .* \|  \|$", method_page(), re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_in_the_docs_exist(page) -> None:
    group = get_command(app)
    if page == CLI_PAGE:
        return
    for line in shell_lines(page):
        words = line.split()
        assert words[1].startswith("-") or words[1] in group.commands, line
        if words[1] in group.commands:
            known = {option for parameter in group.commands[words[1]].params for option in parameter.opts} | {"--help"}
            for word in words[2:]:
                assert not word.startswith("--") or word.partition("=")[0] in known, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_have_a_target(page) -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_order_of_colour_channels_is_named_beside_every_shape(page) -> None:
    for paragraph in re.split(r"\n\s*\n", page.read_text()):
        if re.search(r"\(H, W, 3\)|C, H, W[\])]", paragraph):
            assert "RGB" in paragraph, paragraph


def test_readme_python_runs(digits_bundle, workspace, tmp_path, test_digits) -> None:
    from PIL import Image

    shutil.copytree(digits_bundle, tmp_path / "bundles" / "demo")
    picture = tmp_path / "runs" / "demo" / "samples" / "1-shows-1.png"
    picture.parent.mkdir(parents=True)
    Image.fromarray(test_digits[0][0]).save(picture)
    run_python_blocks(ROOT / "README.md", tmp_path)


def run_python_blocks(page: Path, folder: Path) -> None:
    """Run the Python blocks of a page in order, each with names of its own, in one process, in `folder`."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    assert blocks
    code = "\n".join(f"exec(compile({block!r}, 'block {i}', 'exec'), {{}})" for i, block in enumerate(blocks, start=1))
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_python_api_page_runs(tmp_path) -> None:
    run_python_blocks(ROOT / "docs" / "python-api.md", tmp_path)


def test_python_api_page_names_every_public_name() -> None:
    page = (ROOT / "docs" / "python-api.md").read_text()
    error_classes = {name for name in mexit.__all__ if hasattr(errors, name)}
    assert [name for name in mexit.__all__ if name not in error_classes and not re.search(rf"\b{name}\b", page)] == []


def test_error_page_shows_every_class() -> None:
    page = (ROOT / "docs" / "errors.md").read_text()
    for name, kind in vars(errors).items():
        if isinstance(kind, type) and issubclass(kind, errors.MexitError):
            assert re.search(rf"^ *{name}\b", page, re.M), name
            assert name in mexit.__all__, name
    for line in (errors.__doc__ or "").splitlines():
        if re.search(r"\d{3}", line):
            assert line.strip() in page


def test_error_codes_in_the_module_docstring_are_those_of_the_classes() -> None:
    for name, exit_code, status in re.findall(r"^ +(\w+) +(\d)? +(\d{3})", errors.__doc__ or "", re.M):
        kind = getattr(errors, name)
        assert kind.http_status == int(status), name
        if exit_code:
            assert kind.exit_code == int(exit_code), name


def test_public_names_are_sorted_and_have_docstrings() -> None:
    assert mexit.__all__ == sorted(mexit.__all__)
    assert all(getattr(mexit, name).__doc__ for name in mexit.__all__)


def test_version_is_the_same_everywhere() -> None:
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert version is not None
    assert version[1] == mexit.__version__
    assert f"## {mexit.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_examples_run(digits_bundle, workspace, tmp_path, test_digits) -> None:
    from PIL import Image

    Image.fromarray(test_digits[0][0]).save(tmp_path / "digit.png")
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "02_predict.py", digits_bundle, tmp_path / "digit.png"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "1 answers" in done.stdout


if __name__ == "__main__":
    os.environ.pop("MEXIT_DATA", None)
    CLI_PAGE.write_text(command_page())
    METHOD_PAGE.write_text(method_page())
