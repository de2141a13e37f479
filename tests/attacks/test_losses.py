"""Attack losses: identities on random logits, and the effect of maximising them on real images."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mexit.attacks.losses import LOSSES, exit_cross_entropy, exit_loss, margin, sample_loss
from mexit.attacks.pgd import Attack, PGDConfig, craft, craft_each_exit, keep_worst
from mexit.attacks.rng import CounterRNG
from mexit.errors import UsageError
from mexit.models import MultiExit, build_model

E, B, C = 3, 50, 10
EPS = 0.1


@pytest.fixture(scope="module")
def logits() -> Tensor:
    torch.manual_seed(0)
    return 3 * torch.randn(E, B, C)


@pytest.fixture(scope="module")
def labels() -> Tensor:
    return torch.arange(B) % C


@pytest.fixture(scope="module")
def confident(batch) -> MultiExit:
    """A network that is trained on the images and confident on them."""
    torch.manual_seed(0)
    model = build_model("digits-cnn", 10)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(25):
        optimiser.zero_grad()
        exit_cross_entropy(model(batch[0]), batch[1]).mean().backward()
        optimiser.step()
    return model.eval()


def attacked(model, batch, attack: Attack) -> Tensor:
    """The logits of the attacked images, (E, B, C)."""
    images, labels, index = batch
    images_attacked = craft(model, images, labels, attack, rng=CounterRNG(0, 0), index=index)
    assert (images_attacked - images).abs().max() <= attack.pgd.eps + 1e-6
    assert images_attacked.min() >= 0
    assert images_attacked.max() <= 1
    with torch.no_grad():
        return model.eval()(images_attacked)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_of_a_sample_is_the_mean_over_exits(loss, logits, labels) -> None:
    per_exit = exit_loss(loss, logits, labels)
    assert per_exit.shape == (E, B)
    averaged = per_exit[:-1] if loss == "uniform" else per_exit
    torch.testing.assert_close(sample_loss(loss, logits, labels), averaged.mean(dim=0))
    torch.testing.assert_close(
        sample_loss(loss, logits[1:2], labels), per_exit[1], msg="a single exit counts, also for uniform"
    )


def test_every_loss_by_hand_for_one_sample() -> None:
    z = torch.tensor([[[2.0, 5.0, 1.0, 0.5]]])
    y = torch.tensor([0])
    total = torch.tensor([2.0, 5.0, 1.0, 0.5]).exp().sum().log().item()
    expected = {"ce": total - 2, "margin": 5 - 2, "dlr": (5 - 2) / (5 - 1), "logit": -2}
    for loss, value in expected.items():
        assert exit_loss(loss, z, y).item() == pytest.approx(value, abs=1e-5), loss
    assert exit_loss("uniform", z, y).item() == pytest.approx(8.5 / 4 - total, abs=1e-5)


def test_margin_and_dlr_are_above_zero_exactly_where_the_answer_is_wrong(logits, labels) -> None:
    wrong = logits.argmax(dim=-1) != labels
    assert 0 < wrong.float().mean() < 1
    assert torch.equal(exit_loss("margin", logits, labels) > 0, wrong)
    assert torch.equal(exit_loss("dlr", logits, labels) > 0, wrong)
    torch.testing.assert_close(margin(logits, labels), exit_loss("margin", logits, labels))


def test_dlr_is_invariant_to_shift_and_scale_and_the_others_are_not(logits, labels) -> None:
    before = exit_loss("dlr", logits, labels)
    torch.testing.assert_close(exit_loss("dlr", 7 * logits + 3, labels), before, atol=1e-4, rtol=1e-4)
    for loss in ("ce", "margin", "logit"):
        scaled = exit_loss(loss, 7 * logits, labels)
        assert not torch.allclose(scaled, exit_loss(loss, logits, labels), atol=0.1)


def test_dlr_of_a_correct_prediction_lies_between_minus_one_and_zero(logits, labels) -> None:
    dlr = exit_loss("dlr", logits, labels)
    right = logits.argmax(dim=-1) == labels
    assert ((dlr[right] <= 0) & (dlr[right] >= -1)).all()


def test_uniform_is_largest_at_equal_logits(logits, labels) -> None:
    flat = exit_loss("uniform", torch.zeros(E, B, C), labels)
    torch.testing.assert_close(flat, torch.full((E, B), -math.log(C)))
    assert (exit_loss("uniform", logits, labels) < flat).all()


def test_unsupported_losses_and_classes_are_refused(logits, labels) -> None:
    with pytest.raises(UsageError, match="choose from ce, margin"):
        exit_loss("cw", logits, labels)
    with pytest.raises(UsageError, match="choose from ce, margin"):
        Attack("average", PGDConfig(EPS, EPS, 1), loss="cw")
    with pytest.raises(UsageError, match="needs 3 classes, found 2: choose margin"):
        exit_loss("dlr", logits[..., :2], labels % 2)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("target_exits", ["single", "average", "max-average"])
def test_an_attack_raises_its_loss(confident, batch, loss, target_exits) -> None:
    images, labels, _ = batch

    def attacked_loss(logits: Tensor) -> Tensor:
        return sample_loss(loss, logits[-1:] if target_exits == "single" else logits, labels)

    with torch.no_grad():
        before = attacked_loss(confident(images))
    after = attacked_loss(attacked(confident, batch, Attack(target_exits, PGDConfig(EPS, EPS / 4, 6), loss=loss)))
    assert (after > before).float().mean() > 0.9  # some losses are 0 in float32, without a gradient


def test_the_slowdown_loss_makes_early_exits_uniform_and_spares_the_last(confident, batch) -> None:
    images, labels, _ = batch
    with torch.no_grad():
        before = confident(images)
    after = attacked(confident, batch, Attack("average", PGDConfig(EPS, EPS / 4, 10), loss="uniform"))
    confidence = [logits.softmax(dim=-1).amax(dim=-1)[:-1].mean() for logits in (before, after)]
    assert confidence[1] < confidence[0] - 0.1
    last = attacked(confident, batch, Attack("single", PGDConfig(EPS, EPS / 4, 10), loss="uniform"))
    assert exit_loss("uniform", last, labels)[-1].mean() > exit_loss("uniform", after, labels)[-1].mean()


def test_max_average_selects_by_the_loss_of_the_attack(model, batch) -> None:
    images, labels, index = batch
    attack = Attack("max-average", PGDConfig(EPS, EPS / 4, 4), loss="margin")
    candidates = craft_each_exit(model, images, labels, attack, rng=CounterRNG(0, 0), index=index)
    with torch.no_grad():
        losses = torch.stack([sample_loss("margin", model(one), labels) for one in candidates])
    selected = sample_loss("margin", attacked(model, batch, attack), labels)
    torch.testing.assert_close(selected, losses.max(dim=0).values)
    by_margin, by_ce = (keep_worst(model, candidates, labels, loss=loss) for loss in ("margin", "ce"))
    assert not torch.equal(by_margin, by_ce), "both losses select the same images: the selection is not tested"


def test_reports_name_the_loss_unless_it_is_cross_entropy() -> None:
    plain = Attack("average", PGDConfig(EPS, EPS / 4, 7)).describe()
    assert plain == "PGD-7 average, Linf eps 0.1, step 0.025, random start"
    inverse_clip = PGDConfig(EPS, EPS, 1, random_start=False, rule="inverse-clip")
    assert Attack("single", inverse_clip, loss="logit").describe() == (
        "PGD-1 single exit last on logit, Linf eps 0.1, step 0.1 inverse-clip, no random start"
    )
