"""AT-AKA: the student's loss, the teachers' particles, and teachers that a run trains first."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from method_outputs import make_outputs
from safetensors.torch import load_file
from torch import Tensor

from mexit.attacks.pgd import Attack, PGDConfig, random_start
from mexit.attacks.rng import CounterRNG
from mexit.attacks.svgd import ParticleConfig, craft_particles
from mexit.data import digits, splits
from mexit.errors import UsageError
from mexit.flows.train import TrainOptions, train_model
from mexit.models import MultiExit, build_model, model_spec
from mexit.train import checkpoint
from mexit.train.methods import Outputs, build_method
from mexit.train.methods.at_aka import MergeRule, merge_logits
from mexit.train.methods.base import Batch, Setup

E, M, B, C = 3, 3, 40, 10
EPS = 0.1
TEACHERS = ("teacher-1", "teacher-2")
QUICK = {"method": "at-aka", "epochs": 1, "steps": 1, "fraction": 0.2, "precision": "fp32"}


@pytest.fixture(scope="module")
def model() -> MultiExit:
    torch.manual_seed(0)
    return build_model("digits-cnn", 10)


@pytest.fixture(scope="module")
def teachers() -> tuple[MultiExit, ...]:
    torch.manual_seed(1)
    return tuple(build_model("digits-cnn-single", 10).eval() for _ in range(2))


@pytest.fixture(scope="module")
def batch(model: MultiExit) -> Batch:
    data = digits.load()
    index = splits.split(data).part("selection")[:B]
    images = torch.from_numpy(data.batch(index, model_spec("digits-cnn").input))
    places = torch.from_numpy(index)
    attack = Attack("average", PGDConfig(EPS, EPS / 4, 3))
    return Batch(model, images, torch.from_numpy(data.labels[index]), places, attack, CounterRNG(0, 0))


def outputs_of(batch: Batch, attacked_images: Tensor | None = None) -> Outputs:
    torch.manual_seed(2)
    clean, attacked = torch.randn(2, E, B, C)
    return make_outputs(clean, attacked[None].requires_grad_(), labels=batch.labels, attacked_images=attacked_images)


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.argmax(dim=-1) == labels


def test_impossible_options_are_refused() -> None:
    for method in ("at-aka", "cat-aka"):
        with pytest.raises(UsageError, match="merge must be one of softmin"):
            build_method(method, {"merge": "softmax"})
        for option in ({"tau": 0.0}, {"temperature": 0.0}, {"alpha": 1.5}):
            with pytest.raises(UsageError, match="alpha in"):
                build_method(method, option)
    with pytest.raises(UsageError, match="one of 1 to 2, found 3"):
        build_method("at-aka-teacher", {"particle": 3})
    with pytest.raises(UsageError, match="here 3; found 4"):
        build_method("cat-aka", {"last": 4}).setup(Setup(E, C))
    with pytest.raises(UsageError, match="--teacher"):
        build_method("at-aka", {}).setup(Setup(E, C))


def test_the_students_loss_by_hand(batch, teachers) -> None:
    method = build_method("at-aka", {"merge": "mean", "alpha": 0.75, "temperature": 2.0})
    method.setup(Setup(E, C, teachers=teachers))
    outputs = outputs_of(batch, batch.images[None])
    terms = method.terms(outputs)
    with torch.no_grad():
        merged = torch.stack([teacher(batch.images)[-1] for teacher in teachers]).mean(dim=0)
    p, log_q = (merged / 2).softmax(dim=-1), (outputs.attacked / 2).log_softmax(dim=-1)
    divergence = (p * (p.log() - log_q)).sum(dim=-1).mean(dim=-1)
    torch.testing.assert_close(terms["kd"], 0.75 * 4 * divergence.sum())
    torch.testing.assert_close(terms["attacked"], 0.25 * outputs.cross_entropy(outputs.attacked).sum())


def test_a_student_equal_to_the_merged_teachers_has_no_distillation_loss(batch, teachers) -> None:
    method = build_method("at-aka", {})
    method.setup(Setup(E, C, teachers=(teachers[0], teachers[0])))
    with torch.no_grad():
        logits = teachers[0](batch.images).expand(E, -1, -1)
    outputs = make_outputs(logits, logits, labels=batch.labels, attacked_images=batch.images[None])
    assert method.terms(outputs)["kd"].item() == pytest.approx(0, abs=1e-5)


def test_where_no_teacher_is_correct_the_student_learns_from_the_label_alone(batch, teachers) -> None:
    method = build_method("at-aka", {"merge": "correct-mean", "alpha": 1.0})
    method.setup(Setup(E, C, teachers=teachers))
    with torch.no_grad():
        known = torch.stack([correct(teacher(batch.images)[-1], batch.labels) for teacher in teachers]).any(dim=0)
    assert 0 < known.float().mean() < 1
    outputs = outputs_of(batch, batch.images[None])
    terms = method.terms(outputs)
    (of_label,) = torch.autograd.grad(terms["attacked"], outputs.variants, retain_graph=True)
    (of_teachers,) = torch.autograd.grad(terms["kd"], outputs.variants)
    for gradient, rows in ((of_label, ~known), (of_teachers, known)):
        assert torch.equal(gradient[0].abs().sum(dim=(0, 2)) > 0, rows)


def test_each_sample_gets_one_random_particle_of_one_per_teacher(batch, model, teachers) -> None:
    method = build_method("at-aka", {})
    method.setup(Setup(E, C, teachers=teachers))
    crafted = method.craft(batch)
    assert crafted.shape == (1, *batch.images.shape)
    config = ParticleConfig(2, batch.attack.pgd)
    both = craft_particles(model, batch.images, batch.labels, config, rng=batch.rng, index=batch.index)
    taken = (both == crafted).flatten(2).all(dim=-1)
    assert taken.any(dim=0).all()
    assert all(0.2 < share < 0.8 for share in taken.float().mean(dim=1))
    assert method.craft(replace(batch, attack=None)) is None


def test_a_teacher_moves_one_particle_with_one_pass_per_step(batch, model) -> None:
    passes = []
    hook = model.stages[0].trunk.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    crafted = [build_method("at-aka-teacher", {"particle": m}).craft(batch) for m in (1, 2)]
    hook.remove()
    assert passes == [B] * 3 * 2, "each of 3 steps attacks each image once"
    for particle in crafted:
        assert particle.shape == (1, *batch.images.shape)
        assert (particle - batch.images).abs().max() <= EPS + 1e-6
    assert (crafted[0] != crafted[1]).flatten(2).any(dim=-1).all(), "the teachers have the same particle"


def test_a_teacher_trains_on_the_loss_of_its_particle(batch) -> None:
    outputs = outputs_of(batch)
    terms = build_method("at-aka-teacher", {}).terms(outputs)
    torch.testing.assert_close(sum(terms.values()), outputs.cross_entropy(outputs.attacked).sum())


def test_the_other_particles_repel_the_one_that_moves(batch) -> None:
    """With a large weight of the repulsion the particle ends further from the start of the other one."""
    attack = Attack("average", PGDConfig(EPS, EPS / 40, 5))
    noise = batch.rng.uniform("particle 1", batch.index, (1, 8, 8))
    start = random_start(batch.images, PGDConfig(EPS, EPS, 1), noise).clamp(0, 1)

    def distance(weight: float) -> Tensor:
        teacher = build_method("at-aka-teacher", {"repulsion_weight": weight})
        return (teacher.craft(replace(batch, attack=attack))[0] - start).flatten(1).norm(dim=1)

    assert (distance(100.0) > distance(0.0)).all()


def test_the_last_exits_are_merged_detached_and_each_has_its_particle(batch, model) -> None:
    method = build_method("cat-aka", {"merge": "mean", "alpha": 1.0, "temperature": 1.0})
    method.setup(Setup(E, C))
    outputs = outputs_of(batch)
    terms = method.terms(outputs)
    merged = outputs.attacked[1:].detach().mean(dim=0)
    p, log_q = merged.softmax(dim=-1), outputs.attacked.log_softmax(dim=-1)
    torch.testing.assert_close(terms["kd"], (p * (p.log() - log_q)).sum(dim=-1).mean(dim=-1).sum())
    (gradient,) = torch.autograd.grad(terms["kd"], outputs.variants)
    torch.testing.assert_close(gradient[0], (log_q.exp() - p) / B, msg="the target is not detached")
    crafted = method.craft(batch)
    config = ParticleConfig(2, batch.attack.pgd, exits=(2, 3), mix_gradients=False)
    both = craft_particles(model, batch.images, batch.labels, config, rng=batch.rng, index=batch.index)
    assert (both == crafted).flatten(2).all(dim=-1).any(dim=0).all()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trained its own teachers, without a stop."""
    root = tmp_path_factory.mktemp("at-aka")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setitem(sys.modules, "matplotlib", None)
        assert train_model(settings=QUICK, out=Path("runs/x"), options=TrainOptions(threads=1)).finished
    return root / "runs" / "x"


