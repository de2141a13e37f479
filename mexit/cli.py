"""The command line: `mexit COMMAND`. Commands parse, call a flow and print; nothing is decided here.

Settings: flag, else `MEXIT_*` variable, else default. A user's mistake is one line on standard error and the
exit code of its error class, never a traceback.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads collapse under any other load

import typer

from mexit import __version__
from mexit.commands import answering, bundles, doctor, output, train, training
from mexit.commands.options import handled

COMMANDS = (
    training.demo,
    train.train,
    training.evaluate,
    bundles.export,
    bundles.calibrate,
    answering.run,
    answering.serve,
    answering.camera,
    bundles.bench,
    bundles.inspect,
    training.models,
    doctor.doctor,
)

app = typer.Typer(
    name="mexit",
    help="Multi-exit networks: train against attacks, export per exit, calibrate to a budget, serve.\n\n"
    "Start with [bold]mexit demo[/]. Then: train, export, calibrate, serve, in that order, as typed.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)
for command in COMMANDS:
    app.command()(handled(command))


def main() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a sign or file name that the terminal cannot show is no error
            stream.reconfigure(errors="backslashreplace")
    app()


def _version(wanted: bool) -> None:
    if wanted:
        output.say(f"mexit {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version
