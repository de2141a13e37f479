"""doctor: what is wrong here, and what to type."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from mexit.commands import output
from mexit.commands.options import BundleArg, Json
from mexit.commands.output import RichProgress

if TYPE_CHECKING:
    from mexit.flows.doctor import DoctorResult


def doctor(bundle: BundleArg = None, *, json: Json = False) -> None:
    """Look for what is wrong with installation, machine and newest bundle; exit code 1 if something is."""
    from mexit.flows.doctor import doctor as flow

    result = flow(bundle, progress=RichProgress())
    output.print_json(result.to_json()) if json else _show(result)
    if result.count("problem"):
        raise typer.Exit(1)


def _show(result: DoctorResult) -> None:
    for found in result.findings:
        output.say(f"{found.status:8} {found.name}: {found.found}")
        if found.fix:
            output.say(f"         {'type' if found.status != 'ok' else 'then'}: {found.fix}")
    output.say(f"{result.count('problem')} problem(s), {result.count('warning')} warning(s)")