def test_without_teachers_a_run_trains_its_own_first(whole) -> None:
    settings = checkpoint.load_settings(whole)
    assert settings.teachers == ("runs/x/teacher-1", "runs/x/teacher-2")
    for m, name in enumerate(TEACHERS, start=1):
        network, its, _ = checkpoint.load_model(whole / name)
        assert network.exits == 1
        assert (its.method, its.model, its.seed) == ("at-aka-teacher", "digits-cnn-single", m)
        assert (its.options["particle"], its.options["particles"]) == (m, 2)
        assert (its.epochs, its.attack, its.fraction) == (settings.epochs, settings.attack, settings.fraction)
        assert (whole / name / checkpoint.SPLITS).read_bytes() == (whole / checkpoint.SPLITS).read_bytes()
    first, second = (load_file(whole / name / checkpoint.WEIGHTS) for name in TEACHERS)
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert (whole.parent / "latest").read_text().strip() == "runs/x"


def same_results(one: Path, other: Path) -> bool:
    pairs = [[load_file(run / name / checkpoint.WEIGHTS) for run in (one, other)] for name in (*TEACHERS, ".")]
    return all(torch.equal(ours[name], theirs[name]) for ours, theirs in pairs for name in theirs)


@pytest.mark.parametrize("stop_after", [2, 5, 8], ids=["in teacher 1", "in teacher 2", "in the student"])
def test_stopped_anywhere_it_ends_in_the_same_bits(whole, tmp_path, monkeypatch, stop_after) -> None:
    """An epoch has 3 steps."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    asked = iter(range(1, 1_000))
    stopped = train_model(
        settings=QUICK,
        out=Path("runs/x"),
        options=TrainOptions(threads=1, should_stop=lambda: next(asked) == stop_after),
    )
    assert not stopped.finished
    begun = [name for name in (*TEACHERS, ".") if (tmp_path / "runs/x" / name / "log.jsonl").exists()]
    assert len(begun) == (stop_after - 1) // 3
    assert train_model(resume=True, options=TrainOptions(threads=1)).finished
    assert same_results(tmp_path / "runs/x", whole)


def test_killed_in_the_second_teacher_before_any_checkpoint_it_ends_in_the_same_bits(
    whole, tmp_path, monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    answers = [False] * 4
    with pytest.raises(IndexError):
        train_model(
            settings=QUICK, out=Path("runs/x"), options=TrainOptions(threads=1, should_stop=lambda: answers.pop())
        )
    first = tmp_path / "runs/x/teacher-1" / checkpoint.WEIGHTS
    written = first.stat().st_mtime_ns
    assert not (tmp_path / "runs/x/teacher-2" / checkpoint.CHECKPOINT).exists()
    assert train_model(resume=True, options=TrainOptions(threads=1)).finished
    assert same_results(tmp_path / "runs/x", whole)
    assert first.stat().st_mtime_ns == written, "the finished teacher was trained again"


def test_with_named_teachers_a_run_trains_none(whole, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    given = QUICK | {"teachers": (str(whole / "teacher-1"),)}
    assert train_model(settings=given, out=tmp_path / "y", options=TrainOptions(threads=1)).finished
    assert not list((tmp_path / "y").glob("teacher-*"))


def test_impossible_settings_are_refused_before_a_teacher_is_trained(tmp_path) -> None:
    with pytest.raises(UsageError, match="no option sharp"):
        train_model(settings=QUICK | {"options": {"sharp": 1}}, out=tmp_path / "z", options=TrainOptions(threads=1))
    assert not (tmp_path / "z").exists()


@pytest.fixture(scope="module")
def logits() -> Tensor:
    """Of M teachers, (M, B, C)."""
    torch.manual_seed(0)
    return 2 * torch.randn(M, B, C)


@pytest.fixture(scope="module")
def labels() -> Tensor:
    return torch.arange(B) % C


@pytest.mark.parametrize("merge", get_args(MergeRule))
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
