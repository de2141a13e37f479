"""Chooses the exits that a bundle keeps, and merges the segments between them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from mexit.calibrate.exit_choice import (
    MAX_LOSS,
    MEASURABLE,
    MIN_SAMPLES,
    ExitChoice,
    ExitSearch,
    SegmentTimes,
    choose_exits,
    shortlist,
)
from mexit.core.manifest import InputSpec
from mexit.core.progress import Progress
from mexit.core.trace import Origin, Trace
from mexit.data.dataset import DataSet, evenly_spaced, split_batches
from mexit.data.splits import Splits
from mexit.errors import UsageError
from mexit.export.merge import merge_segments
from mexit.export.onnx_export import OnnxSegment
from mexit.flows.calibrate import record_samples
from mexit.flows.sample_sources import BATCH, SampleBatches
from mexit.flows.segment_chain import RunSegment, ort_runner, run_chain
from mexit.flows.segment_times import SegmentTimer
from mexit.runtime.latency_profile import Profile

AUTO, ALL = "auto", "all"
SPLITS = ("selection", "calibration")
MAX_SAMPLES = 2000  # of each split
PICTURES = 8  # on which segments are timed
POINTS = 100
_NUMBER = re.compile("[1-9][0-9]{0,5}")
_SHOWN = 60  # characters of an option in a message


@dataclass(frozen=True)
class KeptExits:
    """The exits that a bundle keeps.

    Attributes:
        numbers: of the exits in the network, from 1, the last one included.
        record: what `bundle.json` says about them under `provenance.exits`: `option`, `kept`, `dropped` (the reason
            of each), and the measured `choice` of "auto".
        text: the choice for people; empty if all exits were to be kept.
    """

    numbers: tuple[int, ...]
    record: Mapping[str, Any]
    text: str

    def merge(self, segments: Sequence[OnnxSegment]) -> list[OnnxSegment]:
        """The segments of all exits, merged to those of the kept exits."""
        return [merge_segments(segments[before:after]) for before, after in pairwise((0, *self.numbers))]


def check_option(option: str) -> None:
    """Check the option `--exits`. Raises `UsageError` unless it is "auto", "all" or numbers such as "1,3,7"."""
    if option not in (AUTO, ALL):
        _numbers(option)


def check_profile(profile: Profile, exits: int) -> None:
    """Check the number of exits of a profile for `choose`. Raises `UsageError`."""
    if len(profile.exits_us) != exits:
        raise UsageError(
            f"the latency profile has {len(profile.exits_us)} exits and the network {exits}: measure one with a bundle "
            "that mexit export --exits all made of this run"
        )


def keep_all(exits: int) -> KeptExits:
    """All exits of a network."""
    numbers = tuple(range(1, exits + 1))
    return KeptExits(numbers, {"option": ALL, "kept": numbers, "dropped": {}}, "")


def keep_named(option: str, exits: int) -> KeptExits:
    """The exits of an option such as "1,3,7", and the last one. Raises `UsageError` for an exit that does not exist."""
    named = _numbers(option)
    if named[-1] > exits:
        raise UsageError(f"--exits {option}: the network has the exits 1 to {exits}")
    numbers = tuple(sorted({*named, exits}))
    dropped = {str(k): "not among the exits that --exits names" for k in range(1, exits + 1) if k not in numbers}
    kept = ", ".join(map(str, numbers))
    return KeptExits(numbers, {"option": option, "kept": numbers, "dropped": dropped}, f"the exits {kept} are kept")


def keep_as_recorded(record: Mapping[str, Any]) -> KeptExits:
    """The exits that an earlier export chose."""
    numbers = tuple(record["kept"])
    kept = ", ".join(map(str, numbers))
    return KeptExits(numbers, record, f"the exits {kept} are kept, as the bundle of the same weights has them")


def choose(
    segments: Sequence[OnnxSegment],
    data: DataSet,
    splits: Splits,
    spec: InputSpec,
    progress: Progress,
    profile: Profile | None = None,
) -> KeptExits:
    """Choose the exits that save time, by `calibrate.exit_choice` on traces of the segments in float32.

    Args:
        segments: of all exits, float32.
        data, splits, spec: the samples of the selection and the calibration split judge the subsets of exits.
        progress: receives the progress.
        profile: times of a bundle with all exits on another device; None measures the segments on this machine.

    Returns:
        The choice; all exits where the splits have too few samples for one.
    """
    exits = len(segments)
    if exits == 1:
        return keep_all(exits)
    sizes = [len(splits.part(split)) for split in SPLITS]
    if min(sizes) < MIN_SAMPLES:
        found = " and ".join(map(str, sizes))
        text = (
            f"all exits are kept: a choice needs {MIN_SAMPLES} samples in each of {' and '.join(SPLITS)}, found {found}"
        )
        return replace(keep_all(exits), text=text)
    chain = [ort_runner(segment) for segment in segments]
    parts = [_trace(chain, data, splits, spec, split, progress) for split in SPLITS]
    if profile is not None:
        choice = choose_exits(*_profiled(profile, parts))
        engine = f"{profile.engine} {profile.precision}, {profile.threads} thread(s), from a profile"
        return KeptExits(choice.kept, _record(choice, engine), _text(choice, "in the profile"))
    pictures = data.batch(evenly_spaced(splits.part("calibration"), PICTURES), spec)
    timer = SegmentTimer(segments, pictures, progress)
    choice = choose_exits(*_measured(timer, parts, exits))
    return KeptExits(choice.kept, _record(choice, "ort fp32, 1 thread"), _text(choice, "in ort fp32 on this machine"))


def _profiled(profile: Profile, parts: Sequence[Trace]) -> tuple[ExitSearch, tuple[int, ...]]:
    """The search with times estimated from those of all exits, and its candidates.

    Leaving at exit k runs k segments. What that takes above the static network is spread evenly over the cuts.
    """
    exits = len(profile.exits_us)
    cut_us = max(0.0, profile.exits_us[-1] - profile.static_us) / (exits - 1)
    prefix_us = np.maximum.accumulate([us - k * cut_us for k, us in enumerate(profile.exits_us)])
    search = ExitSearch(parts, SegmentTimes.from_prefixes(prefix_us.tolist(), cut_us))
    return search, tuple(range(1, exits + 1)) if exits <= MEASURABLE else shortlist(search)


def _measured(timer: SegmentTimer, parts: Sequence[Trace], exits: int) -> tuple[ExitSearch, tuple[int, ...]]:
    """The search with measured times, and its candidates."""
    candidates = tuple(range(1, exits + 1))
    if exits > MEASURABLE:
        prefixes, singles = [(0, j) for j in candidates], list(pairwise((0, *candidates)))
        measured = timer.times(dict.fromkeys([*prefixes, *singles]))
        cut_us = max(0.0, sum(measured.us[pair] for pair in singles) - measured.static_us) / (exits - 1)
        estimates = SegmentTimes.from_prefixes([measured.us[pair] for pair in prefixes], cut_us)
        candidates = shortlist(ExitSearch(parts, estimates))
    places = (0, *candidates)
    times = timer.times([(i, j) for j in candidates for i in places if i < j])
    return ExitSearch(parts, times), candidates


def _trace(
    chain: Sequence[RunSegment], data: DataSet, splits: Splits, spec: InputSpec, split: str, progress: Progress
) -> Trace:
    index = evenly_spaced(splits.part(split), MAX_SAMPLES)
    batches = ((data.batch(rows, spec), data.labels[rows], rows) for rows in split_batches(index, BATCH))
    samples = SampleBatches(split, "clean", len(index), batches, splits.groups_of(index))
    origin = Origin("", "fp32", "ort", "fp32", split, "clean", data.sha256)
    return record_samples(lambda images: run_chain(chain, images), samples, origin, progress)


def _record(choice: ExitChoice, engine: str) -> dict[str, Any]:
    values = asdict(choice)
    kept = values.pop("kept")
    dropped = {str(k): why for k, why in values.pop("dropped").items()}
    measured = {name: round(value, 4) for name, value in values.items()}
    return {"option": AUTO, "kept": kept, "dropped": dropped, "choice": {"engine": engine, **measured}}


def _text(choice: ExitChoice, where: str) -> str:
    static = f"the static network takes {choice.static_us:.0f} us {where}"
    if len(choice.kept) == 1:
        return f"no early exit saves time: {static}; every budget equals full (--exits all keeps every exit)"
    saved = 1 - choice.mean_us / choice.static_us
    kept = ", ".join(map(str, choice.kept))
    return (
        f"the exits {kept} are kept (--exits all keeps every exit): they save {saved:.0%} of the time at a loss of "
        f"{POINTS * choice.loss:.1f} points (standard error {POINTS * choice.loss_error:.1f})\n"
        f"{static}; with such thresholds, which mexit calibrate --target-drop {MAX_LOSS:g} selects, "
        f"{choice.mean_us:.0f} us"
    )


def _numbers(option: str) -> list[int]:
    parts = [part.strip() for part in option.split(",")]
    if not all(_NUMBER.fullmatch(part) for part in parts):
        raise UsageError(f"--exits is auto, all or the numbers of exits such as 1,3,7; found '{option[:_SHOWN]}'")
    return sorted({int(part) for part in parts})
