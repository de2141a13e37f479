"""Checks of what is installed: wheels that exclude each other, versions, CUDA against the driver."""

from __future__ import annotations

import ctypes
import importlib.util
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from mexit.flows.doctor.finding import Finding, ok, problem, warning

_OUTSIDE_FIX = "pip install '{}'"
_COMPARE = {
    ">=": lambda one, other: one >= other,
    "<=": lambda one, other: one <= other,
    ">": lambda one, other: one > other,
    "<": lambda one, other: one < other,
    "==": lambda one, other: one == other,
    "!=": lambda one, other: one != other,
}


def installed(distribution: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def wheels() -> Iterator[Finding]:
    """onnxruntime and onnxruntime-gpu install into one folder; the last one wins, and removing one breaks both."""
    name, found = "onnxruntime wheels", {}
    for package in ("onnxruntime", "onnxruntime-gpu"):
        version = installed(package)
        if version:
            found[package] = version
    said = " and ".join(f"{package} {version}" for package, version in found.items())
    if len(found) == 2:
        yield problem(
            name,
            f"{said} are both installed; they share one folder and break each other",
            "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'mexit[cpu]' or 'mexit[gpu]'",
        )
    elif found:
        yield ok(name, f"{said} alone")
    else:
        yield ok(name, "none", "pip install 'mexit[cpu]'")


def ranges() -> Iterator[Finding]:
    """Installed versions against those that mexit declares."""
    name = "versions"
    try:
        declared = metadata.requires("mexit") or []
    except metadata.PackageNotFoundError:
        yield ok(name, "mexit itself is not installed as a package, so there are no declared versions")
        return
    outside = {}
    for line in declared:
        package, limits = _requirement(line)
        version = installed(package)
        if version and not _within(version, limits):
            outside[package] = f"{package} {version} is installed, mexit is made for {limits}"
    for package, said in sorted(outside.items()):
        limits = said.rsplit(" ", 1)[1]
        yield warning(name, said, _OUTSIDE_FIX.format(f"{package}{limits}"))
    if not outside:
        yield ok(name, f"mexit {installed('mexit')}: every installed package is within what it declares")


def _requirement(line: str) -> tuple[str, str]:
    """`onnxruntime>=1.20; extra == 'cpu'` as its name and its limits."""
    match = re.match(r"\s*([A-Za-z0-9._-]+)\s*(?:\[[^\]]*\])?\s*\(?([^;)]*)", line)
    return (match[1], match[2].replace(" ", "")) if match else (line, "")


def _within(version: str, limits: str) -> bool:
    found = _release(version)
    for limit in filter(None, limits.split(",")):
        match = re.match(r"(>=|<=|==|!=|>|<)(.+)", limit)
        if match and not _COMPARE[match[1]](*_same_length(found, _release(match[2]))):
            return False
    return True


def _release(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` as (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _same_length(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    length = max(len(one), len(other))
    return one + (0,) * (length - len(one)), other + (0,) * (length - len(other))


def torch() -> Iterator[Finding]:
    """Which build of torch, without the seconds that importing it takes."""
    version = installed("torch")
    if version is None:
        yield ok(
            "torch", "not installed: bundles run without it", "to train and export: pip install 'mexit[train]'"
        )
        return
    cuda = _torch_cuda()
    said = f"torch {version}, " + (f"built for CUDA {cuda}" if cuda else "built for the processor alone")
    if cuda and driver_cuda() is None:
        yield warning(
            "torch",
            f"{said}, but there is no NVIDIA driver: gigabytes of CUDA libraries that nothing uses",
            "pip install torch --index-url https://download.pytorch.org/whl/cpu --force-reinstall",
        )
    else:
        yield ok("torch", said)


def cuda() -> Iterator[Finding]:
    """CUDA that packages were built for against what the driver can do; both are major versions."""
    needed = dict(_cuda_needs())
    driver = driver_cuda()
    for package, major in sorted(needed.items()):
        if driver is not None and major > driver[0]:
            yield problem(
                "CUDA",
                f"{package} is built for CUDA {major}, the NVIDIA driver supports CUDA {driver[0]}.{driver[1]}",
                f"install a driver for CUDA {major}, or a build of {package} for CUDA {driver[0]}",
            )
    if driver is None and "onnxruntime-gpu" in needed:
        yield warning(
            "CUDA",
            "onnxruntime-gpu is installed, but there is no NVIDIA driver: it runs on the processor",
            "pip uninstall -y onnxruntime-gpu, then pip install 'mexit[cpu]'",
        )
    elif driver is None or not any(major > driver[0] for major in needed.values()):
        said = "no NVIDIA driver" if driver is None else f"the NVIDIA driver supports CUDA {driver[0]}.{driver[1]}"
        built = ", ".join(f"{package} for CUDA {major}" for package, major in sorted(needed.items()))
        yield ok("CUDA", said + (f"; built: {built}" if built else "; no package here is built for it"))


def driver_cuda() -> tuple[int, int] | None:
    """(major, minor) of the newest CUDA that the driver supports; None without a driver."""
    try:
        version = ctypes.c_int(0)
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) == 0 and version.value:
            return version.value // 1000, version.value % 1000 // 10
    except (OSError, AttributeError):
        pass
    return None


def _cuda_needs() -> Iterator[tuple[str, int]]:
    """Packages and the major version of CUDA that each was built for."""
    torch_cuda = _torch_cuda()
    if torch_cuda:
        yield "torch", int(torch_cuda.partition(".")[0])
    if installed("onnxruntime-gpu"):
        found = _assigned("onnxruntime", "capi/build_and_package_info.py", "cuda_version")
        yield "onnxruntime-gpu", int(found.partition(".")[0]) if found else 0
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"] or ""
        match = re.fullmatch(r"tensorrt(?:[-_]rtx)?[-_]cu(\d+)", name)
        if match:
            yield name, int(match[1])


def _torch_cuda() -> str | None:
    return _assigned("torch", "version.py", "cuda")


def _assigned(package: str, file: str, name: str) -> str | None:
    """The text that a file of an installed package assigns to a name, read without running it."""
    try:
        spec = importlib.util.find_spec(package)
        folder = Path((spec.submodule_search_locations or [])[0]) if spec else Path("/nowhere")
        text = (folder / file).read_text(errors="replace")
    except (OSError, ValueError, IndexError):
        return None
    match = re.search(rf"^{name}\b[^=\n]*=\s*['\"]([\d.]+)['\"]", text, re.M)
    return match[1] if match else None
