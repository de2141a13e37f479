"""Policies in time: measured and selected at the first start on a device, stored, and read by later starts.

The device cache holds the profile and the selected entry. They hold for one model, its stored policies, one engine, its
number of threads and the installed packages. Of several processes one measures, and the others wait for its file.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mexit.calibrate.time_selection import select_by_time
from mexit.core.atomic_io import read_json, sha256_bytes, to_json
from mexit.core.bundle import Bundle
from mexit.core.cost import Costs
from mexit.core.directory_lock import directory_lock
from mexit.core.policies_file import PolicyEntry, entry_to_json
from mexit.core.schema import decode
from mexit.core.trace import Trace
from mexit.errors import MexitError, UsageError
from mexit.runtime.backends.base import Backend
from mexit.runtime.device_cache import make_private, write_fact
from mexit.runtime.latency_profile import Profile, TimedCalls
from mexit.runtime.profile_cache import EngineKey, new_profile, profile_path, read_profile, why_not

WAIT_S = 30.0  # for the process that measures
UNITS = ("macs", "time")
SHOWN = ("low", "medium", "high")
_NOT_STORED = "every start measures again: set MEXIT_CACHE to a folder that can be written"


@dataclass(frozen=True)
class TimePolicies:
    """Policies that were selected in time.

    Attributes:
        entry: the policies, with a frontier in microseconds.
        profile: the times.
        measured: whether this start measured or selected; false where it read the device cache.
        file: the file that the times are from; None where they were measured on this device.
        stored: false where the device cache cannot be written, so that the next start measures again.
    """

    entry: PolicyEntry
    profile: Profile
    measured: bool
    file: str | None = None
    stored: bool = True

    @property
    def costs(self) -> Costs:
        """Microseconds of leaving at each exit."""
        return self.profile.costs

    def summary(self) -> str:
        """One line: what was measured and chosen."""
        static = self.profile.static_us
        named = [(name, self.entry.frontier[self.entry.named[name]]) for name in SHOWN if name in self.entry.named]
        times = [f"{name} {point.calibration.mean_us or static:,.0f}" for name, point in named]
        origin = "measured on this device" if self.file is None else f"times of {self.file}"
        head, tail = f"{origin}: static {static:,.0f} us", "" if self.stored else f"; {_NOT_STORED}"
        if all(threshold is None for _, point in named for threshold in point.thresholds):
            return f"{head}; early exit saves no time here, and all budgets are the static network{tail}"
        shares = {name: 1 - (point.calibration.mean_us or static) / static for name, point in named}
        name = "medium" if shares.get("medium", 0.0) > 0 else max(shares, key=lambda one: shares[one])
        return f"{head}; {', '.join(times)} us; early exit saves {shares[name]:.0%} at {name}{tail}"


def check_cost(cost: str, profile: str | Path | None) -> None:
    """Check the cost unit of budgets. Raises `UsageError`."""
    if cost not in UNITS:
        raise UsageError(f"unknown cost '{cost}': choose from {', '.join(UNITS)}")
    if profile is not None and cost != "time":
        raise UsageError("a latency profile has no effect on budgets in MACs: give --cost time with --profile")


def open_in_time(
    bundle: Bundle,
    backend: Backend,
    threads: int,
    entry: PolicyEntry | None,
    calls: TimedCalls,
    profile: str | Path | None,
    again: bool,
) -> tuple[TimePolicies | None, str]:
    """Select budgets in time where that is possible.

    Args:
        bundle, backend, threads, entry, calls, again: see `time_policies`; `entry` is None without calibration.
        profile: a file of times to use, which must fit; None reads the device cache, or measures.

    Returns:
        The policies, and ""; or None, and the reason in words why budgets stay in MACs.

    Raises:
        NotFound, Damaged, UsageError: the file cannot be used.
    """
    given = None if profile is None else read_profile(Path(profile), bundle, backend, threads)
    if entry is None:
        return None, ""
    try:
        timed = time_policies(bundle, backend, threads, entry, calls, profile=given, again=again)
    except MexitError as error:
        return None, f"budgets are in MACs: {error}"
    return timed if profile is None else replace(timed, file=str(profile)), ""


def note_timing(timing: TimePolicies | None, why_not: str, note: Callable[[str], object]) -> None:
    """Report what this start measured and selected, or why budgets are in MACs; nothing where the cache had it."""
    if why_not:
        note(why_not)
    elif timing is not None and timing.measured:
        note(timing.summary())


def time_policies(
    bundle: Bundle,
    backend: Backend,
    threads: int,
    entry: PolicyEntry,
    calls: TimedCalls,
    *,
    profile: Profile | None = None,
    again: bool = False,
) -> TimePolicies:
    """The policies of an engine in time.

    Args:
        bundle, backend, threads: the model, the engine and its number of threads.
        entry: the stored policies of the engine, in MACs.
        calls: see `latency_profile.TimedCalls`; timed if nothing is stored.
        profile: use these times; nothing is stored then. None reads the device cache, or measures.
        again: measure in any case.

    Raises:
        MexitError: the bundle has no traces or no static network, or the selection is impossible; the message says why.
    """
    if bundle.manifest.static is None:
        raise UsageError("the bundle has no static network: export it again")
    traces = load_traces(bundle, entry)
    if profile is not None:
        return _select(bundle, entry, traces, profile)
    path = _path(bundle, backend, threads)
    if path is None:
        unstored = _select(bundle, entry, traces, new_profile(bundle, backend, threads, calls))
        return replace(unstored, stored=False)
    if not again and (stored := _load(path, bundle, backend, threads, entry)):
        return stored
    with ExitStack() as stack:
        _wait_for_lock(stack, path.parent)
        if not again and (stored := _load(path, bundle, backend, threads, entry)):
            return stored
        selected = _select(bundle, entry, traces, new_profile(bundle, backend, threads, calls))
        return _store(path, entry, selected)


def _wait_for_lock(stack: ExitStack, folder: Path) -> None:
    """Lock the folder until the stack ends; after `WAIT_S`, or where the folder cannot be written, go on without."""
    until = time.monotonic() + WAIT_S
    while time.monotonic() < until:
        try:
            stack.enter_context(directory_lock(folder, "budgets are being measured"))
        except UsageError:  # another process measures
            time.sleep(0.05)
        except MexitError:
            return
        else:
            return


def _store(path: Path, entry: PolicyEntry, selected: TimePolicies) -> TimePolicies:
    """Write the policies that were selected for `entry` into the device cache, if it can be written."""
    content = {"profile": asdict(selected.profile), "entry": entry_to_json(selected.entry)}
    try:
        write_fact(path, {"policies": _digest(entry), "checksum": sha256_bytes(to_json(content)), **content})
    except MexitError:
        return replace(selected, stored=False)
    return selected


def stored_policies(bundle: Bundle, entry: PolicyEntry, threads: int) -> TimePolicies | None:
    """The policies in time of this device for stored policies in MACs; None if none were selected that still hold."""
    try:
        path = profile_path("policies", bundle, entry, threads)
    except MexitError:
        return None
    return _load(path, bundle, entry, threads, entry)


def load_traces(bundle: Bundle, entry: PolicyEntry) -> dict[tuple[str, str], Trace]:
    """The traces of an entry by split and condition. Raises `NotFound`, `Damaged`, and `UsageError` without one."""
    traces = {(ref.split, ref.condition): bundle.load_trace(ref) for ref in (entry.trace, *entry.evidence)}
    for split in ("calibration", "certification"):
        if (split, "clean") not in traces:
            raise UsageError(f"the bundle has no trace of the {split} split: run mexit calibrate")
    return traces


def _select(bundle: Bundle, entry: PolicyEntry, traces: dict[tuple[str, str], Trace], profile: Profile) -> TimePolicies:
    return TimePolicies(select_by_time(entry, traces, bundle.manifest.costs, profile.costs), profile, True)


def _path(bundle: Bundle, backend: Backend, threads: int) -> Path | None:
    """The file in the device cache; None if its folder cannot be written."""
    try:
        path = profile_path("policies", bundle, backend, threads)
        make_private(path.parent)
    except (OSError, MexitError):
        return None
    return path


def _load(path: Path, bundle: Bundle, engine: EngineKey, threads: int, entry: PolicyEntry) -> TimePolicies | None:
    """The stored policies; None if there are none that hold for these packages and stored policies, or damaged ones."""
    try:
        value: Any = read_json(path, "policies in time")
        content = {name: value[name] for name in ("profile", "entry")}
        if value["policies"] != _digest(entry) or value["checksum"] != sha256_bytes(to_json(content)):
            return None
        profile: Profile = decode(value["profile"], Profile, str(path))
        if why_not(profile, bundle, engine, threads):
            return None
        timed: PolicyEntry = decode(value["entry"], PolicyEntry, str(path))
    except (MexitError, KeyError, TypeError):
        return None
    return TimePolicies(timed, profile, False)


def _digest(entry: PolicyEntry) -> str:
    """The sha256 of the stored policies, which the selection depends on."""
    return sha256_bytes(to_json(entry_to_json(entry)))
