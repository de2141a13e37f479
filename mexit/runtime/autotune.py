"""Which engine and how many threads serve this bundle fastest on this device.

`measure` times every engine of the catalogue that opens here, with 1, 2, 4, ... threads, segment by segment on
one image. The times are a fact of this device (`times.cache_folder`) and hold for the packages that are installed;
nothing is measured when a bundle is opened. `choose` reads them and takes the fastest calibrated engine, so that
one calibrated later needs no new measurement.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mexit.core.atomic_io import read_json
from mexit.core.bundle import Bundle
from mexit.core.manifest import read_value
from mexit.core.policies import PARITY, Policies
from mexit.core.versions import installed_versions
from mexit.errors import BackendError, MexitError, MissingExtra, NotCalibrated, NotFound, UsageError
from mexit.runtime.backends.base import Backend
from mexit.runtime.backends.registry import AUTO, ENGINES, find, open_backend
from mexit.runtime.latency_profile import cache_folder, keep_fact
from mexit.runtime.resource_limits import read_limits

DEFAULT = "ort"
FILE = "autotune.json"
# Another version of one of these is another engine.
PACKAGES = (
    "mexit", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-cu12", "tensorrt-cu13",
    "tensorrt-rtx",
)  # fmt: skip
# Within this factor of the fastest, fewer threads win, then the engine that the catalogue names first: noise does
# not flip the choice, and a second thread has to be worth the processor it takes from others.
AS_FAST = 1.1
WARM_UP, MIN_ROUNDS, MAX_ROUNDS = 3, 5, 200
# An engine that takes longer to open is measured with the thread settings that it opened with so far.
OPENING_S = 5.0
# Engines of one precision differ by rounding: fp32 by 1e-6 of the largest logit, bf16 by 1e-3 and more.
PARITY_TOLERANCE = 3e-4


@dataclass(frozen=True)
class Timing:
    """One engine with one number of threads: median microseconds of each segment on one image, (E,)."""

    backend: str
    threads: int
    segments_us: tuple[float, ...]

    @property
    def total_us(self) -> float:
        """Of an image that runs to the last exit."""
        return sum(self.segments_us)


@dataclass(frozen=True)
class Tuning:
    """What was measured.

    Attributes:
        versions: of `PACKAGES`, those that were installed.
        timings: in the order of the catalogue, then by threads.
        skipped: engine to the reason why it was not timed.
    """

    versions: Mapping[str, str]
    timings: tuple[Timing, ...]
    skipped: Mapping[str, str]


@dataclass(frozen=True)
class Stored:
    """The tuning on this device; None where there is none to rely on, and `note` says why."""

    tuning: Tuning | None
    note: str


@dataclass(frozen=True)
class Choice:
    """An engine of the catalogue and its threads; `measured` if `auto` took them for that; why, in words."""

    backend: str
    threads: int
    measured: bool
    reason: str


@dataclass(frozen=True)
class Row:
    """One line of an explanation.

    Attributes:
        timing: what was measured.
        state: "chosen", "usable" (calibrated, or as good as what is) or "not calibrated".
        command: calibrates it, where that would make answers faster.
    """

    timing: Timing
    state: str
    command: str | None


@dataclass(frozen=True)
class Explanation:
    """What `auto` takes for a bundle on this device, and everything it was held against."""

    choice: Choice
    rows: tuple[Row, ...]
    skipped: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        rows = [
            {**asdict(row.timing), "total_us": row.timing.total_us, "state": row.state, "command": row.command}
            for row in self.rows
        ]
        return {"chosen": asdict(self.choice), "rows": rows, "skipped": dict(self.skipped)}


def choose(bundle: Bundle, backend: str = AUTO, threads: int | None = None) -> Choice:
    """What to open.

    Args:
        bundle: an opened bundle.
        backend: one of `ENGINES`, which is then taken, or "auto".
        threads: taken as given; None takes the fastest measured, else 1.

    Raises:
        UsageError: no such engine, or less than one thread.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"threads must be at least 1, found {threads}")
    if backend != AUTO:
        find(backend)
        if threads is not None:
            return Choice(backend, threads, False, "as asked for")
    stored = load(bundle)
    timings = stored.tuning.timings if stored.tuning else ()
    fit = _serving(bundle, timings) if backend == AUTO else [one for one in timings if one.backend == backend]
    fit = [one for one in fit if one.threads == threads] or fit
    if not fit:
        name = DEFAULT if backend == AUTO else backend
        return Choice(name, threads or 1, False, stored.note or "nothing that was measured here can serve it")
    best = _fastest(fit)
    return Choice(best.backend, threads or best.threads, backend == AUTO, "the fastest measured here")


