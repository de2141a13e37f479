"""Run the `mexit` command in this process or in a subprocess."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from mexit.cli import app

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
MEXIT = (sys.executable, "-m", "mexit")


def typed(*arguments: object) -> Any:
    """Run a command in this process. Any exception but an exit fails the test with its traceback."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert "Traceback" not in result.output
    return result


def refused(*arguments: object, code: int) -> str:
    """Run a command that must fail with this exit code; return its standard error as one line."""
    result = typed(*arguments)
    said = " ".join(result.stderr.split())
    assert result.exit_code == code, said or result.output
    assert said
    return said


def program(*arguments: object, before: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command in a subprocess, after the Python lines of `before`."""
    start = (sys.executable, "-c", f"{before}\nfrom mexit.cli import main\nmain()") if before else MEXIT
    command = [*start, *(str(argument) for argument in arguments)]
    options = {"cwd": Path.cwd(), "timeout": 120, "env": quiet(), **options}
    result = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert "Traceback" not in result.stderr, result.stderr
    return result


def on_terminal(*arguments: object, columns: int = 80, **options: Any) -> tuple[int, list[str]]:
    """Run the command in a subprocess on a terminal; return its exit code and its lines without escape codes.

    `options` of `subprocess.Popen` replace the terminal, such as `stdout`.
    """
    main, side = pty.openpty()
    environment = quiet() | {"COLUMNS": str(columns), "LINES": "24", "TERM": "xterm"}
    command, streams = [*MEXIT, *map(str, arguments)], {"stdout": side, "stderr": side, **options}
    with subprocess.Popen(command, env=environment, **streams) as process:
        os.close(side)
        written = b""
        while True:
            try:
                written += os.read(main, 65536)
            except OSError:  # how Linux reports the end of a terminal
                break
    os.close(main)
    return process.returncode, re.split(r"[\r\n]+", ESCAPES.sub("", written.decode()))


def quiet() -> dict[str, str]:
    """An environment without colours and line wraps, with one thread."""
    return {**os.environ, "NO_COLOR": "1", "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
