"""The rules that merge the logits of several teachers, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mexit.errors import UsageError
from mexit.train.methods.teacher_merging import MERGES, merge_logits

M, B, C = 3, 40, 10


@pytest.fixture(scope="module")
def logits() -> Tensor:
    torch.manual_seed(0)
    return 2 * torch.randn(M, B, C)


@pytest.fixture(scope="module")
def labels() -> Tensor:
    return torch.arange(B) % C


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.argmax(dim=-1) == labels


@pytest.mark.parametrize("merge", MERGES)
def test_equal_teachers_merge_to_their_own_prediction(merge, labels) -> None:
    torch.manual_seed(3)
    one = torch.randn(B, C)
    merged = merge_logits(one.expand(M, -1, -1), labels, merge)
    torch.testing.assert_close(merged.logits.log_softmax(dim=-1), one.log_softmax(dim=-1))


def test_softmin_weighs_by_likelihood_by_hand() -> None:
    """At tau 1 the weight exp(-CE) is the probability that a teacher gives to the label."""
    logits = torch.tensor([[[2.0, 0.0]], [[-1.0, 0.0]]])
    likelihood = logits.softmax(dim=-1)[:, 0, 0]
    expected = (likelihood[:, None] * logits[:, 0]).sum(dim=0) / likelihood.sum()
    torch.testing.assert_close(merge_logits(logits, torch.tensor([0])).logits[0], expected)


def test_softmin_lies_between_the_best_teacher_and_the_mean(logits, labels) -> None:
    likelihood = logits.log_softmax(dim=-1)[:, torch.arange(B), labels]
    best = logits[likelihood.argmax(dim=0), torch.arange(B)]
    torch.testing.assert_close(merge_logits(logits, labels, tau=1e-6).logits, best)
    mean = merge_logits(logits, labels, "mean").logits
    torch.testing.assert_close(mean, logits.mean(dim=0))
    torch.testing.assert_close(merge_logits(logits, labels, tau=1e6).logits, mean, atol=1e-4, rtol=0)


def test_correct_mean_takes_the_teachers_that_are_correct(logits, labels) -> None:
    known = logits.clone()
    known[1, :10, :], known[2, :10, :] = 0.0, 0.0
    for m, rows in ((1, slice(0, 10)), (2, slice(5, 10))):
        known[m, rows] += 9 * torch.eye(C)[labels[rows]]
    merged = merge_logits(known, labels, "correct-mean")
    assert merged.trusted[:10].all()
    for b in range(B):
        selected = [known[m, b] for m in range(M) if correct(known[m, b], labels[b])]
        assert bool(merged.trusted[b]) == bool(selected)
        if selected:
            torch.testing.assert_close(merged.logits[b], torch.stack(selected).mean(dim=0))
        else:
            least = known[:, b].log_softmax(dim=-1)[:, labels[b]].argmax()
            torch.testing.assert_close(merged.logits[b], known[least, b])
    assert not merged.trusted.all(), "no sample that all teachers get wrong"


def test_min_logit_is_correct_wherever_one_teacher_is(logits, labels) -> None:
    merged = merge_logits(logits, labels, "min-logit").logits
    any_correct = correct(logits, labels).any(dim=0)
    assert 0 < any_correct.float().mean() < 1
    assert correct(merged, labels)[any_correct].all()
    assert not correct(merge_logits(logits, labels, "mean").logits, labels)[any_correct].all()
    for m in range(M):
        gaps = logits[m] - logits[m].gather(-1, labels[:, None])
        assert (merged <= gaps + 1e-6).all(), "a margin is larger than that of one of the teachers"


def test_an_unknown_merge_is_refused(logits, labels) -> None:
    with pytest.raises(UsageError, match="choose from softmin"):
        merge_logits(logits, labels, "softmax")
