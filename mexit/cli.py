"""The command line `mexit COMMAND`.

An option is set by its flag, else its `MEXIT_*` variable, else its default. An error of `mexit.errors` becomes
one line on standard error and the exit code of its class.
"""

from __future__ import annotations

import functools
import io
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, ParamSpec

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads collapse under any other load

import typer
from typer.core import TyperCommand, TyperGroup

from mexit import __version__
from mexit.commands import (
    bench,
    calibrate,
    camera,
    data,
    demo,
    doctor,
    evaluate,
    export,
    inspect,
    models,
    output,
    run,
    serve,
    train,
)
from mexit.commands.help_panels import arrange
from mexit.core.environment import unknown_variables
from mexit.core.redact import redact_text
from mexit.errors import MexitError

P = ParamSpec("P")
COMMANDS = (
    demo.demo,
    data.data,
    train.train,
    evaluate.evaluate,
    export.export,
    calibrate.calibrate,
    run.run,
    serve.serve,
    camera.camera,
    bench.bench,
    inspect.inspect,
    models.models,
    doctor.doctor,
)


def main() -> None:
    """Run the console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names that the terminal cannot encode are shown escaped
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            app()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:
        sys.exit(output.system_error(error))


def exit_on_error(command: Callable[P, None]) -> Callable[P, None]:
    """Wrap a command so that errors print one line and exit with their code."""

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except MexitError as error:
            output.error(str(error))
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            output.error("stopped")
            raise typer.Exit(130) from None
        except OSError as error:
            raise typer.Exit(output.system_error(error)) from None

    return wrapper


class Command(TyperCommand):
    """A command whose help has panels, and that rejects an option which is given twice but holds one value."""

    def __init__(self, name: str | None, **options: Any) -> None:
        super().__init__(name, **options)
        self.params = arrange(name, self.params)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments. Raises the usage error of typer."""
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        for option, count in Counter(given).items():
            if count > 1 and not getattr(option, "multiple", True) and not option.is_eager:
                ctx.fail(f"Option '{option.opts[0]}' is given {count} times; it takes one value.")
        return super().parse_args(ctx, args)


class Commands(TyperGroup):
    """The group of all commands. Its usage errors show arguments without the passwords of addresses in them."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        """Parse what precedes the command. Raises the usage error of typer."""
        with _hidden_passwords():
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        """Find, parse and run the command. Raises the usage error of typer."""
        with _hidden_passwords():
            return super().invoke(ctx)


@contextmanager
def _hidden_passwords() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        message = getattr(error, "message", None)  # of the usage errors of every version of typer and click
        if isinstance(message, str) and hasattr(error, "format_message"):
            error.message = redact_text(message)  # type: ignore[attr-defined]
        raise


app = typer.Typer(
    name="mexit",
    cls=Commands,
    help="Multi-exit networks: robust training, export, calibration to a budget, early-exit inference.\n\n"
    "Start with [bold]mexit demo[/]. With your own data, run [bold]train[/], [bold]export[/], "
    "[bold]calibrate[/] and [bold]serve[/] in this order.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)
for command in COMMANDS:
    app.command(cls=Command)(exit_on_error(command))


def _version(wanted: bool) -> None:
    if wanted:
        output.say(f"mexit {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    del version
    for name, near in unknown_variables(os.environ).items():
        if near is not None:
            output.warning(f"{name} is set, but mexit does not read it: did you mean {near}?")
