"""Latency profiles of a device: read from a file or the device cache, and checked."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from mexit.core.atomic_io import read_json
from mexit.core.bundle import Bundle
from mexit.core.schema import decode
from mexit.core.versions import installed_versions
from mexit.errors import Damaged, MexitError, UsageError
from mexit.runtime.autotune import PACKAGES
from mexit.runtime.backends.base import Backend
from mexit.runtime.device_cache import cache_folder, write_fact
from mexit.runtime.latency_profile import Profile, TimedCalls, measure_times_us


class EngineKey(Protocol):
    """What names an engine in the device cache: a `Backend`, a `PolicyEntry` or an `Engine` of the registry."""

    @property
    def engine(self) -> str:
        """Such as "ort"."""

    @property
    def precision(self) -> str:
        """Such as "fp32"."""

    @property
    def variant(self) -> str:
        """The segments that it runs."""


def new_profile(bundle: Bundle, backend: Backend, threads: int, calls: TimedCalls) -> Profile:
    """Measure the profile of an engine, which takes a second or two."""
    exits_us, static_us = measure_times_us(calls)
    key = (bundle.id, backend.engine, backend.precision, threads, installed_versions(PACKAGES))
    return Profile(exits_us, static_us, *key)


def device_profile(bundle: Bundle, backend: Backend, threads: int, calls: TimedCalls) -> Profile:
    """The profile of an engine: from the device cache, or measured now and stored if the cache can be written."""
    if stored := stored_profile(bundle, backend, threads):
        return stored
    profile = new_profile(bundle, backend, threads, calls)
    with suppress(MexitError):
        write_fact(profile_path("profile", bundle, backend, threads), asdict(profile))
    return profile


def stored_profile(bundle: Bundle, engine: EngineKey, threads: int) -> Profile | None:
    """The profile of an engine in the device cache; None if none was measured that still holds."""
    for kind in ("policies", "profile"):
        with suppress(MexitError):
            return read_profile(profile_path(kind, bundle, engine, threads), bundle, engine, threads)
    return None


def profile_path(kind: str, bundle: Bundle, engine: EngineKey, threads: int) -> Path:
    """The file in the device cache of "policies" in time, or of a "profile" alone. Raises `UsageError`."""
    name = f"{kind}-{engine.engine}-{engine.variant}-{engine.precision}-{threads}.json"
    return cache_folder(bundle.id) / name


def why_not(profile: Profile, bundle: Bundle, engine: EngineKey, threads: int) -> str:
    """Why a profile does not hold for an engine, with a place for its name; "" if it holds."""
    expected = (bundle.id, engine.engine, engine.precision, threads, len(bundle.manifest.exits))
    found = (profile.model, profile.engine, profile.precision, profile.threads, len(profile.exits_us))
    what = ("the model", "the engine", "the precision", "the number of threads", "the number of exits")
    for name, one, other in zip(what, found, expected, strict=True):
        if one != other:
            return f"{name} is {str(one)[:12]}, expected {str(other)[:12]}"
    now, then = installed_versions(PACKAGES), profile.versions
    changed = sorted(name for name in {*now, *then} if now.get(name) != then.get(name))
    return f"it was measured with other versions of {', '.join(changed)}" if changed else ""


def load_profile(path: Path) -> Profile:
    """Read a file with a profile: one alone, or one of the policies in time. Raises `NotFound`, `Damaged`."""
    value = read_json(path, "latency profile")
    nested = value.get("profile") if isinstance(value, dict) else None
    try:
        profile: Profile = decode(nested or value, Profile, "its content")
    except Damaged as error:
        raise Damaged(f"latency profile {path} cannot be used: {error}") from None
    return profile


def read_profile(path: Path, bundle: Bundle, engine: EngineKey, threads: int) -> Profile:
    """Read a profile and check that it holds for an engine.

    Raises:
        NotFound, Damaged: there is no such file, or it is not a profile.
        UsageError: it is a profile of another model, engine or installation.
    """
    profile = load_profile(path)
    if reason := why_not(profile, bundle, engine, threads):
        raise UsageError(
            f"the latency profile {path} is not for this bundle and engine: {reason}; leave out --profile to measure, "
            "or give --cost macs"
        )
    return profile
