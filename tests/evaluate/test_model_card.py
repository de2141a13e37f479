"""The training command and the settings on the model card."""

from __future__ import annotations

import shlex

import typer

from mexit.cli import app
from mexit.evaluate.model_card import train_command, used_settings
from mexit.train.config import resolve


def test_the_training_command_of_a_folder_has_options_that_exist() -> None:
    chosen = {"size": (48, 96), "channels": 3, "mean": (0.4, 0.4, 0.4), "std": (0.2, 0.2, 0.2), "grey_bits": 12}
    words = shlex.split(train_command(resolve("folder:my pictures", None, {"method": "clean", **chosen})))
    command = typer.main.get_command(app).get_command(None, "train")
    known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
    assert {word for word in words if word.startswith("--")} <= known
    assert words[words.index("--size") + 1] == "48x96"
    assert words[words.index("--data") + 1] == "folder:my pictures"


def test_settings_without_effect_are_not_listed() -> None:
    attack = {"eps", "step", "steps", "test_steps", "selection_steps", "norm", "rule", "restarts", "loss"}
    clean = used_settings(resolve("folder:p", None, {"minutes": 5.0}))
    assert not {*attack, "epochs", "decay_factor"} & set(clean)
    assert (clean["minutes"], clean["seed"], clean["lr_schedule"]) == (5.0, 0, "one-cycle")
    attacked = used_settings(resolve("digits", None, {"epochs": 3}))
    assert attack <= set(attacked)
    assert (attacked["epochs"], "minutes" in attacked) == (3, False)
