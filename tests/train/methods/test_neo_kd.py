"""NEO-KD's soft labels and loss have the properties that section 3.2 of the paper gives them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mexit.attacks.rng import CounterRNG
from mexit.errors import UsageError
from mexit.train.methods import Outputs, build, default_attack
from mexit.train.methods.neo_kd import class_shares, neighbour_targets, orthogonal_targets

E, B, C = 3, 8, 10


@pytest.fixture
def teacher() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(E, B, C).softmax(dim=-1)


@pytest.fixture
def labels() -> Tensor:
    return torch.arange(B) % C


def _outputs(labels: Tensor, epoch: int = 0) -> Outputs:
    torch.manual_seed(1)
    clean, attacked = torch.randn(2, E, B, C)
    return Outputs(
        labels, torch.arange(100, 100 + B), clean.requires_grad_(), attacked.requires_grad_(), CounterRNG(0, epoch)
    )


def test_neighbours_are_averaged_by_hand(teacher) -> None:
    targets = neighbour_targets(teacher)
    torch.testing.assert_close(targets[0], (teacher[0] + teacher[1]) / 2)
    torch.testing.assert_close(targets[1], (teacher[0] + teacher[1] + teacher[2]) / 3)
    torch.testing.assert_close(targets[2], (teacher[1] + teacher[2]) / 2)


def test_switches_of_the_ensemble(teacher) -> None:
    without_self = neighbour_targets(teacher, include_self=False)
    torch.testing.assert_close(without_self[0], teacher[1])
    torch.testing.assert_close(without_self[1], (teacher[0] + teacher[2]) / 2)
    torch.testing.assert_close(neighbour_targets(teacher, "none"), teacher)
    everyone = neighbour_targets(teacher, "all")
    torch.testing.assert_close(everyone[0], teacher.mean(dim=0))
    torch.testing.assert_close(everyone[2], teacher.mean(dim=0))


def test_targets_of_different_exits_share_only_the_true_class(teacher, labels) -> None:
    shares = class_shares(torch.rand(B, C), labels, E)
    targets = orthogonal_targets(teacher, labels, shares)
    rows = torch.arange(B)
    assert (targets[:, rows, labels] > 0).all()
    torch.testing.assert_close(targets.sum(dim=-1), torch.ones(E, B))
    targets[:, rows, labels] = 0
    for i in range(E):
        for j in range(i):
            assert not (targets[i] * targets[j]).any(), f"exits {i + 1} and {j + 1} share a wrong class"


@pytest.mark.parametrize(
    ("classes", "exits", "size"), [(10, 3, 3), (100, 7, 14), (200, 5, 39), (1000, 5, 199), (3, 5, 0)]
)
def test_every_exit_keeps_its_share_of_wrong_classes(classes, exits, size) -> None:
    labels = torch.arange(4) % classes
    shares = class_shares(torch.rand(4, classes), labels, exits)
    assert (shares.sum(dim=-1) == size).all()
    assert not shares[:, torch.arange(4), labels].any()


def test_without_renormalising_the_kept_probabilities_are_the_teachers(teacher, labels) -> None:
    shares = class_shares(torch.rand(B, C), labels, E)
    targets = orthogonal_targets(teacher, labels, shares, renormalise=False)
    torch.testing.assert_close(targets[targets > 0], teacher[targets > 0])


def test_shares_are_drawn_per_sample_and_anew_each_epoch(labels) -> None:
    def shares(redraw: str, epoch: int) -> Tensor:
        method = build("neo-kd", E, {"redraw": redraw})
        return method._shares(_outputs(labels, epoch), E, C)

    assert not torch.equal(shares("sample", 0), shares("sample", 1))
    assert torch.equal(shares("sample", 0), shares("sample", 0))
    assert torch.equal(shares("fixed", 0), shares("fixed", 5))
    same_label = torch.zeros_like(labels)
    batch_wide = build("neo-kd", E, {"redraw": "batch"})._shares(_outputs(same_label), E, C)
    assert torch.equal(batch_wide, batch_wide[:, :1].expand_as(batch_wide))


def test_loss_by_hand_for_one_sample() -> None:
    """Written out for E = 1, where the only neighbour is the exit itself and it keeps every class."""
    clean, attacked = torch.tensor([[[2.0, 0.0, -1.0]]]), torch.tensor([[[0.5, 0.25, 0.0]]])
    outputs = Outputs(torch.tensor([0]), torch.tensor([7]), clean, attacked, CounterRNG(0, 0))
    terms = build("neo-kd", 1, {"alpha": 3.0, "beta": 1.0, "gamma": (2.0,)}).terms(outputs)
    p, log_q = clean.softmax(-1)[0, 0], attacked.log_softmax(-1)[0, 0]
    torch.testing.assert_close(terms["clean"], -clean.log_softmax(-1)[0, 0, 0])
    torch.testing.assert_close(terms["attacked"], -log_q[0])
    torch.testing.assert_close(terms["nkd"], 3 * 2 * -(p * log_q).sum())
    torch.testing.assert_close(terms["eokd"], 1 * 2 * -(p * log_q).sum(), msg="one exit keeps every class")


def test_teacher_is_detached(labels) -> None:
    outputs = _outputs(labels)
    terms = build("neo-kd", E, {"clean_weight": 0.0}).terms(outputs)
    torch.stack([terms["nkd"], terms["eokd"]]).sum().backward()
    assert outputs.clean.grad is None
    assert outputs.attacked is not None
    assert outputs.attacked.grad is not None


@pytest.mark.parametrize(("switched_off", "term"), [("alpha", "nkd"), ("beta", "eokd")])
def test_a_weight_of_zero_switches_its_term_off(labels, switched_off, term) -> None:
    assert term not in build("neo-kd", E, {switched_off: 0.0}).terms(_outputs(labels))


def test_adversarial_weights_and_clean_are_sums_over_exits(labels) -> None:
    outputs = _outputs(labels)
    per_exit = [torch.nn.functional.cross_entropy(logits, labels) for logits in outputs.clean]
    torch.testing.assert_close(build("clean", E, {}).terms(outputs)["clean"], torch.stack(per_exit).sum())
    halved = build("adversarial", E, {"clean_weight": 0.5}).terms(outputs)
    torch.testing.assert_close(halved["clean"], 0.5 * torch.stack(per_exit).sum())


def test_published_gammas() -> None:
    assert build("neo-kd", 3, {}).gamma == (1, 1, 1)
    assert build("neo-kd", 7, {}).gamma == (1, 1, 1, 1.5, 1.5, 1.5, 1.5)


def test_unknown_methods_and_options_are_refused() -> None:
    with pytest.raises(UsageError, match="neo-kd"):
        default_attack("neokd")
    with pytest.raises(UsageError, match="include_self"):
        build("neo-kd", E, {"includeself": True})
    with pytest.raises(UsageError, match="as many gammas"):
        build("neo-kd", E, {"gamma": (1.0,)}).terms(_outputs(torch.zeros(B, dtype=torch.int64)))
