"""The command `mexit doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from mexit.commands import output
from mexit.commands.options import BundleArg, Json

if TYPE_CHECKING:
    from mexit.flows.doctor import DoctorResult


def doctor(bundle: BundleArg = None, *, json: Json = False) -> None:
    """Check the installation, this machine and the newest bundle; the exit code is 1 if there is a problem."""
    from mexit.flows.doctor import diagnose

    result = diagnose(bundle, progress=output.RichProgress())
    output.print_json(result.to_json()) if json else show_findings(result)
    if result.count("problem"):
        raise typer.Exit(1)


def show_findings(result: DoctorResult) -> None:
    """Print each finding with its fix, then the counts."""
    for finding in result.findings:
        output.say(f"{finding.status:8} {finding.name}: {finding.found}")
        if finding.fix:
            output.say(f"         {'then' if finding.status == 'ok' else 'fix'}: {finding.fix}")
    output.say(f"{result.count('problem')} problem(s), {result.count('warning')} warning(s)")
