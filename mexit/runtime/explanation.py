"""What every exit answers for one image, and at which exit the policy of a budget lets the image leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mexit.core.budget import Budget
from mexit.core.exit_policy import LOWEST, first_exit
from mexit.errors import BadInput
from mexit.runtime.engine import runs_static
from mexit.runtime.policy_selection import PolicyChoice
from mexit.runtime.prediction import UNSURE
from mexit.runtime.reference import run_all_exits
from mexit.runtime.runtime import Runtime


@dataclass(frozen=True)
class ExitAnswer:
    """The answer of one exit.

    Attributes:
        exit: number of the exit in the network, from 1.
        macs: MACs of leaving there, earlier heads included.
        us: microseconds of leaving there by the latency profile; None where budgets are in MACs.
        probabilities: of all classes, (C,) float64.
        score: confidence score in units of the policy's measure; NaN for logits that are not finite.
        threshold: the score at which an image leaves there; None if no image leaves there. The last exit has none.
    """

    exit: int
    macs: int
    us: float | None
    probabilities: NDArray[np.float64]
    score: float
    threshold: float | None

    @property
    def everything(self) -> bool:
        """Whether every image that comes to this exit leaves there."""
        return self.threshold == LOWEST


@dataclass(frozen=True)
class Explanation:
    """Why an image leaves where it leaves.

    Attributes:
        budget: the budget as typed.
        measure: confidence score of the policy, one of `scores.MEASURES`.
        exits: the answers of all exits, in order.
        exit: number of the exit at which the image leaves; the last one for the static network.
        reason: "confident", "last" or "unsure".
        index: predicted class, from 0; None if the answer is unsure.
        macs: cost of the answer within the budget, MACs.
        static: whether the budget runs the static network, so that no exit but the last one is computed.
        static_macs: cost of the static network, MACs.
    """

    budget: str
    measure: str
    exits: tuple[ExitAnswer, ...]
    exit: int
    reason: str
    index: int | None
    macs: int
    static: bool
    static_macs: int


def explain(runtime: Runtime, image: NDArray[np.float32], budget: str | Budget | None = None) -> Explanation:
    """Run one image through all segments, and decide as the policy of a budget does without a deadline.

    The image costs the MACs of all segments. `Runtime.stats` does not count it, and no tokens are taken.

    Args:
        runtime: the opened bundle.
        image: (1, C, H, W) float32 in [0, 1], as `Runtime.prepare` returns it.
        budget: default `runtime.budget`.

    Raises:
        BadInput: not one image.
        BudgetInfeasible, NotCalibrated, UsageError: see `Runtime.open`.
    """
    if len(image) != 1:
        raise BadInput(f"one image is explained at a time, found {len(image)}")
    request = runtime.begin(image, budget=budget)
    return _explain(runtime, request.choice, request.budget.text, run_all_exits(runtime.backend, image))


def _explain(runtime: Runtime, choice: PolicyChoice, budget: str, logits: NDArray[np.float32]) -> Explanation:
    manifest, policy = runtime.bundle.manifest, choice.policy
    scorer = policy.scorer(len(manifest.classes))
    state, probabilities, scores = scorer.start(1), [], []
    for k, exit_logits in enumerate(logits, start=1):
        state, exit_probabilities, score = scorer.step(k, exit_logits, state)
        probabilities.append(exit_probabilities[0])
        scores.append(float(score[0]))
    last = len(scores)
    k = int(first_exit(np.array(scores)[:, None], policy.thresholds)[0])
    any_exit = runtime.rate_limiter is not None
    static = runs_static(runtime.backend, policy, last, any_exit=any_exit)
    unsure = policy.unsure(np.array([k]), np.array([scores[k - 1]]), np.array([k < last]))
    withheld = unsure is not None and bool(unsure[0])
    static_macs = int(runtime.costs.static)
    return Explanation(
        budget=budget,
        measure=policy.measure,
        exits=_answers(runtime, probabilities, scores, (*policy.thresholds, None)),
        exit=manifest.numbers[k - 1],
        reason=UNSURE if withheld else "confident" if k < last else "last",
        index=None if withheld else int(probabilities[k - 1].argmax()),
        macs=static_macs if static else manifest.cumulative_macs[k - 1],
        static=static,
        static_macs=static_macs,
    )


def _answers(
    runtime: Runtime,
    probabilities: Sequence[NDArray[np.float64]],
    scores: Sequence[float],
    thresholds: Sequence[float | None],
) -> tuple[ExitAnswer, ...]:
    manifest = runtime.bundle.manifest
    times: Sequence[float | None] = [None] * len(scores)
    if runtime.timing is not None:
        times = runtime.timing.profile.exits_us
    columns = zip(manifest.numbers, manifest.cumulative_macs, times, probabilities, scores, thresholds, strict=True)
    return tuple(ExitAnswer(*column) for column in columns)
