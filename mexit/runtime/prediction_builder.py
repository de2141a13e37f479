"""Builds the predictions of a request from the answers of the engine."""

from __future__ import annotations

from collections.abc import Sequence

from mexit.core.bundle import Bundle
from mexit.runtime.engine import Answers
from mexit.runtime.prediction import POLICY_REASONS, UNSURE, Prediction, Receipt
from mexit.runtime.request import Request


class PredictionBuilder:
    """Adds labels, numbers of exits, costs and receipts to answers."""

    def __init__(self, bundle: Bundle) -> None:
        manifest = bundle.manifest
        self._model, self._classes, self._numbers = bundle.id, manifest.classes, manifest.numbers
        self._exit_macs, self._static_macs = manifest.cumulative_macs, int(manifest.costs.static)

    def build(self, request: Request, answers: Answers, start_s: float, batch_rows: int | None) -> list[Prediction]:
        """The predictions of the next rows of a request; arguments as in `Runtime.complete`."""
        indices = answers.probabilities.argmax(axis=1).tolist()
        receipts: Sequence[Receipt | None] = [None] * len(indices)
        if request.receipts:
            receipts = self._receipts(request, answers, start_s, batch_rows)
        unsure = answers.unsure or [False] * len(indices)
        static, budget = self._static_macs, request.budget.text
        predictions = []
        for row, (k, index, withheld) in enumerate(zip(answers.exits, indices, unsure, strict=True)):
            macs, probabilities = static if answers.static else self._exit_macs[k - 1], answers.probabilities[row]
            predictions.append(
                Prediction(
                    index=None if withheld else index,
                    label=None if withheld else self._classes[index],
                    confidence=probabilities.item(index),
                    probabilities=probabilities,
                    exit=self._numbers[k - 1],
                    reason=UNSURE if withheld else answers.reasons[row],
                    macs=macs,
                    saved_macs=static - macs,
                    latency_ms=(answers.seconds[row] + start_s) * 1e3,
                    budget=budget,
                    receipt=receipts[row],
                )
            )
        return predictions

    def _receipts(
        self, request: Request, answers: Answers, start_s: float, batch_rows: int | None
    ) -> Sequence[Receipt]:
        segment_us = tuple(seconds * 1e6 for seconds in answers.segment_seconds)
        rows, queue_us = batch_rows or len(answers.exits), (request.queued_s + start_s) * 1e6
        return [
            Receipt(
                segment_us[:k],
                rows,
                queue_us,
                request.choice.certificates if reason in POLICY_REASONS else (),
                self._model,
            )
            for k, reason in zip(answers.exits, answers.reasons, strict=True)
        ]
