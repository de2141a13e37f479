"""Runs by the clock, the learning rate, the growing attack, and the options of the fast schedule."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mexit.attacks.pgd import Attack, PGDConfig, craft, run_attack
from mexit.attacks.rng import CounterRNG
from mexit.core.progress import Silent
from mexit.data import digits, splits
from mexit.errors import UsageError
from mexit.flows.train import TrainOptions, train_model
from mexit.models import build_model, model_spec
from mexit.train import checkpoint
from mexit.train.augment import augment
from mexit.train.batch_norm import recompute_statistics
from mexit.train.config import TrainSettings, resolve
from mexit.train.device_images import DeviceImages
from mexit.train.optimiser import build_optimiser
from mexit.train.precision import select_precision
from mexit.train.step_report import StepReport
from mexit.train.trainer import Trainer

SMALL: dict[str, Any] = {"method": "adversarial", "attack": "average", "steps": 1, "batch": 32, "fraction": 0.1}


def test_the_one_cycle_rate_rises_linearly_and_falls_to_zero() -> None:
    settings = TrainSettings(lr=0.2, lr_schedule="one-cycle", warmup=0.25)
    assert [settings.lr_at(p) for p in (0.0, 0.125, 0.25, 0.625)] == pytest.approx([0.0, 0.1, 0.2, 0.1])
    assert settings.lr_at(1.0) == 0.0


def test_a_warm_up_goes_before_the_steps_of_the_rate() -> None:
    settings = TrainSettings(lr=1.0, warmup=0.1, decay_at=(0.5, 0.75))
    assert [settings.lr_at(p) for p in (0.05, 0.1, 0.49, 0.5, 0.75)] == pytest.approx([0.5, 1.0, 1.0, 0.1, 0.01])


def test_the_attack_grows_with_the_progress_of_the_run() -> None:
    settings = TrainSettings(
        attack="max-average", eps=0.1, step=0.02, steps=10, short_attack_until=0.2, average_attack_until=0.6
    )
    attacks = [settings.training_attack(progress) for progress in (0.0, 0.2, 0.6, 1.0)]
    assert [(a.target_exits, a.pgd.steps, a.pgd.step_size) for a in attacks if a] == [
        ("average", 3, 0.05), ("average", 10, 0.02), ("max-average", 10, 0.02), ("max-average", 10, 0.02),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr_schedule": "cosine"}, "--lr-schedule must be one of steps, one-cycle, found 'cosine'"),
        ({"warmup": 1.0}, "warmup"),
        ({"minutes": -1.0}, "minutes must be at least 0"),
        ({"exit_weights": (1.0, -1.0, 1.0)}, "--exit-weights must be at least 0"),
        ({"exit_weights": (0.0, 0.0)}, "above 0"),
        ({"average_attack_until": 1.5}, "--average-attack-until must be in"),
        ({"nesterov": True, "momentum": 0.0}, "momentum must be above 0 for --nesterov"),
        ({"validate_every": 0}, "--validate-every must be at least 1, found 0"),
        ({"minutes": float("inf")}, "finite"),
        ({"recompute_norms": 100, "keep": "best"}, "--keep last"),
    ],
)
def test_settings_outside_their_range_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainSettings(**given)


def test_minutes_and_epochs_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="--minutes or after --epochs"):
        resolve("digits", None, {"minutes": 1.0, "epochs": 3})
    assert resolve("digits", None, {"minutes": 1.0}).minutes == 1.0
    with pytest.raises(UsageError, match="--minutes must be above 0"):
        resolve("digits", None, {"minutes": 0.0})


def test_a_preset_of_another_data_set_is_named() -> None:
    with pytest.raises(UsageError, match="choose from demo, finetune, robust_finetune; fast is for cifar10, cifar100"):
        resolve("digits", "fast", {})


def test_exit_weights_need_one_number_per_exit(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="digits-cnn has 3 exits"):
        train_model(settings=SMALL | {"exit_weights": (1.0, 2.0)}, out=tmp_path / "run")


def test_exit_weights_scale_every_exits_cross_entropy(tmp_path: Path) -> None:
    data = digits.load()
    parts = splits.split(data).thinned(data, 0.2, None)

    def gradients(weights: tuple[float, ...]) -> list[float]:
        settings = TrainSettings(
            **(SMALL | {"epochs": 1, "precision": "fp32", "exit_weights": weights, "trades": 1.0, "lr": 1e-9})
        )
        trainer = Trainer(tmp_path, settings, data, parts, select_precision("fp32", "cpu"))
        reports: list[StepReport] = []
        trainer.train(reports.append, should_stop=lambda: True)
        heads = [stage.head for stage in trainer.model.stages]
        return [
            float(sum(p.grad.norm() for p in head.parameters() if p.grad is not None))  # type: ignore[union-attr]
            for head in heads
        ]

    plain, weighted = gradients(()), gradients((2.0, 1.0, 0.0))
    assert weighted[0] == pytest.approx(2 * plain[0], rel=1e-3)
    assert weighted[1] == pytest.approx(plain[1], rel=1e-3)
    assert weighted[2] == 0.0


class _Clock:
    """Replaces `time.monotonic`: every reading is a second later."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def test_a_run_by_the_clock_ends_with_its_schedule_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.monotonic", _Clock())
    settings = SMALL | {"minutes": 0.7, "lr_schedule": "one-cycle", "warmup": 0.2, "validate_every": 100}
    result = train_model(settings=settings, out=tmp_path / "run")
    assert result.finished
    assert result.curves is None or result.curves.exists()
    steps = result.settings["steps_done"]
    assert 3 < steps < 42
    assert checkpoint.load_settings(tmp_path / "run").steps_done == steps
    assert [("selection" in record) for record in result.records] == [False] * (len(result.records) - 1) + [True]
    assert result.records[-1]["lr"] < 0.1 * 0.03
    model, _, _ = checkpoint.load_model(tmp_path / "run")
    assert model.exits == 3


