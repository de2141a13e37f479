"""What every exit answers for one image, as JSON: the answer to `POST /v1/explain`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mexit.runtime.explanation import ExitAnswer, Explanation

SHOWN_CLASSES = 5


def explanation_json(explanation: Explanation, classes: Sequence[str]) -> dict[str, Any]:
    """The JSON values of an explanation; `classes` are the names, (C,)."""
    index = explanation.index
    return {
        "budget": explanation.budget,
        "measure": explanation.measure,
        "exit": explanation.exit,
        "reason": explanation.reason,
        "index": index,
        "label": None if index is None else classes[index],
        "macs": explanation.macs,
        "static": explanation.static,
        "static_macs": explanation.static_macs,
        "exits": [_exit_json(answer, classes) for answer in explanation.exits],
    }


def _exit_json(answer: ExitAnswer, classes: Sequence[str]) -> dict[str, Any]:
    order = np.argsort(-answer.probabilities, kind="stable")[:SHOWN_CLASSES].tolist()
    shown = [
        {"index": index, "label": classes[index], "probability": round(float(answer.probabilities[index]), 6)}
        for index in order
    ]
    return {
        "exit": answer.exit,
        "macs": answer.macs,
        "us": answer.us,
        "score": round(answer.score, 6) if math.isfinite(answer.score) else None,
        "threshold": None if answer.threshold is None or answer.everything else round(answer.threshold, 6),
        "everything": answer.everything,
        "classes": shown,
    }
