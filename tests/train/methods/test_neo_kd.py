"""NEO-KD's soft labels and loss have the properties that section 3.2 of the paper gives them."""

from __future__ import annotations

import pytest
import torch
from method_outputs import make_outputs
from torch import Tensor

from mexit.errors import UsageError
from mexit.flows.train import TrainOptions, train_model
from mexit.train.methods import Outputs, build_method, method_class
from mexit.train.methods.base import Setup, StepInfo
from mexit.train.methods.neo_kd import (
    NeoKD,
    draw_class_groups,
    neighbour_targets,
    orthogonal_targets,
    partition_classes,
)

E, B, C = 3, 8, 10


@pytest.fixture
def teacher() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(E, B, C).softmax(dim=-1)


@pytest.fixture
def labels() -> Tensor:
    return torch.arange(B) % C


def random_outputs(labels: Tensor, epoch: int = 0, step: int = 0, first: int = 100) -> Outputs:
    torch.manual_seed(1)
    rows = len(labels)
    clean, attacked = torch.randn(2, E, rows, C)
    return make_outputs(
        clean.requires_grad_(),
        attacked[None].requires_grad_(),
        labels=labels,
        index=torch.arange(first, first + rows),
        epoch=epoch,
        step=StepInfo(step),
    )


def neo_kd(exits: int = E, data_set: str = "digits", **options: object) -> NeoKD:
    method = build_method("neo-kd", options)
    assert isinstance(method, NeoKD)
    method.setup(Setup(exits, C, data_set=data_set))
    return method


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
    all_exits = neighbour_targets(teacher, "all")
    torch.testing.assert_close(all_exits[0], teacher.mean(dim=0))
    torch.testing.assert_close(all_exits[2], teacher.mean(dim=0))


def test_targets_of_different_exits_share_only_the_true_class(teacher, labels) -> None:
    groups = draw_class_groups(torch.rand(B, C), labels, E)
    targets = orthogonal_targets(teacher, labels, groups)
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
def test_every_exit_keeps_a_group_of_wrong_classes(classes, exits, size) -> None:
    labels = torch.arange(4) % classes
    groups = draw_class_groups(torch.rand(4, classes), labels, exits)
    assert (groups.sum(dim=-1) == size).all()
    assert not groups[:, torch.arange(4), labels].any()
    partition = partition_classes(torch.rand(classes), exits)
    assert (partition.sum(dim=-1) == size).all()
    assert (partition.sum(dim=0) <= 1).all(), "a class is in two groups"


def test_without_renormalising_the_kept_probabilities_are_the_teachers(teacher, labels) -> None:
    groups = draw_class_groups(torch.rand(B, C), labels, E)
    targets = orthogonal_targets(teacher, labels, groups, renormalise=False)
    torch.testing.assert_close(targets[targets > 0], teacher[targets > 0])


def test_groups_are_drawn_per_sample_and_epoch(labels) -> None:
    def groups(epoch: int) -> Tensor:
        return neo_kd().class_groups(random_outputs(labels, epoch))

    assert not torch.equal(groups(0), groups(1))
    assert torch.equal(groups(0), groups(0))
    assert not torch.equal(groups(0)[:, 0], groups(0)[:, 1])


def test_redraw_batch_draws_one_partition_for_all_samples_of_a_batch_whatever_their_labels(labels) -> None:
    method = neo_kd(redraw="batch")
    groups = method.class_groups(random_outputs(labels, step=3))
    assert torch.equal(groups, groups[:, :1].expand_as(groups))
    other_part = method.class_groups(random_outputs(labels[2:5], step=3, first=7))
    assert torch.equal(other_part[:, 0], groups[:, 0]), "the part of another process has other groups"
    assert not torch.equal(method.class_groups(random_outputs(labels, step=4)), groups)


def test_redraw_fixed_draws_one_partition_for_the_run(labels) -> None:
    method = neo_kd(redraw="fixed")
    first = method.class_groups(random_outputs(labels, epoch=0, step=0))
    assert torch.equal(first, first[:, :1].expand_as(first))
    assert torch.equal(first, method.class_groups(random_outputs(labels, epoch=5, step=50)))


