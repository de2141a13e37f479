"""What flags mean: the option types that commands share, values as people write them, and stopping by signal."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer

from mexit.commands import output
from mexit.errors import MexitError, UsageError

P = ParamSpec("P")

Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on standard output.")]
BundleArg = Annotated[
    Path | None, typer.Argument(help="A bundle directory. [dim]Default: the newest.[/]", show_default=False)
]
SourceArg = Annotated[
    Path | None,
    typer.Argument(help="A run or a bundle directory. [dim]Default: the newest.[/]", show_default=False),
]
DataDir = Annotated[
    Path | None,
    typer.Option(envvar="MEXIT_DATA", help="Folder of downloaded data sets.", show_default=False),
]
BudgetOption = Annotated[
    str,
    typer.Option(
        envvar="MEXIT_BUDGET",
        help="Expected cost: low, medium, high, full, MACs (12M), or a share of the full cost (40%).",
    ),
]
Backend = Annotated[
    str, typer.Option(envvar="MEXIT_BACKEND", help="Engine: auto, ort, openvino, trt, or one such as ort:int8.")
]
Threads = Annotated[
    int | None,
    typer.Option(
        envvar="MEXIT_THREADS",
        help="Threads of the engine. [dim]Default: as timed on this device, else 1.[/]",
        show_default=False,
    ),
]
Deadline = Annotated[
    float | None,
    typer.Option(help="Milliseconds after which the deepest exit computed so far answers.", show_default=False),
]


def handled(command: Callable[P, None]) -> Callable[P, None]:
    """Turn errors of the tree into one line and their exit code."""

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
        except BrokenPipeError:
            raise typer.Exit(0) from None

    return wrapper


class StopOnSignal:
    """Ctrl-C and SIGTERM ask for a stop at the next step; the second one is no longer caught."""

    def __init__(self) -> None:
        self.exit_code = 0
        self._before: dict[int, Any] = {}

    def asked(self) -> bool:
        """Whether a signal came."""
        return self.exit_code != 0

    def __enter__(self) -> StopOnSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        self.exit_code = 128 + number
        output.err.print("stopping after this step, with a checkpoint ...", style="dim")
        self.__exit__()


def fraction(text: str | None) -> float | None:
    """`0.3` or `8/255` as a number."""
    if text is None:
        return None
    try:
        above, _, below = text.partition("/")
        return float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        raise UsageError(f"'{text}' is no fraction: write 0.3 or 8/255") from None


def pairs(texts: list[str], flag: str) -> dict[str, str]:
    """`NAME=VALUE` texts as a dictionary."""
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise UsageError(f"{flag} takes NAME=VALUE, found '{text}'")
        found[name] = value
    return found


def method_options(texts: list[str]) -> dict[str, Any]:
    """`--set` texts: numbers, true/false, comma-separated numbers, else words."""
    return {name: _value(value) for name, value in pairs(texts, "--set").items()}


def _value(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        return text
    return numbers if "," in text else numbers[0]
