"""`mexit inspect`: check every file of a bundle, and collect its content and its state on this device."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mexit.calibrate import expected
from mexit.core.artifact_paths import BUNDLES, newest
from mexit.core.bundle import Bundle
from mexit.core.policies_file import Policies, PolicyEntry
from mexit.core.progress import Progress, Silent
from mexit.errors import NotCalibrated
from mexit.flows.tensorrt_engines import EngineRow, rows_json, stored_engines
from mexit.runtime.autotune import Explanation, choose, explain
from mexit.runtime.backends.registry import find, name_of
from mexit.runtime.latency_profile import Profile
from mexit.runtime.profile_cache import stored_profile
from mexit.runtime.time_policies import stored_policies


@dataclass(frozen=True)
class EntryTimes:
    """Times of this device: the latency profile, and the policies selected by it; None if none were selected."""

    profile: Profile
    timed: PolicyEntry | None


@dataclass(frozen=True)
class InspectResult:
    """The content of a bundle.

    Attributes:
        bundle: the opened bundle.
        policies: its policies; None if it is not calibrated.
        tuning: the engine that `--backend auto` takes on this device, and the measurements behind the choice.
        expected: expected and test results of each entry of the policies, in its order; None where there are none.
        engines: TensorRT engines in the cache of this device.
        times: what was measured on this device for the engine of each entry, with the number of threads that serves
            it; None where nothing was measured.
        profile: the latency profile of the engine of `tuning`; None where none was measured.
    """

    bundle: Bundle
    policies: Policies | None
    tuning: Explanation
    engines: tuple[EngineRow, ...]
    expected: tuple[Mapping[str, Any] | None, ...]
    times: tuple[EntryTimes | None, ...] = ()
    profile: Profile | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the object of `mexit inspect --json`."""
        policies = None
        if self.policies is not None:
            entries = [asdict(entry) for entry in self.policies.entries]
            policies = {"model": self.policies.model, "entries": entries}
        return {
            "bundle": self.bundle.manifest.to_json(),
            "policies": policies,
            "tuning": self.tuning.to_json(),
            "engines": rows_json(self.engines),
            "expected": list(self.expected),
            "times": [None if one is None else asdict(one) for one in self.times],
        }


def inspect_bundle(bundle: Path | None = None, *, progress: Progress | None = None) -> InspectResult:
    """Open a bundle and check its segments, policies and traces.

    Args:
        bundle: a bundle directory; default the newest.
        progress: receives the name of the default bundle.

    Raises:
        NotFound: there is no such bundle.
        ArtifactError: a file is damaged, untrusted, or belongs to another model or version.
    """
    opened = Bundle.open(bundle or newest(BUNDLES, progress or Silent()))
    policies = None
    with suppress(NotCalibrated):
        policies = opened.policies()
    for entry in policies.entries if policies else ():
        for trace in (entry.trace, *entry.evidence):
            opened.load_trace(trace)
    entries = policies.entries if policies else ()
    tables = tuple(expected.load(opened.path, opened.id, entry) for entry in entries)
    tuning = explain(opened)
    profile = stored_profile(opened, find(tuning.choice.backend), tuning.choice.threads)
    times = tuple(_times(opened, entry) for entry in entries)
    return InspectResult(opened, policies, tuning, stored_engines(opened), tables, times, profile)


def _times(bundle: Bundle, entry: PolicyEntry) -> EntryTimes | None:
    """What the device cache has for the engine of an entry. Nothing is measured."""
    name = name_of(entry.engine, entry.precision, entry.variant)
    if name is None:
        return None
    threads = choose(bundle, name).threads
    profile, timed = stored_profile(bundle, entry, threads), stored_policies(bundle, entry, threads)
    return None if profile is None else EntryTimes(profile, timed.entry if timed else None)