def test_minutes_add_up_over_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock()
    monkeypatch.setattr("time.monotonic", clock)
    settings, begin = SMALL | {"minutes": 1.0, "validate_every": 100}, clock.now
    stopped = train_model(
        settings=settings, out=tmp_path / "run", options=TrainOptions(should_stop=lambda: clock.now > begin + 30)
    )
    assert not stopped.finished
    clock.now += 10_000  # the time between the calls does not count
    begin = clock.now
    finished = train_model(out=tmp_path / "run", resume=True)
    assert finished.finished
    assert 20 < clock.now - begin < 45


def test_a_finished_run_by_the_clock_does_not_train_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.monotonic", _Clock())
    first = train_model(settings=SMALL | {"minutes": 0.3, "validate_every": 9}, out=tmp_path / "run")
    notes: list[str] = []
    monkeypatch.setattr(Silent, "note", lambda _, text: notes.append(text))
    again = train_model(out=tmp_path / "run", resume=True)
    assert any("is finished, nothing is left to train: add --minutes above 0.3" in note for note in notes)
    assert again.settings == first.settings
    assert again.records == first.records


def test_a_run_that_ended_early_for_its_last_validation_does_not_train_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.monotonic", _Clock())
    settings = SMALL | {"minutes": 1.0, "validate_every": 99, "ema": 0.9, "recompute_norms": 94}
    first = train_model(settings=settings, out=tmp_path / "run")
    position = checkpoint.load_position(tmp_path / "run")
    assert position is not None
    assert position.elapsed_s == 60
    assert train_model(out=tmp_path / "run", resume=True).records == first.records


def test_a_run_killed_after_its_last_checkpoint_is_finished_without_further_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.monotonic", _Clock())
    run = tmp_path / "run"
    first = train_model(settings=SMALL | {"minutes": 0.3, "validate_every": 9}, out=run)
    (run / checkpoint.WEIGHTS).unlink()
    settings = checkpoint.load_settings(run)
    checkpoint.save_settings(run, dataclasses.replace(settings, steps_done=0))
    again = train_model(out=run, resume=True)
    assert again.settings == first.settings
    assert again.records == first.records
    assert (run / checkpoint.WEIGHTS).exists()


def test_mcmi_tunes_in_a_run_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.monotonic", _Clock())
    settings = {"method": "mcmi", "fraction": 0.1, "batch": 64, "minutes": 1.0, "validate_every": 99}
    result = train_model(settings=settings, out=tmp_path / "run")
    tuned = ["loss cmi" in record for record in result.records]
    assert len(tuned) > 3
    assert any(tuned)
    assert tuned == sorted(tuned)


def test_own_teachers_have_no_exit_weights(tmp_path: Path) -> None:
    settings = SMALL | {"method": "at-aka", "exit_weights": (2.0, 1.0, 0.0), "epochs": 1}
    result = train_model(settings=settings, out=tmp_path / "run")
    assert result.finished
    assert checkpoint.load_settings(tmp_path / "run" / "teacher-1").exit_weights == ()


