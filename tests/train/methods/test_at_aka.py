"""AT-AKA: rules of amalgamation by hand, the student's loss, and teachers that a run makes for itself."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mexit.attacks.multi_exit_attack import Attack
from mexit.attacks.pgd import PGDConfig
from mexit.attacks.rng import CounterRNG
from mexit.attacks.svgd import ParticleConfig, craft_particles
from mexit.data import digits, splits
from mexit.errors import UsageError
from mexit.flows.train import train_model
from mexit.models import MultiExit, build_model, model_spec
from mexit.train import checkpoint
from mexit.train.methods import Outputs
from mexit.train.methods import build as build_objective
from mexit.train.methods.base import Batch, Setup
from mexit.train.methods.teacher_merging import MERGES, amalgamate

M, E, B, C = 3, 3, 40, 10
EPS = 0.1
TEACHERS = ("teacher-1", "teacher-2")
QUICK = {"method": "at-aka", "epochs": 1, "steps": 1, "fraction": 0.2, "precision": "fp32"}


@pytest.fixture(scope="module")
def logits() -> Tensor:
    torch.manual_seed(0)
    return 2 * torch.randn(M, B, C)


@pytest.fixture(scope="module")
def labels() -> Tensor:
    return torch.arange(B) % C


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
    return Outputs(
        batch.labels,
        batch.index,
        clean,
        attacked.requires_grad_(),
        CounterRNG(0, 0),
        attacked_images=attacked_images,
    )


def right(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.argmax(dim=-1) == labels


@pytest.mark.parametrize("merge", MERGES)
def test_teachers_that_agree_are_amalgamated_to_what_they_say(merge, labels) -> None:
    torch.manual_seed(3)
    one = torch.randn(B, C)
    found = amalgamate(one.expand(M, -1, -1), labels, merge)
    torch.testing.assert_close(found.logits.log_softmax(dim=-1), one.log_softmax(dim=-1))


def test_softmin_weighs_by_likelihood_by_hand() -> None:
    """At tau 1 the weight exp(-CE) is the probability that a teacher gives to the label."""
    logits = torch.tensor([[[2.0, 0.0]], [[-1.0, 0.0]]])
    likelihood = logits.softmax(dim=-1)[:, 0, 0]
    expected = (likelihood[:, None] * logits[:, 0]).sum(dim=0) / likelihood.sum()
    torch.testing.assert_close(amalgamate(logits, torch.tensor([0])).logits[0], expected)


def test_softmin_lies_between_the_best_teacher_and_the_mean(logits, labels) -> None:
    likelihood = logits.log_softmax(dim=-1)[:, torch.arange(B), labels]
    best = logits[likelihood.argmax(dim=0), torch.arange(B)]
    torch.testing.assert_close(amalgamate(logits, labels, tau=1e-6).logits, best)
    mean = amalgamate(logits, labels, "mean").logits
    torch.testing.assert_close(mean, logits.mean(dim=0))
    torch.testing.assert_close(amalgamate(logits, labels, tau=1e6).logits, mean, atol=1e-4, rtol=0)


def test_correct_mean_hears_only_those_who_are_right(logits, labels) -> None:
    known = logits.clone()
    known[1, :10, :], known[2, :10, :] = 0.0, 0.0
    for m, rows in ((1, slice(0, 10)), (2, slice(5, 10))):
        known[m, rows] += 9 * torch.eye(C)[labels[rows]]
    found = amalgamate(known, labels, "correct-mean")
    assert found.trusted[:10].all()
    for b in range(B):
        heard = [known[m, b] for m in range(M) if right(known[m, b], labels[b])]
        assert bool(found.trusted[b]) == bool(heard)
        if heard:
            torch.testing.assert_close(found.logits[b], torch.stack(heard).mean(dim=0))
        else:
            least = known[:, b].log_softmax(dim=-1)[:, labels[b]].argmax()
            torch.testing.assert_close(found.logits[b], known[least, b])
    assert not found.trusted.all(), "nobody is ever wrong together: the case is not tested"


def test_min_logit_is_right_wherever_one_teacher_is(logits, labels) -> None:
    found = amalgamate(logits, labels, "min-logit").logits
    someone = right(logits, labels).any(dim=0)
    assert 0 < someone.float().mean() < 1
    assert right(found, labels)[someone].all()
    assert not right(amalgamate(logits, labels, "mean").logits, labels)[someone].all()
    for m in range(M):
        gaps = logits[m] - logits[m].gather(-1, labels[:, None])
        assert (found <= gaps + 1e-6).all(), "some rival looks better than to one of the teachers"


def test_unknown_merges_and_impossible_options_are_refused(logits, labels) -> None:
    with pytest.raises(UsageError, match="choose from softmin"):
        amalgamate(logits, labels, "softmax")
    for method in ("at-aka", "cat-aka"):
        with pytest.raises(UsageError, match="merge must be one of softmin"):
            build_objective(method, E, {"merge": "softmax"})
        for option in ({"tau": 0.0}, {"temperature": 0.0}, {"alpha": 1.5}):
            with pytest.raises(UsageError, match="alpha in"):
                build_objective(method, E, option)
    with pytest.raises(UsageError, match="one of 1 to 2, found 3"):
        build_objective("at-aka-teacher", E, {"particle": 3})
    with pytest.raises(UsageError, match="here 3; found 4"):
        build_objective("cat-aka", E, {"last": 4}).setup(Setup(E, C))
    with pytest.raises(UsageError, match="--teacher"):
        build_objective("at-aka", E, {}).setup(Setup(E, C))


def test_the_students_loss_by_hand(batch, teachers) -> None:
    method = build_objective("at-aka", E, {"merge": "mean", "alpha": 0.75, "temperature": 2.0})
    method.setup(Setup(E, C, teachers=teachers))
    outputs = outputs_of(batch, batch.images[None])
    terms = method.terms(outputs)
    with torch.no_grad():
        merged = torch.stack([teacher(batch.images)[-1] for teacher in teachers]).mean(dim=0)
    p, log_q = (merged / 2).softmax(dim=-1), (outputs.attacked / 2).log_softmax(dim=-1)
    divergence = (p * (p.log() - log_q)).sum(dim=-1).mean(dim=-1)
    torch.testing.assert_close(terms["amalgam"], 0.75 * 4 * divergence.sum())
    torch.testing.assert_close(terms["attacked"], 0.25 * outputs.cross_entropy(outputs.attacked).sum())


def test_a_student_that_says_what_the_amalgam_says_pays_only_for_the_label(batch, teachers) -> None:
    method = build_objective("at-aka", E, {})
    method.setup(Setup(E, C, teachers=(teachers[0], teachers[0])))
    with torch.no_grad():
        said = teachers[0](batch.images).expand(E, -1, -1)
    outputs = replace(outputs_of(batch, batch.images[None]), attacked=said)
    assert method.terms(outputs)["amalgam"].item() == pytest.approx(0, abs=1e-5)


def test_where_nobody_is_right_the_label_alone_teaches(batch, teachers) -> None:
    method = build_objective("at-aka", E, {"merge": "correct-mean", "alpha": 1.0})
    method.setup(Setup(E, C, teachers=teachers))
    with torch.no_grad():
        known = torch.stack([right(teacher(batch.images)[-1], batch.labels) for teacher in teachers]).any(dim=0)
    assert 0 < known.float().mean() < 1
    outputs = outputs_of(batch, batch.images[None])
    terms = method.terms(outputs)
    (by_label,) = torch.autograd.grad(terms["attacked"], outputs.attacked, retain_graph=True)
    (by_amalgam,) = torch.autograd.grad(terms["amalgam"], outputs.attacked)
    for gradient, teacher_probabilities in ((by_label, ~known), (by_amalgam, known)):
        assert torch.equal(gradient.abs().sum(dim=(0, 2)) > 0, teacher_probabilities)


def test_each_sample_gets_one_of_as_many_particles_as_teachers(batch, model, teachers) -> None:
    method = build_objective("at-aka", E, {})
    method.setup(Setup(E, C, teachers=teachers))
    found = method.craft(batch)
    assert found.shape == (1, *batch.images.shape)
    swarm = ParticleConfig(2, batch.attack.steps)
    both = craft_particles(model, batch.images, batch.labels, swarm, draw=batch.draw, index=batch.index)
    taken = (both == found).flatten(2).all(dim=-1)
    assert taken.any(dim=0).all()
    assert all(0.2 < share < 0.8 for share in taken.float().mean(dim=1))
    assert method.craft(replace(batch, attack=None)) is None


def test_teachers_train_on_different_particles_of_the_same_swarm(batch, model) -> None:
    swarm = ParticleConfig(2, batch.attack.steps)
    both = craft_particles(model, batch.images, batch.labels, swarm, draw=batch.draw, index=batch.index)
    for m in (1, 2):
        method = build_objective("at-aka-teacher", 1, {"particle": m})
        assert torch.equal(method.craft(batch), both[m - 1][None])
        outputs = outputs_of(batch)
        terms = method.terms(outputs)
        torch.testing.assert_close(sum(terms.values()), outputs.cross_entropy(outputs.attacked).sum())


def test_collaborating_exits_teach_detached_and_each_has_its_particle(batch, model) -> None:
    method = build_objective("cat-aka", E, {"merge": "mean", "alpha": 1.0, "temperature": 1.0})
    method.setup(Setup(E, C))
    outputs = outputs_of(batch)
    terms = method.terms(outputs)
    merged = outputs.attacked[1:].detach().mean(dim=0)
    p, log_q = merged.softmax(dim=-1), outputs.attacked.log_softmax(dim=-1)
    torch.testing.assert_close(terms["amalgam"], (p * (p.log() - log_q)).sum(dim=-1).mean(dim=-1).sum())
    (gradient,) = torch.autograd.grad(terms["amalgam"], outputs.attacked)
    torch.testing.assert_close(gradient, (log_q.exp() - p) / B, msg="the amalgam is not detached")
    found = method.craft(batch)
    swarm = ParticleConfig(2, batch.attack.steps, climbs=(2, 3), mix=False)
    both = craft_particles(model, batch.images, batch.labels, swarm, draw=batch.draw, index=batch.index)
    assert (both == found).flatten(2).all(dim=-1).any(dim=0).all()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that made its own teachers, without a stop."""
    root = tmp_path_factory.mktemp("at-aka")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setitem(sys.modules, "matplotlib", None)
        assert train_model(given=QUICK, out=Path("runs/x"), threads=1).finished
    return root / "runs" / "x"


