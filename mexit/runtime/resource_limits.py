"""What the kernel grants this process: processors and memory, as affinity and control groups (v1 and v2) say.

A container may see 64 processors and be allowed the time of two. With more threads than that, all of them are
stopped once the time of a period is used up, and some answers are late by tens of milliseconds.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# Version 1 writes "no limit" as the largest multiple of a page; nothing real is near.
_UNLIMITED_BYTES = 1 << 60


@dataclass(frozen=True)
class ResourceLimits:
    """What this process may use.

    Attributes:
        processors: it may run on, by affinity.
        quota: processors' worth of time by control group; None is without limit.
        memory_bytes: by control group; None is without limit.
    """

    processors: int
    quota: float | None
    memory_bytes: int | None

    @property
    def threads(self) -> int:
        """How many can do work at the same time."""
        return self.processors if self.quota is None else max(1, min(self.processors, math.ceil(self.quota)))


def read_limits(root: Path = Path("/")) -> ResourceLimits:
    """Read it from the system. `root` is where `proc` and `sys` lie."""
    quotas = [*_quotas_v1(root), *_quotas_v2(root)]
    limits = [
        *_numbers(root, "memory", "memory.limit_in_bytes"),
        *_numbers(root, "", "memory.max"),
    ]
    limits = [limit for limit in limits if limit < _UNLIMITED_BYTES]
    return ResourceLimits(_processors(), min(quotas, default=None), int(min(limits)) if limits else None)


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quotas_v1(root: Path) -> Iterator[float]:
    for folder in _folders(root, "cpu"):
        with suppress(OSError, ValueError):
            quota_us, period_us = (
                int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period")
            )
            if quota_us > 0 and period_us > 0:
                yield quota_us / period_us


def _quotas_v2(root: Path) -> Iterator[float]:
    for folder in _folders(root, ""):
        with suppress(OSError, ValueError):
            quota_us, period_us = (folder / "cpu.max").read_text().split()  # "max 100000" is without limit
            if int(quota_us) > 0 and int(period_us) > 0:
                yield int(quota_us) / int(period_us)


def _numbers(root: Path, controller: str, name: str) -> Iterator[float]:
    for folder in _folders(root, controller):
        with suppress(OSError, ValueError):
            yield int((folder / name).read_text())


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """The group of this process and those around it: each of them limits. "" is the one of version 2.

    Within a container the path is often the host's, which does not exist there; then the mounted root is left.
    """
    for path in _paths(root, controller):
        for mount in _mounts(root, controller):
            inner = mount / path.strip("/")
            yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(mount))


def _paths(root: Path, controller: str) -> Iterator[str]:
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(errors="replace").splitlines():
            _, controllers, path = (*line.split(":", 2), "", "")[:3]
            if controller in controllers.split(","):
                yield path


def _mounts(root: Path, controller: str) -> list[Path]:
    """Where a controller's groups are mounted, the one of version 2 alone or beside version 1."""
    base = root / "sys/fs/cgroup"
    if not controller:
        return [base, base / "unified"]
    return [folder for folder in base.glob("*") if controller in folder.name.split(",")]
