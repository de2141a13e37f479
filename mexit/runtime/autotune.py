"""Autotune: finds the engine and the number of threads that serve a bundle fastest on this device.

`tune` times every engine that opens here with 1, 2, 4, ... threads on one image, the static network and each segment,
and stores the times in the device cache. They hold for the installed packages. `choose` reads them and takes the
calibrated engine whose named budgets are fastest in the mean; opening a bundle never measures. An engine that is
calibrated later needs no new measurement.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mexit.core.atomic_io import read_json
from mexit.core.budget import NAMED_FRACTIONS
from mexit.core.bundle import Bundle
from mexit.core.cost import MICROSECONDS, Costs
from mexit.core.policies_file import PARITY, PolicyEntry
from mexit.core.printable import shell_path
from mexit.core.resource_limits import check_threads, read_limits
from mexit.core.schema import decode
from mexit.core.versions import installed_versions
from mexit.errors import BackendError, MexitError, MissingExtra, NotFound
from mexit.runtime.backends.base import Backend
from mexit.runtime.backends.registry import AUTO, ENGINES, find, open_backend
from mexit.runtime.device_cache import cache_folder, write_fact
from mexit.runtime.latency_profile import expected_us

T = TypeVar("T")
_Entries = Mapping[tuple[str, str, str], PolicyEntry]

DEFAULT = "ort"
FILE = "autotune.json"
# Times of another version of one of these packages do not count.
PACKAGES = (
    "mexit", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-cu12", "tensorrt-cu13",
    "tensorrt-rtx",
)  # fmt: skip
# Within this factor of the fastest, fewer threads win, then the engine that the registry lists first: noise does not
# change the choice, and a second thread must be worth the processor that it takes.
TOLERANCE = 1.1
SECONDS = 1.0
WARM_UP, MIN_ROUNDS, MAX_ROUNDS = 3, 5, 200
OPENING_S = 5.0  # an engine that takes longer to open is not opened with further numbers of threads


@dataclass(frozen=True)
class Timing:
    """Median times of one image in one engine with one number of threads.

    Attributes:
        backend: name in the registry.
        threads: number of threads.
        segments_us: microseconds of each segment, (E,).
        static_us: microseconds of the static network; None for a bundle without one.
    """

    backend: str
    threads: int
    segments_us: tuple[float, ...]
    static_us: float | None = None

    @property
    def total_us(self) -> float:
        """Microseconds of an image that runs through all segments."""
        return sum(self.segments_us)

    @property
    def costs(self) -> Costs:
        """Microseconds of leaving at each exit, and of the budget `full`."""
        cumulative = tuple(np.cumsum(self.segments_us).tolist())
        return Costs(cumulative, cumulative[-1] if self.static_us is None else self.static_us, MICROSECONDS)

    def mean_us(self, entry: PolicyEntry | None) -> float:
        """Mean microseconds of the named budgets.

        Args:
            entry: policies, whose exits on the calibration data give the time of a budget. A budget that would be
                slower than the static network counts as the static network, which replaces it where budgets are
                selected in time. Without policies the time is that of `full`.
        """
        costs = self.costs
        named = [entry.frontier[entry.named[name]] for name in NAMED_FRACTIONS if name in entry.named] if entry else []
        times = [min(costs.static, expected_us(point, costs)) for point in named]
        return float(np.mean(times or [costs.static]))


@dataclass(frozen=True)
class Tuning:
    """The times of all engines.

    Attributes:
        versions: installed version of each of `PACKAGES`.
        timings: in the order of the registry, then of the threads.
        skipped: reason why an engine was not timed, by its name.
    """

    versions: Mapping[str, str]
    timings: tuple[Timing, ...]
    skipped: Mapping[str, str]


@dataclass(frozen=True)
class Choice:
    """The engine to open.

    Attributes:
        backend: name in the registry.
        threads: number of threads of the engine.
        measured: whether `auto` chose it by its measured time.
        reason: the reason, in words.
    """

    backend: str
    threads: int
    measured: bool
    reason: str


@dataclass(frozen=True)
class Row:
    """One timing in an explanation.

    Attributes:
        timing: the measured times.
        mean_us: see `Timing.mean_us`; without a calibration of its own, with the exits of the first calibrated engine.
        state: "chosen", "usable" (calibrated) or "not calibrated".
        command: the command that calibrates it; None if that would not make answers faster.
    """

    timing: Timing
    mean_us: float
    state: str
    command: str | None

    @property
    def usable_or_faster(self) -> bool:
        """Whether the engine can serve now, or would be faster once it is calibrated."""
        return self.state != "not calibrated" or self.command is not None


@dataclass(frozen=True)
class Explanation:
    """The choice of `auto` for a bundle on this device, and the timings that it was compared with."""

    choice: Choice
    rows: tuple[Row, ...]
    skipped: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        rows = [
            {
                **asdict(row.timing),
                "total_us": row.timing.total_us,
                "mean_us": row.mean_us,
                "state": row.state,
                "command": row.command,
            }
            for row in self.rows
        ]
        return {"chosen": asdict(self.choice), "rows": rows, "skipped": dict(self.skipped)}


def choose(bundle: Bundle, backend: str = AUTO, threads: int | None = None) -> Choice:
    """Choose the engine to open.

    Args:
        bundle: an opened bundle.
        backend: a name in the registry, or "auto".
        threads: number of threads; None takes the fastest measured number, else 1.

    Raises:
        UsageError: no such engine, or no possible number of threads.
    """
    if threads is not None:
        check_threads(threads)
    if backend != AUTO:
        find(backend)
        if threads is not None:
            return Choice(backend, threads, False, "as given")
    tuning, problem = load(bundle)
    timings = tuning.timings if tuning else ()
    entries = _entries(bundle)
    usable = _usable(entries, timings) if backend == AUTO else [one for one in timings if one.backend == backend]
    usable = [one for one in usable if one.threads == threads] or usable
    if not usable:
        name = DEFAULT if backend == AUTO else backend
        return Choice(name, threads or 1, False, problem or "nothing that was measured here can serve it")
    best = _fastest(usable, _mean_us(entries, usable))
    return Choice(best.backend, threads or best.threads, backend == AUTO, "the fastest measured here")


def open_chosen(bundle: Bundle, choice: Choice) -> Backend:
    """Open the chosen engine. Raises as `open_backend`; the message says if a measurement chose the engine."""
    try:
        return open_backend(bundle, choice.backend, choice.threads)
    except (MissingExtra, BackendError) as error:
        if not choice.measured:
            raise
        raise type(error)(
            f"{error} ({choice.backend} was the fastest when measured; mexit bench {shell_path(bundle.path)} --tune "
            f"measures again, --backend {DEFAULT} does without)"
        ) from error


def explain(bundle: Bundle) -> Explanation:
    """The choice of `auto`, with all timings."""
    (tuning, _), choice = load(bundle), choose(bundle)
    timings = tuning.timings if tuning else ()
    entries = _entries(bundle)
    usable, mean_us = _usable(entries, timings), _mean_us(entries, timings)
    chosen = [one for one in usable if (one.backend, one.threads) == (choice.backend, choice.threads)]
    limit_us = mean_us[chosen[0]] if chosen else float("inf")
    rows = []
    for one in timings:
        state = "chosen" if one in chosen else "usable" if one in usable else "not calibrated"
        faster = one not in usable and mean_us[one] < limit_us
        command = f"mexit calibrate {shell_path(bundle.path)} --backend {one.backend}" if faster else None
        rows.append(Row(one, mean_us[one], state, command))
    return Explanation(choice, tuple(rows), tuning.skipped if tuning else {})


def tune(
    bundle: Bundle, seconds: float = SECONDS, *, builds: bool = True, max_threads: int | None = None
) -> Explanation:
    """Measure and store the times of every engine; `auto` then goes by them. Arguments as in `measure`.

    Raises:
        MexitError: the cache folder cannot be written.
    """
    save(bundle, measure(bundle, seconds, builds=builds, max_threads=max_threads))
    return explain(bundle)


def load(bundle: Bundle) -> tuple[Tuning | None, str]:
    """The stored times of this device; or None, and the reason why there are none to rely on."""
    try:
        tuning = decode(read_json(cache_folder(bundle.id) / FILE, "measurement"), Tuning, FILE)
    except NotFound:
        return None, "not measured on this device"
    except MexitError:
        return None, "the measurement of this device cannot be read"
    now, then = versions(), tuning.versions
    changed = sorted(name for name in {*now, *then} if now.get(name) != then.get(name))
    if changed:
        return None, f"measured before {', '.join(changed)} changed"
    if not all(_is_valid(one, len(bundle.manifest.exits)) for one in tuning.timings):
        return None, "the measurement of this device cannot be read"
    return tuning, ""


def save(bundle: Bundle, tuning: Tuning) -> Path:
    """Store times for this device. Raises `MexitError` if the cache folder cannot be written."""
    path = cache_folder(bundle.id) / FILE
    write_fact(path, asdict(tuning))
    return path


def measure(bundle: Bundle, seconds: float = SECONDS, *, builds: bool = True, max_threads: int | None = None) -> Tuning:
    """Time every engine that opens here.

    Args:
        bundle: an opened bundle.
        seconds: duration of the timing of all engines together, after they were opened; at least `MIN_ROUNDS` rounds.
        builds: whether to time engines that must be built for the device first, which can take minutes.
        max_threads: largest number of threads; default the limit of this process.
    """
    image = np.random.default_rng(0).random((1, *bundle.manifest.input.shape), np.float32)
    max_threads = max_threads or read_limits().threads
    opened: list[_Opened] = []
    skipped = {}
    for name, engine in ENGINES.items():
        if engine.builds and not builds:
            skipped[name] = "it may have to be built first, which mexit bench --tune does"
            continue
        try:
            opened += _open_settings(bundle, name, image, 1 if engine.builds else max_threads)
        except MexitError as error:
            skipped[name] = str(error)
    runs = [partial(_run, one.backend, image) for one in opened]
    exits = len(bundle.manifest.exits)
    timings = []
    for one, rounds in zip(opened, call_in_turn(runs, seconds), strict=True):
        median_us = np.median(rounds, axis=0).tolist()
        timings.append(Timing(one.name, one.threads, tuple(median_us[:exits]), *median_us[exits:]))
    return Tuning(versions(), tuple(timings), skipped)


def call_in_turn(functions: Sequence[Callable[[], T]], seconds: float) -> list[list[T]]:
    """Call every function once per round; returns the results of each function.

    Each round starts with another function, so that none always finds the caches that the same other one left.
    There are `MIN_ROUNDS` rounds, then more for `seconds` from the start, at most `MAX_ROUNDS`.
    """
    results: list[list[T]] = [[] for _ in functions]
    start, count = time.perf_counter(), len(functions)
    for number in range(MAX_ROUNDS):
        if number >= MIN_ROUNDS and time.perf_counter() - start > seconds:
            break
        for i in range(count):
            i = (i + number) % count
            results[i].append(functions[i]())
    return results


def versions() -> dict[str, str]:
    """Installed version of each of `PACKAGES`."""
    return installed_versions(PACKAGES)


@dataclass(frozen=True)
class _Opened:
    """An opened engine with its number of threads."""

    name: str
    threads: int
    backend: Backend


def _open_settings(bundle: Bundle, name: str, image: NDArray[np.float32], max_threads: int) -> list[_Opened]:
    """One engine with 1, 2, 4, ... threads and with `max_threads`, warmed up."""
    opened: list[_Opened] = []
    start, threads = time.perf_counter(), 1
    while threads <= max_threads and (not opened or time.perf_counter() - start < OPENING_S):
        backend = open_backend(bundle, name, threads)
        for _ in range(WARM_UP):
            _run(backend, image)
        opened.append(_Opened(name, threads, backend))
        threads = max_threads if threads < max_threads < 2 * threads else 2 * threads
    return opened


def _run(backend: Backend, image: NDArray[np.float32]) -> list[float]:
    """Microseconds of each segment, and of the static network if there is one, (E,) or (E + 1,)."""
    carried, times_us = backend.carry(image), []
    for segment in backend.segments:
        start = time.perf_counter()
        carried, _ = segment.run(carried)
        times_us.append((time.perf_counter() - start) * 1e6)
    if backend.static is not None:
        carried, start = backend.carry(image), time.perf_counter()
        backend.static.run(carried)
        times_us.append((time.perf_counter() - start) * 1e6)
    return times_us


def _usable(entries: _Entries, timings: Sequence[Timing]) -> list[Timing]:
    """The timings of calibrated engines; without any calibration, those of engines in the reference precision.

    If some engines have a reject option, only those: a faster engine must not answer where they are unsure.
    """
    if not entries:
        return [one for one in timings if _is_parity(one.backend)]
    rejecting = any(entry.reject for entry in entries.values())
    found = ((one, entries.get(_key(one.backend))) for one in timings)
    return [one for one, entry in found if entry is not None and (entry.reject or not rejecting)]


def _mean_us(entries: _Entries, timings: Sequence[Timing]) -> dict[Timing, float]:
    """`Timing.mean_us` of each timing, with the policies of its engine, else those of the first calibrated one."""
    first = next(iter(entries.values()), None)
    return {one: one.mean_us(entries.get(_key(one.backend), first)) for one in timings}


def _entries(bundle: Bundle) -> _Entries:
    """The policies by engine, precision and variant; none where they cannot be read."""
    try:
        return {(one.engine, one.precision, one.variant): one for one in bundle.policies().entries}
    except MexitError:  # damaged policies are reported where they are needed
        return {}


def _key(name: str) -> tuple[str, str, str]:
    engine = ENGINES[name]
    return engine.engine, engine.precision, engine.variant


def _is_parity(name: str) -> bool:
    return (ENGINES[name].precision, ENGINES[name].variant) == (PARITY, PARITY)


def _fastest(timings: Sequence[Timing], mean_us: Mapping[Timing, float]) -> Timing:
    limit_us = TOLERANCE * min(mean_us[one] for one in timings)
    order = list(ENGINES)
    near = [one for one in timings if mean_us[one] <= limit_us]
    return min(near, key=lambda one: (one.threads, order.index(one.backend)))


def _is_valid(timing: Timing, exits: int) -> bool:
    valid = timing.backend in ENGINES and timing.threads >= 1 and len(timing.segments_us) == exits
    static_us = timing.total_us if timing.static_us is None else timing.static_us
    return valid and all(0 < us < float("inf") for us in (*timing.segments_us, static_us))