def test_loss_by_hand_for_one_sample() -> None:
    """Written out for E = 1, where the only neighbour is the exit itself and it keeps every class."""
    clean, attacked = torch.tensor([[[2.0, 0.0, -1.0]]]), torch.tensor([[[0.5, 0.25, 0.0]]])
    terms = neo_kd(1, alpha=3.0, beta=1.0, gamma=(2.0,)).terms(make_outputs(clean, attacked))
    p, log_q = clean.softmax(-1)[0, 0], attacked.log_softmax(-1)[0, 0]
    torch.testing.assert_close(terms["clean"], -clean.log_softmax(-1)[0, 0, 0])
    torch.testing.assert_close(terms["attacked"], -log_q[0])
    torch.testing.assert_close(terms["nkd"], 3 * 2 * -(p * log_q).sum())
    torch.testing.assert_close(terms["eokd"], 1 * 2 * -(p * log_q).sum(), msg="one exit keeps every class")


def test_teacher_is_detached(labels) -> None:
    outputs = random_outputs(labels)
    terms = neo_kd(clean_weight=0.0).terms(outputs)
    torch.stack([terms["nkd"], terms["eokd"]]).sum().backward()
    assert outputs.clean.grad is None
    assert outputs.variants is not None
    assert outputs.variants.grad is not None


@pytest.mark.parametrize(("option", "term"), [("alpha", "nkd"), ("beta", "eokd")])
def test_a_weight_of_zero_removes_its_term(labels, option, term) -> None:
    assert term not in neo_kd(**{option: 0.0}).terms(random_outputs(labels))


def test_adversarial_weights_and_clean_are_sums_over_exits(labels) -> None:
    outputs = random_outputs(labels)
    per_exit = [torch.nn.functional.cross_entropy(logits, labels) for logits in outputs.clean]
    torch.testing.assert_close(build_method("clean", {}).terms(outputs)["clean"], torch.stack(per_exit).sum())
    halved = build_method("adversarial", {"clean_weight": 0.5}).terms(outputs)
    torch.testing.assert_close(halved["clean"], 0.5 * torch.stack(per_exit).sum())


@pytest.mark.parametrize(
    ("data_set", "exits", "gamma"),
    [
        ("mnist", 3, (1, 1, 1)),
        ("cifar10", 3, (1, 1, 1)),
        ("cifar10", 7, (1,) * 7),
        ("cifar100", 7, (1, 1, 1, 1.5, 1.5, 1.5, 1.5)),
        ("tiny-imagenet", 5, (1, 1, 1, 1.5, 1.5)),
        ("imagenet", 5, (1, 1, 1, 1.5, 1.5)),
        ("folder:pictures", 5, (1,) * 5),
    ],
)
def test_gamma_is_the_published_one_of_the_data_set_not_of_the_number_of_exits(data_set, exits, gamma) -> None:
    assert neo_kd(exits, data_set).gamma == gamma
    given = tuple(2.0 + k for k in range(exits))
    assert neo_kd(exits, data_set, gamma=given).gamma == given


def test_a_run_tells_the_method_its_data_set(tmp_path, monkeypatch) -> None:
    seen = []
    setup = NeoKD.setup

    def watched(self: NeoKD, run: Setup) -> None:
        seen.append(run.data_set)
        setup(self, run)

    monkeypatch.setattr(NeoKD, "setup", watched)
    given = {"method": "neo-kd", "epochs": 1, "steps": 1, "fraction": 0.1, "precision": "fp32"}
    train_model(settings=given, out=tmp_path / "run", options=TrainOptions(threads=1, should_stop=lambda: True))
    assert seen == ["digits"]


def test_unknown_methods_and_options_are_refused() -> None:
    with pytest.raises(UsageError, match="neo-kd"):
        method_class("neokd")
    with pytest.raises(UsageError, match="include_self"):
        neo_kd(includeself=True)
    with pytest.raises(UsageError, match="one weight for each of 3 exits"):
        neo_kd(gamma=(1.0,))
