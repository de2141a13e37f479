"""Times merged segments at export: ONNX Runtime, one thread, batch 1, real pictures, the segments in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from mexit.calibrate.exit_choice import SegmentTimes
from mexit.core.exit_policy import HIGHEST
from mexit.core.progress import Progress
from mexit.core.scores import ScalarScorer, Scorer
from mexit.export.merge import merge_segments
from mexit.export.onnx_export import OnnxSegment
from mexit.flows.segment_chain import Arrays, ort_runner, ort_segment

SECONDS = 8.0  # of one measurement, without the time to load the segments
ROUNDS, MIN_ROUNDS, WARM_UP = 300, 7, 3
DECISIONS = 200
QUANTILE = 0.1  # of the rounds: other processes interrupt long segments more often than short ones, which moves medians

Pair = tuple[int, int]


class SegmentTimer:
    """Times the merged segments of one network. Results are kept, so that no segment is measured twice."""

    def __init__(self, segments: Sequence[OnnxSegment], pictures: NDArray[np.float32], progress: Progress) -> None:
        """Run the pictures through all segments.

        Args:
            segments: in float32, one per exit.
            pictures: (P, C, H, W), which the rounds take in turn.
            progress: shows the segments that are loaded and the rounds.
        """
        self._segments, self._progress = segments, progress
        self._features: list[list[Arrays]] = [[[picture[None]] for picture in pictures]]  # by exit, then by picture
        for segment in segments:
            run = ort_runner(segment)
            outputs = [run(arrays) for arrays in self._features[-1]]
            self._features.append([arrays[:-1] for arrays in outputs])
        self._decision_us = _decision_us(segments[0].outputs[-1].shape[1])
        self._us: dict[Pair, float] = {}

    def times(self, pairs: Iterable[Pair]) -> SegmentTimes:
        """Measure the segments from after exit i (0 = the image) to exit j, by (i, j), that were not measured yet.

        Args:
            pairs: with (0, E), the static network, in the first call.
        """
        missing = [pair for pair in pairs if pair not in self._us]
        self._us |= dict(zip(missing, self._measure(missing), strict=True))
        last = len(self._segments)
        decided = {pair: us + (self._decision_us if pair[1] < last else 0.0) for pair, us in self._us.items()}
        return SegmentTimes(decided, self._us[0, last])

    def _measure(self, pairs: Sequence[Pair]) -> list[float]:
        """Microseconds of each segment, undisturbed by other processes."""
        calls = []
        with self._progress.track("loading merged segments", len(pairs)) as advance:
            for pair in pairs:
                calls.append(self._load(pair))
                advance(1, f"{pair[0]} to {pair[1]}")
        times_us: list[list[float]] = []
        with self._progress.track("timing merged segments", int(SECONDS)) as advance:
            start, shown = time.perf_counter(), 0
            for number in range(WARM_UP + ROUNDS):
                times_us.append([call(number) for call in calls])
                elapsed = time.perf_counter() - start
                advance(int(elapsed) - shown, f"round {number + 1}")
                shown = int(elapsed)
                if elapsed > SECONDS and number >= WARM_UP + MIN_ROUNDS:
                    break
        return [float(value) for value in np.quantile(times_us[WARM_UP:], QUANTILE, axis=0)]

    def _load(self, pair: Pair) -> Callable[[int], float]:
        """A function that runs a merged segment on the picture of a round, and returns its microseconds."""
        before, after = pair
        segment = ort_segment(merge_segments(self._segments[before:after]))
        features = self._features[before]
        buffers = [np.empty_like(array) for array in features[0]], segment.buffers()
        run = segment.bind(*buffers)

        def timed(number: int) -> float:
            for buffer, array in zip(buffers[0], features[number % len(features)], strict=True):
                np.copyto(buffer, array)
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e6

        return timed


def _decision_us(classes: int) -> float:
    """Microseconds to score one answer and to compare it with a threshold."""
    scorer = Scorer("max-probability", False, (1.0,), classes)
    logits = np.linspace(0, 1, classes, dtype=np.float32)[None]
    times_us = []
    for _ in range(DECISIONS):
        start = time.perf_counter()
        row = ScalarScorer(scorer)
        row.add(logits)
        row.reaches(HIGHEST)
        times_us.append((time.perf_counter() - start) * 1e6)
    return float(np.quantile(times_us, QUANTILE))
