"""The score formulas in torch equal those of core on any logits, and have gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from exit_logits import CLASSES, EXITS, example_logits, example_policy

from mexit.core.scores import MEASURES
from mexit.models.scores_torch import score_exits, straight_through

torch.set_num_threads(1)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("ensemble", [False, True], ids=["each exit alone", "ensemble"])
@pytest.mark.parametrize("kind", ["random", "extreme", "NaN"])
def test_scores_and_probabilities_equal_those_of_core(measure, ensemble, kind) -> None:
    logits, policy = example_logits(kind), example_policy(measure, ensemble)
    exit_scores = score_exits(policy, torch.from_numpy(logits))
    scorer = policy.scorer(CLASSES)
    state = scorer.start(logits.shape[1])
    for k in range(1, EXITS + 1):
        state, probabilities, scores = scorer.step(k, logits[k - 1], state)
        np.testing.assert_allclose(exit_scores.scores[k - 1].numpy(), scores, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(
            exit_scores.log_probabilities[k - 1].exp().numpy(), probabilities, rtol=1e-9, atol=1e-300
        )


def test_agreement_counts_exits_and_still_has_a_gradient() -> None:
    logits = torch.zeros(EXITS, 1, CLASSES)
    logits[:, 0, 1] = 2.0
    logits.requires_grad_()
    scores = score_exits(example_policy("agreement"), logits).scores
    assert [int(score) for score in scores[:, 0]] == [1, 2, 3]
    (gradient,) = torch.autograd.grad(scores[2].sum(), logits)
    assert gradient[1, 0, 1] > 0, "the class that the exits agree on does not raise the count"
    assert gradient[1, 0, 0] < 0


def test_straight_through_has_the_value_of_one_tensor_and_the_gradient_of_the_other() -> None:
    value, surrogate = torch.tensor([1.0, -torch.inf]), torch.tensor([2.0, 3.0], requires_grad=True)
    passed = straight_through(value, surrogate**2)
    assert torch.equal(passed, value)
    (gradient,) = torch.autograd.grad(passed, surrogate, torch.ones(2))
    assert torch.equal(gradient, torch.tensor([4.0, 6.0]))
