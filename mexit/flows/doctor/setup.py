"""Checks of what was set up here: variables, the cache folder, the newest bundle."""

from __future__ import annotations

import difflib
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from mexit.core.bundle import Bundle
from mexit.errors import MexitError, NotCalibrated
from mexit.flows.doctor.finding import Finding, ok, problem, warning
from mexit.runtime import autotune
from mexit.runtime.device_cache import cache_root

VARIABLES = (
    "MEXIT_BACKEND", "MEXIT_BATCHING", "MEXIT_BUDGET", "MEXIT_CACHE", "MEXIT_DATA", "MEXIT_HOST", "MEXIT_PORT",
    "MEXIT_THREADS", "MEXIT_TOKEN",
)  # fmt: skip
_SECRET = "MEXIT_TOKEN"


def variables(environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """`MEXIT_*` that are set, and those that nothing reads."""
    name, given = "variables", sorted(one for one in environment if one.startswith("MEXIT_"))
    for one in given:
        if one not in VARIABLES:
            names = [known.removeprefix("MEXIT_") for known in VARIABLES]
            near = difflib.get_close_matches(one.removeprefix("MEXIT_"), names, 1)
            fix = f"did you mean MEXIT_{near[0]}? " if near else ""
            yield warning(name, f"{one} is set, but nothing reads it", f"{fix}unset {one}")
    known = [one if one == _SECRET else f"{one}={environment[one]}" for one in given if one in VARIABLES]
    yield ok(name, ", ".join(known) or "no MEXIT_* variable is set")


def cache() -> Iterator[Finding]:
    """Facts of this device, and engines built here, lie in the cache: this user's alone, and writable."""
    name = "cache folder"
    try:
        root = cache_root()
    except MexitError as error:
        yield warning(name, str(error), "export MEXIT_CACHE=FOLDER")
        return
    if not _writable(root):
        yield problem(
            name,
            f"{root} cannot be written: times of this device are measured at every start, engines cannot be built",
            "export MEXIT_CACHE=FOLDER, one that can be written",
        )
        return
    exposed = [path for path in root.glob("*/*") if path.is_dir() and _mode(path) & 0o077]
    if root.is_dir() and _mode(root) & 0o022:
        exposed.append(root)
    for path in exposed:
        yield warning(name, f"{path} is open to other users (mode {_mode(path):04o})", f"chmod 700 {path}")
    if not exposed:
        yield ok(name, f"{root}, {'writable by its owner alone' if root.is_dir() else 'not made yet'}")


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def _writable(root: Path) -> bool:
    """Whether files can be made in it, or where it would be made."""
    place = root
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            return True
    except OSError:
        return False


def state(bundle: Bundle) -> Iterator[Finding]:
    """What a bundle is ready for."""
    name = f"bundle {bundle.path}"
    try:
        entries = bundle.policies().entries
    except NotCalibrated:
        yield warning(name, "not calibrated: only the budget full works", f"mexit calibrate {bundle.path}")
    except MexitError as error:
        yield problem(name, str(error), f"mexit calibrate {bundle.path}")
    else:
        engines = ", ".join(f"{entry.engine} {entry.precision}" for entry in entries)
        yield ok(name, f"every byte as recorded; calibrated for {engines}")
    choice = autotune.choose(bundle)
    said = f"{choice.backend} with {choice.threads} thread(s), {choice.reason}"
    if choice.measured:
        yield ok("auto", said)
    else:
        stale = "before" in choice.reason or "cannot be read" in choice.reason
        yield (warning if stale else ok)("auto", said, f"mexit bench {bundle.path} --tune")
