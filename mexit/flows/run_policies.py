"""The policies of a run without a bundle, from the logits of its torch network."""

from __future__ import annotations

from collections.abc import Sequence

from mexit.calibrate.calibration import CalibrationConfig, CalibrationTraces, calibrate
from mexit.core.budget import NAMED_FRACTIONS, Budget
from mexit.core.exit_policy import Policy
from mexit.core.policies_file import PARITY
from mexit.core.progress import Progress
from mexit.core.trace import Origin, Trace
from mexit.evaluate.target import BudgetPolicy, EvaluationTarget
from mexit.flows.calibrate import record_samples
from mexit.flows.calibration_source import default_attack, network_attack
from mexit.flows.sample_sources import DatasetSource, SampleBatches


def run_policies(target: EvaluationTarget, names: Sequence[str], progress: Progress) -> dict[str, BudgetPolicy]:
    """Select the thresholds of a run as `mexit calibrate` selects them for its bundle. Nothing is stored.

    Temperatures, score and thresholds come from the calibration split: clean, and under the average attack unless the
    run was trained on clean images.

    Args:
        target: the run.
        names: budgets, such as "medium" or "30%".
        progress: receives progress.

    Returns:
        The policy of each budget.

    Raises:
        UsageError: a text is not a budget.
        BudgetInfeasible: a budget is below the cost of exit 1.
    """
    own = {name: Budget.parse(name) for name in names if name not in NAMED_FRACTIONS}
    for budget in own.values():
        budget.cost(target.costs)
    name = default_attack(target.source.settings.to_json())
    attack = None if name == "none" else network_attack(target.source, name)
    source = DatasetSource(target.data, target.splits, target.input, attack)
    origin = Origin(str(target.path), PARITY, "torch", PARITY, "", "", target.data.sha256)

    def trace(samples: SampleBatches) -> Trace:
        return record_samples(target.run_batch, samples, origin, progress)

    attacked = source.attacked("calibration")
    traces = CalibrationTraces(
        trace(source.clean("calibration")),
        trace(attacked) if attacked else None,
        trace(source.clean("certification")),
        None,  # it selects nothing
    )
    result = calibrate(traces, target.costs, CalibrationConfig(budgets=own))
    policies = {}
    for name in names:
        point, scorer = result.frontier[result.named[name]], result.scorer
        policy = Policy(scorer.measure, scorer.ensemble, scorer.temperatures, point.thresholds).alone
        policies[name] = BudgetPolicy(policy, point.budget_macs, target.costs.of_exits(policy.thresholds))
    return policies
