"""Triton Python model: answers each image at the first exit whose score reaches the threshold of the budget.

`mexit export --triton` writes this file as `model.py`, with `policy.json` beside it. It runs the segments, which are
models of the same server, by inference requests (business logic scripting), and sends only the rows that have not left
to the next one. It needs numpy and Triton 23.09 or later. Scores are computed as in `mexit.core.scores`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

BUDGET = "mexit_budget"  # the only request parameter
UNSURE_LABEL = -1
OUTPUT_TYPES = {"probabilities": "f4", "label": "i8", "confidence": "f4", "exit": "i4", "macs": "i8"}
SMALLEST_SUM = 1e-280  # a smaller sum of weights has lost digits to subnormal numbers
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)\s*(%|ms|[kMG]?)")
_SCALES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
Floats = NDArray[np.float64]
Arrays = dict[str, NDArray[Any]]


class TritonPythonModel:
    """The model that clients call. Triton calls `initialize` once and then `execute`."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Read the policy. `args["model_config"]` is `config.pbtxt` as JSON; its parameter "budget" is the default."""
        self._bundle = json.loads((Path(__file__).parent / "policy.json").read_text("utf-8"))
        parameters = json.loads(args["model_config"]).get("parameters", {})
        self._default = parameters.get("budget", {}).get("string_value", self._bundle["default_budget"])
        select_policy(self._bundle, self._default)  # an infeasible default fails when the model is loaded

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer requests. The rows of those with the same policy run as one batch.

        Args:
            requests: of Triton's dynamic batcher, together at most `max_batch_size` rows.

        Returns:
            One response per request, in order; an error for a request that is not valid.

        Raises:
            TritonModelException: a segment failed.
        """
        responses: list[Any] = [None] * len(requests)
        batches: dict[int, list[tuple[int, NDArray[np.float32]]]] = {}
        for place, request in enumerate(requests):
            try:
                policy, images = self._read(request)
                batches.setdefault(policy, []).append((place, images))
            except ValueError as error:
                refusal = pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
                responses[place] = pb_utils.InferenceResponse(output_tensors=[], error=refusal)
        for policy, batch in batches.items():
            answers = self._answer(np.concatenate([images for _, images in batch]), self._bundle["policies"][policy])
            first = 0
            for place, images in batch:
                rows = slice(first, first + len(images))
                tensors = [pb_utils.Tensor(name, array[rows]) for name, array in answers.items()]
                responses[place] = pb_utils.InferenceResponse(output_tensors=tensors)
                first += len(images)
        return responses

    def _read(self, request: Any) -> tuple[int, NDArray[np.float32]]:
        """The index of the policy and the images (B, C, H, W) of a request. Raises `ValueError`."""
        parameters = json.loads(request.parameters() or "{}")
        unknown = [name for name in parameters if name.startswith("mexit_") and name != BUDGET]
        if unknown:
            raise ValueError(f"unknown parameter '{unknown[0][:70]}': the only one is {BUDGET}")
        images = pb_utils.get_input_tensor_by_name(request, self._bundle["input"]).as_numpy()
        if not images.size or not (images.min() >= 0 and images.max() <= 1):  # false for NaN
            raise ValueError("expected at least one image with values in [0, 1], found others; divide 0..255 by 255")
        return select_policy(self._bundle, parameters.get(BUDGET, self._default)), images

    def _answer(self, images: NDArray[np.float32], policy: Mapping[str, Any]) -> Arrays:
        """The outputs of B images, each (B, 1) but the probabilities, (B, C)."""
        bundle, count = self._bundle, len(images)
        static = policy["static"]  # the static network runs in place of the segments
        steps = [bundle["static"]] if static else bundle["segments"]
        temperatures = bundle["temperatures"][-1:] if static else bundle["temperatures"]
        shape = (count, len(bundle["classes"]))
        scorer = Scorer(bundle["measure"], policy["ensemble"], temperatures, shape)
        sizes = {"probabilities": shape}
        outputs: Arrays = {name: np.zeros(sizes.get(name, (count, 1)), kind) for name, kind in OUTPUT_TYPES.items()}
        rows, features = np.arange(count), [images]
        for k, step in enumerate(steps):
            *features, logits = self._run(step, features)
            probabilities, scores = scorer.add(logits)
            last = k == len(steps) - 1
            threshold = None if last else policy["thresholds"][k]
            confident = np.zeros(len(rows), bool) if threshold is None else scores >= threshold
            leaving = confident | last
            place = -1 if static else k  # of the exit among those of the bundle
            unsure = _unsure(policy, place, confident, scores)
            answers = {
                "probabilities": probabilities,
                "label": np.where(unsure, UNSURE_LABEL, probabilities.argmax(axis=1))[:, None],
                "confidence": probabilities.max(axis=1, keepdims=True),
                "exit": np.full((len(rows), 1), bundle["exits"][place]),
                "macs": np.full((len(rows), 1), bundle["static_macs"] if static else bundle["exit_macs"][k]),
            }
            for name, values in answers.items():
                outputs[name][rows[leaving]] = values[leaving]
            if leaving.all():
                break
            rows, features = rows[~leaving], [feature[~leaving] for feature in features]
            scorer.keep(~leaving)
        return outputs

    def _run(self, step: Mapping[str, Any], inputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """Run a segment by an inference request; returns its outputs, logits last, in the memory of the host."""
        response = pb_utils.InferenceRequest(
            model_name=step["model"],
            requested_output_names=step["outputs"],
            inputs=[pb_utils.Tensor(name, array) for name, array in zip(step["inputs"], inputs, strict=True)],
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        ).exec()
        if response.has_error():
            raise pb_utils.TritonModelException(f"{step['model']}: {response.error().message()}")
        return [pb_utils.get_output_tensor_by_name(response, name).as_numpy() for name in step["outputs"]]


def select_policy(bundle: Mapping[str, Any], budget: Any) -> int:
    """The index of the policy of a budget: a name, MACs (12M), or a share of the static network's cost (40%).

    Raises:
        ValueError: the budget has another form, or no policy is within it.
    """
    names, static, first = bundle["budgets"], bundle["static_macs"], bundle["smallest_macs"]
    if isinstance(budget, str) and budget.strip() in names:
        return int(names[budget.strip()])
    match = _QUANTITY.fullmatch(budget.strip()) if isinstance(budget, str) else None
    if match is None or match[2] == "ms" or (match[2] == "%" and Decimal(match[1]) > 100):
        raise ValueError(
            f"{BUDGET} must be {', '.join(names)}, MACs (800k, 12M) or a share (40%), found {budget!r:.70}"
        )
    macs = float(Decimal(match[1]) * static / 100 if match[2] == "%" else Decimal(match[1]) * _SCALES[match[2]])
    limits = [limit for limit in bundle["limits"] if limit <= macs * (1 + 1e-9)]
    if macs < first or not limits:
        nearest = max(first, bundle["limits"][0])
        raise ValueError(f"{BUDGET} '{budget[:70]}' is {macs:.0f} MACs: the smallest feasible budget is {nearest:.0f}")
    return len(limits) - 1


def _unsure(policy: Mapping[str, Any], place: int, confident: NDArray[np.bool_], scores: Floats) -> NDArray[np.bool_]:
    """Which answers of the exit at `place` are unsure, (B,); none without a reject option. NaN is unsure."""
    if policy["reject"] is None:
        return np.zeros(len(scores), np.bool_)
    return np.asarray(~(confident & policy["selective"][place]) & ~(scores >= policy["reject"][place]))


class Scorer:
    """Probabilities and scores of the rows of one batch, exit by exit, as `mexit.core.scores.Scorer` computes them."""

    def __init__(self, measure: str, ensemble: bool, temperatures: Sequence[float], shape: tuple[int, int]) -> None:
        """Before the first exit; `shape` is (B, C), the other arguments are those of `policies.json`."""
        self._measure, self._ensemble, self._temperatures = measure, ensemble, temperatures
        self._exits = 0
        self._log_total = np.full(shape, -np.inf)  # log of the summed softmax of all exits so far
        self._predicted, self._agreed = np.full(shape[0], -1), np.zeros(shape[0], np.int64)

    def keep(self, rows: NDArray[np.bool_]) -> None:
        """Continue with some of the rows, a mask (B,)."""
        self._log_total, self._predicted, self._agreed = (
            array[rows] for array in (self._log_total, self._predicted, self._agreed)
        )

    def add(self, logits: NDArray[np.floating]) -> tuple[Floats, Floats]:
        """Add the next exit: its logits (B, C) to probabilities (B, C) and scores (B,)."""
        with np.errstate(all="ignore"):
            log_weights = np.divide(logits, self._temperatures[self._exits], dtype=np.float64)
            self._exits += 1
            if self._ensemble:
                shifted, weights = _weights(log_weights)
                own = shifted - np.log(weights.sum(axis=1, keepdims=True))
                log_weights = self._log_total = np.logaddexp(self._log_total, own)
            shifted, weights = _weights(log_weights)
            total = weights.sum(axis=1, keepdims=True)
            log_answer = log_weights - np.log(self._exits) if self._ensemble else shifted - np.log(total)
            predicted = log_answer.argmax(axis=1)
            self._agreed = np.where(predicted == self._predicted, self._agreed + 1, 1)
            self._predicted = predicted
            return weights / total, self._score(shifted, weights)

    def _score(self, shifted: Floats, weights: Floats) -> Floats:
        """Scores from log-weights (B, C), whose largest in each row is 0, and their exponentials."""
        if self._measure == "margin":
            return np.asarray(shifted.max(axis=1) - np.partition(shifted, -2, axis=1)[:, -2])
        top, others = shifted.argmax(axis=1), weights.copy()
        others[np.arange(len(others)), top] -= 1.0  # an assignment of 0 would remove a NaN
        rest = others.sum(axis=1)
        if self._measure == "entropy":
            logs = shifted - np.log1p(rest)[:, None]
            return np.asarray(np.where(np.isneginf(logs), 0.0, np.exp(logs) * logs).sum(axis=1))
        log_rest = _log_sum_others(shifted, top) if (rest < SMALLEST_SUM).any() else np.log(rest)
        if self._measure == "max-probability":
            return np.asarray(-log_rest)
        return np.asarray(self._agreed + 0.5 - np.arctan(log_rest) / np.pi)  # agreement


def _weights(log_weights: Floats) -> tuple[Floats, Floats]:
    """Log-weights (B, C), shifted so that the largest of each row is 0, and their exponentials."""
    shifted = log_weights - log_weights.max(axis=1, keepdims=True)
    return shifted, np.exp(shifted)


def _log_sum_others(shifted: Floats, top: NDArray[np.int64]) -> Floats:
    """log of the summed weights of all classes but the top one, (B,), where the weights are too small to add."""
    others = shifted.copy()
    others[np.arange(len(others)), top] -= np.inf
    largest = others.max(axis=1)
    safe = np.where(np.isneginf(largest), 0.0, largest)
    return np.asarray(safe + np.log(np.exp(others - safe[:, None]).sum(axis=1)))