def test_without_teachers_a_run_makes_its_own_first(whole) -> None:
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
        given=QUICK, out=Path("runs/x"), threads=1, should_stop=lambda: next(asked) == stop_after
    )
    assert not stopped.finished
    begun = [name for name in (*TEACHERS, ".") if (tmp_path / "runs/x" / name / "log.jsonl").exists()]
    assert len(begun) == (stop_after - 1) // 3
    assert train_model(resume=True, threads=1).finished
    assert same_results(tmp_path / "runs/x", whole)


def test_killed_in_the_second_teacher_before_any_checkpoint_it_ends_in_the_same_bits(
    whole, tmp_path, monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    answers = [False] * 4
    with pytest.raises(IndexError):
        train_model(given=QUICK, out=Path("runs/x"), threads=1, should_stop=lambda: answers.pop())
    first = tmp_path / "runs/x/teacher-1" / checkpoint.WEIGHTS
    written = first.stat().st_mtime_ns
    assert not (tmp_path / "runs/x/teacher-2" / checkpoint.CHECKPOINT).exists()
    assert train_model(resume=True, threads=1).finished
    assert same_results(tmp_path / "runs/x", whole)
    assert first.stat().st_mtime_ns == written, "the finished teacher was made again"


def test_named_teachers_are_taken_and_no_others_are_made(whole, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    given = QUICK | {"teachers": (str(whole / "teacher-1"),)}
    assert train_model(given=given, out=tmp_path / "y", threads=1).finished
    assert not list((tmp_path / "y").glob("teacher-*"))


def test_settings_that_cannot_be_are_refused_before_a_teacher_is_trained(tmp_path) -> None:
    with pytest.raises(UsageError, match="no option sharp"):
        train_model(given=QUICK | {"options": {"sharp": 1}}, out=tmp_path / "z", threads=1)
    assert not (tmp_path / "z").exists()
