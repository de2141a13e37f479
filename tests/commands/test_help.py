"""`--help`: options in panels, the basic ones first, short, and in words that are explained."""

from __future__ import annotations

import re

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from mexit.cli import COMMANDS, app
from mexit.commands.help_panels import BASIC, PANELS

GROUP = get_command(app)
NAMES = [command.__name__ for command in COMMANDS]
MANY = 12  # options of a command that needs panels
MAX_LINES = 150  # of `mexit train --help`, which has the most options


def shown(*line: str) -> list[str]:
    """The lines of a help text on a terminal of 80 columns."""
    environment = {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb", "MEXIT_DATA": ""}
    done = CliRunner().invoke(app, [*line, "--help"], prog_name="mexit", env=environment)
    assert done.exit_code == 0
    return [text.rstrip() for text in done.stdout.splitlines()]


def options(command: str) -> set[str | None]:
    return {parameter.name for parameter in GROUP.commands[command].params if parameter.param_type_name == "option"}


def test_every_command_with_many_options_has_panels() -> None:
    assert {name for name in NAMES if len(options(name)) > MANY} <= set(PANELS) <= set(NAMES)


@pytest.mark.parametrize("command", PANELS)
def test_every_option_is_in_one_panel(command: str) -> None:
    names = [name for panel in PANELS[command].values() for name in panel.split()]
    assert sorted(names) == sorted(map(str, options(command))), "add the option to mexit/commands/help_panels.py"


@pytest.mark.parametrize("command", PANELS)
def test_panels_and_options_come_in_their_order(command: str) -> None:
    lines = shown(command)
    titles = [found[1] for line in lines if (found := re.match(r"╭─ (.*?) ─+╮", line))]
    assert [title for title in titles if title != "Arguments"] == list(PANELS[command])
    flags = [found[1] for line in lines if (found := re.match(r"│ \*? *(--[\w-]+) ", line)) and found[1] != "--help"]
    parameters = {parameter.name: parameter.opts[0] for parameter in GROUP.commands[command].params}
    assert flags == [parameters[name] for panel in PANELS[command].values() for name in panel.split()]


def test_the_help_of_train_is_short_and_begins_with_the_data() -> None:
    lines = shown("train")
    assert len(lines) < MAX_LINES
    assert max(map(len, lines)) <= 80
    assert lines[lines.index(next(line for line in lines if BASIC in line and "╭" in line)) + 1].startswith("│ --data ")


@pytest.mark.parametrize("command", [None, *NAMES])
def test_the_words_of_help_texts_are_explained(command: str | None) -> None:
    text = " ".join(shown(*([command] if command else [])))
    assert ("MACs" not in text) or "multiply-adds" in text
    assert ("ONNX segments" not in text) or "layers between exits" in " ".join(text.replace("│", " ").split())