def test_mirrored_images_alternate_between_epochs() -> None:
    images = torch.rand(64, 1, 32, 32)
    index = torch.arange(64)

    def mirrored(epoch: int) -> torch.Tensor:
        """Whether each image occurs mirrored; decided by the closer of the two over all crops."""
        out = augment(images, "reflect-crop-flip", CounterRNG(5, epoch), index)
        padded = [
            torch.nn.functional.pad(version, (4, 4, 4, 4), mode="reflect") for version in (images, images.flip(3))
        ]
        errors = torch.stack(
            [
                torch.stack(
                    [
                        (version[:, :, y : y + 32, x : x + 32] - out).abs().flatten(1).amax(1)
                        for y in range(9)
                        for x in range(9)
                    ]
                ).amin(0)
                for version in padded
            ]
        )
        assert bool((errors.amin(0) == 0).all())  # each output is a crop of the image or of its mirror image
        return errors.argmin(0) == 1

    first, second, third = mirrored(0), mirrored(1), mirrored(2)
    assert torch.equal(first, ~second)
    assert torch.equal(first, third)
    assert 16 < int(first.sum()) < 48


def test_a_shift_moves_an_image_by_at_most_two_pixels() -> None:
    images = torch.rand(128, 1, 12, 12)
    shifted = augment(images, "shift", CounterRNG(0, 0), torch.arange(128))
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    windows = [padded[:, :, y : y + 12, x : x + 12] for y in range(5) for x in range(5)]
    matches = torch.stack([(window == shifted).flatten(1).all(1) for window in windows])
    assert bool((matches.sum(0) == 1).all())
    assert bool(matches.any(1).all())  # all 25 shifts occur


def test_norms_and_biases_have_no_weight_decay() -> None:
    model = build_model("resnet38", 10)
    settings = TrainSettings(decay_norms=False, nesterov=True)
    optimiser = build_optimiser(model, settings)
    decays = {id(p): group["weight_decay"] for group in optimiser.param_groups for p in group["params"]}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            expected = 0.0 if isinstance(module, nn.BatchNorm2d) or name == "bias" else settings.weight_decay
            assert decays[id(parameter)] == expected
    assert all(group["nesterov"] for group in optimiser.param_groups)


def test_recomputed_statistics_are_those_of_the_batches() -> None:
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3))
    batches = [torch.rand(8, 1, 6, 6) for _ in range(4)]
    recompute_statistics(network, batches)  # type: ignore[arg-type]
    with torch.no_grad():
        outputs = [network[0](batch) for batch in batches]
    norm = network[1]
    assert isinstance(norm, nn.BatchNorm2d)
    torch.testing.assert_close(norm.running_mean, torch.stack([o.mean((0, 2, 3)) for o in outputs]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([o.var((0, 2, 3)) for o in outputs]).mean(0))
    assert norm.momentum == 0.1
    assert not network.training


def test_device_images_equal_loaded_images() -> None:
    data = digits.load()
    index = splits.split(data).part("train")
    spec = model_spec("digits-cnn").input
    chosen = index[::5][::-1].copy()
    resident = DeviceImages(data, index, spec, "cpu").batch(torch.from_numpy(chosen))
    np.testing.assert_array_equal(resident.numpy(), data.batch(chosen, spec))
    assert not DeviceImages.fit(data, len(index), spec, "cpu")


@pytest.mark.parametrize("target_exits", ["single", "average", "max-average"])
def test_an_attack_from_given_starts_equals_craft(model, batch, target_exits: str) -> None:  # type: ignore[no-untyped-def]
    images, labels, index = batch
    attack = Attack(target_exits, PGDConfig(0.1, 0.03, 3))
    received: list[torch.Tensor | None] = []

    def recording(*arguments: Any) -> torch.Tensor:
        received.append(arguments[4])
        return run_attack(*arguments)

    attacked = craft(model, images, labels, attack, rng=CounterRNG(0, 0), index=index, run=recording)
    plain = craft(model, images, labels, attack, rng=CounterRNG(0, 0), index=index)
    assert torch.equal(attacked, plain)
    assert received[0] is not None
    assert received[0].shape == ((model.exits, *images.shape) if target_exits == "max-average" else images.shape)


def test_settings_of_earlier_runs_have_the_plain_schedule() -> None:
    stored = TrainSettings().to_json()
    new = {"minutes", "steps_done", "lr_schedule", "warmup", "nesterov", "decay_norms", "recompute_norms",
           "short_attack_until", "average_attack_until", "exit_weights", "validate_every", "changes",
           "mean", "std"}  # fmt: skip
    old = {name: value for name, value in stored.items() if name not in new}
    old |= {"decay_at": list(old["decay_at"]), "teachers": list(old["teachers"])}
    assert TrainSettings.from_json(old, "settings.json") == TrainSettings()
    assert dataclasses.replace(TrainSettings(), minutes=1.0) != TrainSettings()
