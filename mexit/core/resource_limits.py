"""The processors and the memory that this process may use, by affinity and control groups (versions 1 and 2).

A container may see 64 processors and be allowed the time of two. With more threads than that, the kernel stops all of
them once the time of a period is used up, which delays some answers by tens of milliseconds.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mexit.errors import UsageError

THREADS_PER_PROCESSOR = 4
_UNLIMITED_BYTES = 1 << 60  # version 1 writes "no limit" as a number above this one


@dataclass(frozen=True)
class ResourceLimits:
    """Limits of this process.

    Attributes:
        processors: number of processors that it may run on, by affinity.
        quota: processor time that it may use per second, in seconds, by control group; None is unlimited.
        memory_bytes: memory that it may use, by control group; None is unlimited.
    """

    processors: int
    quota: float | None
    memory_bytes: int | None

    @property
    def threads(self) -> int:
        """The number of threads that can compute at the same time."""
        return self.processors if self.quota is None else max(1, min(self.processors, math.ceil(self.quota)))


def read_limits(root: Path = Path("/")) -> ResourceLimits:
    """Read the limits from the system. `root` is the folder that holds `proc` and `sys`."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    times_us = [*_values(root, "cpu", "cpu.cfs_quota_us", "cpu.cfs_period_us"), *_values(root, "", "cpu.max")]
    quotas = [values[0] / values[1] for values in times_us if len(values) == 2 and min(values) > 0]
    sizes = [*_values(root, "memory", "memory.limit_in_bytes"), *_values(root, "", "memory.max")]
    limits = [values[0] for values in sizes if len(values) == 1 and values[0] < _UNLIMITED_BYTES]
    return ResourceLimits(processors, min(quotas, default=None), min(limits, default=None))


def check_threads(threads: int) -> None:
    """Refuse a number of threads that cannot be meant: threads without a processor wait for each other.

    Raises:
        UsageError: fewer than 1, or more than `THREADS_PER_PROCESSOR` for each processor of the machine.
    """
    if threads < 1:
        raise UsageError(f"threads must be at least 1, found {threads}")
    processors = os.cpu_count() or 1
    if threads > THREADS_PER_PROCESSOR * processors:
        raise UsageError(
            f"threads must be at most {THREADS_PER_PROCESSOR * processors}, which is {THREADS_PER_PROCESSOR} for each "
            f"of the {processors} processors of this machine; found {threads}"
        )


def processor_name() -> str:
    """Name of the processor, as the system gives it."""
    return cpu_info("model name") or platform.processor() or platform.machine()


def cpu_info(*fields: str) -> str:
    """The first value of one of these fields in Linux's `/proc/cpuinfo`; empty without such a field."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in fields:
                return value.strip()
    return ""


def _values(root: Path, controller: str, *files: str) -> Iterator[list[int]]:
    """The numbers in these files, per control group; a file that says "max" sets no limit."""
    for folder in _folders(root, controller):
        with suppress(OSError, ValueError):
            yield [int(word) for file in files for word in (folder / file).read_text().split()]


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """The control group of this process and its parents, each of which limits it. "" is version 2.

    Within a container the path is often that of the host, which does not exist there; the mounted root remains.
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
    """Mount points of a controller; version 2 is mounted alone or beside version 1."""
    base = root / "sys/fs/cgroup"
    if not controller:
        return [base, base / "unified"]
    return [folder for folder in base.glob("*") if controller in folder.name.split(",")]
