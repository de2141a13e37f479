"""Checks of the machine: instructions, processors and memory that are granted, others' load, waiting threads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from mexit.core.bundle import Bundle
from mexit.core.resource_limits import ResourceLimits, cpu_info, processor_name, read_limits
from mexit.errors import MexitError
from mexit.flows.doctor.finding import Finding, ok, warning
from mexit.runtime.autotune import choose

_INSTRUCTIONS = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_vnni": "VNNI", "avx_vnni": "VNNI",
                 "avx512_bf16": "AVX-512 BF16", "amx_bf16": "AMX bf16", "amx_int8": "AMX int8",
                 "asimd": "NEON", "asimddp": "dot product", "bf16": "bf16", "i8mm": "int8 matrix"}  # fmt: skip
BUSY = 0.5
# Python, numpy and onnxruntime take 75 MB; an engine holds its segments twice while it opens them.
BASE_BYTES, COPIES = 150 << 20, 3


def instructions(flags: frozenset[str] | None = None) -> Iterator[Finding]:
    """What the processor can do for a network."""
    flags = frozenset(cpu_info("flags", "Features").split()) if flags is None else flags
    found = dict.fromkeys(said for flag, said in _INSTRUCTIONS.items() if flag in flags)
    said = f"{processor_name()}: " + (", ".join(found) or "no vector instructions that are known here")
    if "avx" in flags and "avx2" not in flags:
        yield warning(
            "processor", f"{said}, without AVX2: networks run several times slower", "use a newer processor"
        )
    else:
        faster = "engines in int8 and bf16 gain most here" if "amx_bf16" in flags else ""
        yield ok("processor", said + (f"; {faster}" if faster else ""))


def threads(bundle: Bundle | None, grant: ResourceLimits | None = None) -> Iterator[Finding]:
    """Threads that would be used against processors that are granted."""
    grant = grant or read_limits()
    said = f"{grant.processors} by affinity"
    if grant.quota is not None:
        said += f", the time of {grant.quota:g} by control group"
    for name, wanted in _wanted(bundle):
        if wanted is None:
            yield warning("threads", f"{name} is no number of threads", f"unset {name.partition('=')[0]}")
        elif wanted > grant.threads:
            yield warning(
                "threads",
                f"{name} asks for {wanted} threads, which will wait for each other; processors: {said}",
                f"at most {grant.threads}, or a larger --cpus of the container",
            )
    yield ok("processors", said)


def _wanted(bundle: Bundle | None) -> Iterator[tuple[str, int | None]]:
    for name in ("MEXIT_THREADS", "OMP_NUM_THREADS"):
        text = os.environ.get(name, "")
        if text:
            first = text.partition(",")[0]  # OpenMP takes one number a level of nesting
            yield f"{name}={text}", int(first) if first.isdecimal() and int(first) > 0 else None
    if bundle is not None and not os.environ.get("MEXIT_THREADS"):
        with suppress(MexitError):
            yield f"auto for {bundle.path}", choose(bundle).threads


def memory(
    bundle: Bundle | None, grant: ResourceLimits | None = None, free_bytes: int | None = None
) -> Iterator[Finding]:
    """Memory that is left against what opening the newest bundle takes."""
    limit = (grant or read_limits()).memory_bytes
    free = _free_bytes() if free_bytes is None else free_bytes
    needed = BASE_BYTES + (COPIES * sum(graph.bytes for graph in bundle.manifest.graphs) if bundle else 0)
    least = min((value for value in (limit, free) if value is not None), default=None)
    parts = [] if free is None else [f"{free / 1e9:.1f} GB free"]
    if limit is not None:
        parts.append(f"control group limit {limit / 1e9:.1f} GB")
    said = ", ".join(parts) or "unknown"
    if least is not None and least < needed:
        yield warning(
            "memory",
            f"{said}; serving {bundle.path if bundle else 'a bundle'} may take {needed / 1e9:.2f} GB",
            "raise the limit (--memory of the container), or end other programs",
        )
    else:
        yield ok("memory", said)


def load(average: float | None = None, grant: ResourceLimits | None = None) -> Iterator[Finding]:
    """What other programs take: times measured beside them are too long."""
    if average is None:
        average = os.getloadavg()[0]
    count = (grant or read_limits()).processors
    said = f"{average:.1f} busy threads in the last minute on {count} processor(s)"
    if average > BUSY * count:
        fix = "measure again when the machine is quiet: mexit bench --tune"
        yield warning("load", f"{said}: latencies and the choice of engine suffer", fix)
    else:
        yield ok("load", said)


def waiting() -> Iterator[Finding]:
    """Whether OpenMP threads of torch spin while they wait. Engines are tried, see `engines`."""
    policy = os.environ.get("OMP_WAIT_POLICY", "")
    if policy.upper() == "ACTIVE":
        yield warning(
            "waiting threads",
            f"OMP_WAIT_POLICY={policy}: waiting threads spin, and training collapses beside any other load",
            "export OMP_WAIT_POLICY=PASSIVE",
        )
    else:
        said = (
            f"OMP_WAIT_POLICY={policy}" if policy else "OMP_WAIT_POLICY is not set; the mexit command sets PASSIVE"
        )
        yield ok("waiting threads", said)


def _free_bytes() -> int | None:
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    return None