def open_chosen(bundle: Bundle, choice: Choice) -> Backend:
    """Open it. Raises as `open_backend`; what a measurement chose says so."""
    try:
        return open_backend(bundle, choice.backend, choice.threads)
    except (MissingExtra, BackendError) as error:
        if not choice.measured:
            raise
        raise type(error)(
            f"{error} ({choice.backend} was the fastest when measured; mexit bench {bundle.path} --tune measures "
            f"again, --backend {DEFAULT} does without)"
        ) from error


def explain(bundle: Bundle) -> Explanation:
    """Why `auto` is what it is."""
    stored, choice = load(bundle), choose(bundle)
    timings = stored.tuning.timings if stored.tuning else ()
    serving = _serving(bundle, timings)
    chosen = [one for one in serving if (one.backend, one.threads) == (choice.backend, choice.threads)]
    limit = chosen[0].total_us if chosen else float("inf")
    rows = []
    for one in timings:
        state = "chosen" if one in chosen else "usable" if one in serving else "not calibrated"
        faster = one not in serving and one.total_us < limit
        command = f"mexit calibrate {bundle.path} --backend {one.backend}" if faster else None
        rows.append(Row(one, state, command))
    return Explanation(choice, tuple(rows), stored.tuning.skipped if stored.tuning else {})


def load(bundle: Bundle) -> Stored:
    """What was measured here before, unless it is missing, damaged or older than the installed packages."""
    try:
        tuning = read_value(read_json(cache_folder(bundle.id) / FILE, "measurement"), Tuning, FILE)
    except NotFound:
        return Stored(None, "not measured on this device")
    except MexitError:
        return Stored(None, "the measurement of this device cannot be read")
    now, then = versions(), tuning.versions
    changed = sorted(name for name in {*now, *then} if now.get(name) != then.get(name))
    if changed:
        return Stored(None, f"measured before {', '.join(changed)} changed")
    if not all(_sane(one, len(bundle.manifest.exits)) for one in tuning.timings):
        return Stored(None, "the measurement of this device cannot be read")
    return Stored(tuning, "")


def save(bundle: Bundle, tuning: Tuning) -> Path:
    """Keep it for this device. Raises `MexitError` where the cache folder cannot be written."""
    path = cache_folder(bundle.id) / FILE
    keep_fact(path, asdict(tuning))
    return path


def measure(bundle: Bundle, seconds: float = 1.0, *, builds: bool = True) -> Tuning:
    """Time every engine that opens here.

    Args:
        bundle: an opened bundle.
        seconds: of timing, after the engines were opened; more where `MIN_ROUNDS` take longer.
        builds: also time engines that may first have to be built.
    """
    image = np.random.default_rng(0).random((1, *bundle.manifest.input.shape), np.float32)
    candidates, skipped = [], {}
    for name, engine in ENGINES.items():
        if engine.builds and not builds:
            skipped[name] = "it may have to be built first, which mexit bench --tune does"
            continue
        try:
            candidates += _open_settings(bundle, name, image)
        except MexitError as error:
            skipped[name] = str(error)
    candidates, differing = _agreeing(candidates)
    rounds = _take_turns(candidates, image, seconds)
    timings = [
        replace(one.timing, segments_us=tuple(float(value) for value in np.median(times, axis=0)))
        for one, times in zip(candidates, rounds, strict=True)
    ]
    return Tuning(versions(), tuple(timings), {**skipped, **differing})


def versions() -> dict[str, str]:
    """Those of `PACKAGES` that are installed."""
    return installed_versions(PACKAGES)


