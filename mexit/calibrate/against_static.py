"""Compares a policy with the static network on a trace: mean cost, and the paired difference of the accuracies."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mexit.calibrate.clusters import Estimate, mean_with_error
from mexit.calibrate.trace_evaluator import TraceEvaluator
from mexit.core.cost import Costs
from mexit.core.exit_policy import Policy
from mexit.core.trace import Trace


@dataclass(frozen=True)
class StaticComparison:
    """A policy against the static network on the same samples.

    Attributes:
        n: number of samples.
        cost: mean cost of the policy, in the unit of the costs.
        accuracy_change: accuracy of the policy minus that of the static network, a share; None without labels. The
            standard error is that of the paired differences, and counts groups where the trace has them.
    """

    n: int
    cost: Estimate
    accuracy_change: Estimate | None


def compare_with_static(trace: Trace, policy: Policy, costs: Costs) -> StaticComparison:
    """Compare a policy with the static network, which answers with the last exit alone.

    Args:
        trace: logits of every exit, (E, N, C).
        policy: scorer and thresholds; without any threshold it is the static network itself.
        costs: of leaving at each exit.

    Raises:
        BadInput: the trace has another number of exits than the costs.
    """
    evaluator = TraceEvaluator.of(trace, policy.scorer(trace.logits.shape[2]), costs)
    cost, change = evaluator.cost(policy.thresholds), None
    if trace.labels is not None and all(threshold is None for threshold in policy.thresholds):
        change = Estimate(0.0, 0.0, cost.groups, cost.dof)
    elif trace.labels is not None:
        static = trace.logits[-1].argmax(axis=1) == trace.labels
        change = mean_with_error(evaluator.hits(policy.thresholds).astype(np.float64) - static, trace.groups)
    return StaticComparison(trace.logits.shape[1], cost, change)
