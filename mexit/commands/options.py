"""Option types that several commands share, and parsers of option values.

A command imports its flow when it runs, so that every command and `--help` start fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mexit.errors import UsageError

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
BundleArg = Annotated[
    Path | None, typer.Argument(help="A bundle directory. [dim]Default: the newest.[/]", show_default=False)
]
SourceArg = Annotated[
    Path | None,
    typer.Argument(help="A run or bundle directory. [dim]Default: the newest.[/]", show_default=False),
]
DataDir = Annotated[
    Path | None,
    typer.Option(envvar="MEXIT_DATA", help="Folder that holds the downloaded data sets.", show_default=False),
]
BudgetOption = Annotated[
    str,
    typer.Option(
        envvar="MEXIT_BUDGET",
        help="Mean cost per image: low, medium, high, full, MACs (12M multiply-adds), a share of the static network, "
        "which has no early exits (40%), or time (5ms).",
    ),
]
CostOption = Annotated[
    str,
    typer.Option(
        "--cost",
        envvar="MEXIT_COST",
        help="Unit in which budgets are selected: time, measured on this device at the first start, or macs.",
    ),
]
ProfileOption = Annotated[
    Path | None,
    typer.Option(
        "--profile",
        envvar="MEXIT_PROFILE",
        help="File of the times to select with, such as one of the device cache. [dim]Default: this device's.[/]",
        show_default=False,
    ),
]
Backend = Annotated[
    str,
    typer.Option(
        envvar="MEXIT_BACKEND", help="Engine: auto, ort, openvino, trt, or one with a precision such as ort:int8."
    ),
]
Device = Annotated[str, typer.Option(envvar="MEXIT_DEVICE", help="Device that torch computes on: auto, cpu or cuda.")]
Threads = Annotated[
    int | None,
    typer.Option(
        envvar="MEXIT_THREADS",
        help="Threads of the engine. [dim]Default: the fastest number measured on this device, else 1.[/]",
        show_default=False,
    ),
]
AttackOption = Annotated[
    str | None,
    typer.Option(
        help="Attack under which policies are measured too: single, average, max-average or none. "
        "[dim]Default: none for a run that was trained on clean images, else average.[/]",
        show_default=False,
    ),
]
Deadline = Annotated[
    float | None,
    typer.Option(
        help="Milliseconds per image, after which the deepest exit computed so far answers.", show_default=False
    ),
]
Rate = Annotated[
    str | None,
    typer.Option(help="Hard limit on computation, in MACs (multiply-adds) per second (40M, 1.5G).", show_default=False),
]
Burst = Annotated[
    str | None,
    typer.Option(
        help="MACs that can be saved up for --rate. [dim]Default: one second of --rate, at least one full image.[/]",
        show_default=False,
    ),
]


def given_options(context: typer.Context) -> dict[str, str]:
    """The options and arguments on the command line: name of the parameter to the option, such as `--out`."""
    return {
        name: parameter.opts[0]
        for parameter in context.command.params
        if (name := parameter.name) is not None
        and getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }


def fraction(text: str | None) -> float | None:
    """Parse a number such as `0.3` or `8/255`. Raises `UsageError`."""
    if text is None:
        return None
    numerator, _, denominator = text.partition("/")
    try:
        return float(numerator) / float(denominator or 1)
    except (ValueError, ZeroDivisionError):
        raise UsageError(f"'{text}' is not a number or a fraction: write 0.3 or 8/255") from None


def numbers(text: str | None, flag: str) -> tuple[float, ...] | None:
    """Parse numbers separated by commas. Raises `UsageError`."""
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{flag} expects numbers separated by commas, such as 2,1,1, not '{text}'") from None


def image_size(text: str | None) -> tuple[int, int] | None:
    """Parse `64` or `48x96` into height and width in pixels. Raises `UsageError`."""
    if text is None:
        return None
    sides = text.lower().replace("×", "x").split("x")
    if len(sides) > 2 or not all(side.strip().isascii() and side.strip().isdigit() and int(side) for side in sides):
        raise UsageError(f"--size expects pixels, such as 64 or 48x96 (height x width), not '{text}'")
    return int(sides[0]), int(sides[-1])


def pairs(texts: list[str], flag: str) -> dict[str, str]:
    """Parse `NAME=VALUE` texts of a repeatable flag into a dictionary. Raises `UsageError`."""
    values: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise UsageError(f"{flag} expects NAME=VALUE, not '{text}'")
        if name in values:
            raise UsageError(f"{flag} {name} is given twice: {values[name]} and {value}; give it once")
        values[name] = value
    return values