@dataclass(frozen=True)
class _Candidate:
    """An opened engine, its timing to be, and its logits on the image, (E, C)."""

    timing: Timing
    opened: Backend
    logits: NDArray[np.float32]


def _open_settings(bundle: Bundle, name: str, image: NDArray[np.float32]) -> list[_Candidate]:
    """One engine with every number of threads, each warmed up."""
    found: list[_Candidate] = []
    begin, threads = time.perf_counter(), 1
    most = 1 if find(name).builds else read_limits().threads
    while threads <= most and (not found or time.perf_counter() - begin < OPENING_S):
        opened = open_backend(bundle, name, threads)
        for _ in range(WARM_UP):
            logits = _run(opened, image)[1]
        found.append(_Candidate(Timing(name, threads, ()), opened, logits))
        threads = most if threads < most < 2 * threads else 2 * threads
    return found


def _agreeing(candidates: list[_Candidate]) -> tuple[list[_Candidate], dict[str, str]]:
    """Without engines that say fp32 and compute something else: thresholds of fp32 would not hold for them."""
    parity = [one for one in candidates if _is_parity(one.timing.backend)]
    differing = {}
    for one in parity[1:]:
        expected = parity[0].logits
        difference = float(np.abs(one.logits - expected).max() / max(1.0, np.abs(expected).max()))
        if not difference <= PARITY_TOLERANCE:
            differing[one.timing.backend] = (
                f"its logits differ from those of {parity[0].timing.backend} by {difference:.1e} of the largest; "
                f"{PARITY_TOLERANCE:.0e} is the most that {PARITY} explains"
            )
    return [one for one in candidates if one.timing.backend not in differing], differing


def _take_turns(
    candidates: list[_Candidate], image: NDArray[np.float32], seconds: float
) -> list[list[list[float]]]:
    """Microseconds per candidate, round and segment. Each round starts with another: noise meets all alike."""
    found: list[list[list[float]]] = [[] for _ in candidates]
    begin, count = time.perf_counter(), len(candidates)
    for number in range(MAX_ROUNDS):
        if number >= MIN_ROUNDS and time.perf_counter() - begin > seconds:
            break
        for place in range(count):
            place = (place + number) % count
            found[place].append(_run(candidates[place].opened, image)[0])
    return found


def _run(backend: Backend, image: NDArray[np.float32]) -> tuple[list[float], NDArray[np.float32]]:
    """Microseconds of each segment, and the logits of each exit, (E, C)."""
    carried, spent, logits = backend.carry(image), [], []
    for segment in backend.segments:
        begin = time.perf_counter()
        carried, row = segment.run(carried)
        spent.append((time.perf_counter() - begin) * 1e6)
        logits.append(row[0])
    return spent, np.array(logits)


def _serving(bundle: Bundle, timings: Sequence[Timing]) -> list[Timing]:
    """Those whose thresholds exist; without any, those that compute in the reference precision."""
    try:
        policies = bundle.policies()
    except MexitError:  # damaged ones are reported where they are needed
        return [one for one in timings if _is_parity(one.backend)]
    return [one for one in timings if _is_calibrated(policies, one.backend)]


def _is_calibrated(policies: Policies, name: str) -> bool:
    engine = ENGINES[name]
    try:
        policies.usable(engine.engine, engine.precision, engine.variant)
    except NotCalibrated:
        return False
    return True


def _is_parity(name: str) -> bool:
    return (ENGINES[name].precision, ENGINES[name].variant) == (PARITY, PARITY)


def _fastest(timings: Sequence[Timing]) -> Timing:
    limit = AS_FAST * min(one.total_us for one in timings)
    order = list(ENGINES)
    near = [one for one in timings if one.total_us <= limit]
    return min(near, key=lambda one: (one.threads, order.index(one.backend)))


def _sane(timing: Timing, exits: int) -> bool:
    good = timing.backend in ENGINES and timing.threads >= 1 and len(timing.segments_us) == exits
    return good and all(0 < value < float("inf") for value in timing.segments_us)
