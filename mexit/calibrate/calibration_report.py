"""What a calibration found, as plain values for JSON and pictures: scores, reliability, promised against seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mexit.calibrate.calibration import CalibrationResult
from mexit.calibrate.temperature import expected_calibration_error
from mexit.core.scores import Floats, Scorer
from mexit.core.trace import Trace

BINS = 10


def report(found: CalibrationResult, certification: Trace) -> dict[str, Any]:
    """Everything about one calibration; measured on the certification trace, which chose nothing."""
    return {
        "scores": [
            {"measure": one.measure, "ensemble": one.ensemble, "auroc": [_plain(value) for value in one.auroc]}
            for one in found.scores
        ],
        "chosen": {"measure": found.scorer.measure, "ensemble": found.scorer.ensemble},
        "temperatures": list(found.scorer.temperatures),
        "reliability": reliability(found.scorer, certification),
        "promised_against_seen": [
            {
                "budget_macs": point.budget_macs,
                "calibration": _outcome(point.calibration),
                "held_out": _outcome(point.held_out),
                "attacked": _outcome(point.attacked),
            }
            for point in found.frontier
        ],
    }


def reliability(scorer: Scorer, trace: Trace) -> list[dict[str, Any]]:
    """Per exit: expected calibration error before and after temperature, and the bins of the diagram."""
    if trace.labels is None:
        return []
    plain = Scorer(scorer.measure, False, (1.0,) * len(scorer.temperatures), scorer.classes)
    rows: list[dict[str, Any]] = []
    states = [one.start(len(trace.labels)) for one in (plain, scorer)]
    for k, logits in enumerate(trace.logits, start=1):
        seen = []
        for place, one in enumerate((plain, scorer)):
            states[place], probabilities, _ = one.step(k, logits, states[place])
            seen.append((probabilities.max(axis=1), probabilities.argmax(axis=1) == trace.labels))
        errors = [expected_calibration_error(np.nan_to_num(confidence), right) for confidence, right in seen]
        rows.append({"exit": k, "ece_before": errors[0], "ece": errors[1], "bins": _bins(*seen[1])})
    return rows


def _bins(confidence: Floats, right: NDArray[np.bool_]) -> list[dict[str, float]]:
    places = np.minimum((np.nan_to_num(confidence) * BINS).astype(int), BINS - 1)
    return [
        {
            "confidence": float(confidence[places == place].mean()),
            "accuracy": float(right[places == place].mean()),
            "n": int((places == place).sum()),
        }
        for place in np.unique(places)
    ]


def _outcome(outcome: Any) -> Mapping[str, Any] | None:
    return None if outcome is None else {"mean_macs": outcome.mean_macs, "accuracy": outcome.accuracy}


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
