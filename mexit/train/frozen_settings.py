"""Settings of a run that starts from a frozen network: which ones fit together, and the weights of its exits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mexit.errors import UsageError
from mexit.train.option_names import option_name

_STEEPNESS = 4
# Settings that determine the heads of a frozen network. All others belong to joint training.
_OF_HEADS = frozenset(
    (
        "data", "model", "weights", "size", "channels", "fraction", "omit_class", "group", "split_seed", "seed",
        "precision", "freeze", "finetune",
    )
)  # fmt: skip


def weights_of_heads(accuracy: Sequence[float], classes: int) -> tuple[float, ...]:
    """Weights of the exits in joint training: the share of the last exit's gain over chance, to the power `_STEEPNESS`.

    Linear heads of the first blocks of a pretrained network are poor. With equal weights their gradients, a hundred
    times those of the last exit, destroy its features.

    Args:
        accuracy: of each trained head on the selection split, (E,).
        classes: C.

    Returns:
        (E,) in [0, 1]; 1 for the last exit.
    """
    chance = 1 / classes
    best = max(accuracy[-1] - chance, 1e-6)
    shares = [min(1.0, max(0.0, one - chance) / best) for one in accuracy[:-1]]
    return (*(round(share**_STEEPNESS, 3) for share in shares), 1.0)


def check_frozen(given: Mapping[str, Any]) -> None:
    """Reject settings that contradict a frozen network, or that would have no effect with it.

    Args:
        given: fields of `TrainSettings` that the user gave, and "robust".

    Raises:
        UsageError: no network, no length, a second one, or a setting of joint training without joint training.
    """
    frozen, finetune = given.get("freeze"), given.get("finetune")
    if finetune == 0 and not frozen:
        raise UsageError("--finetune 0 trains nothing: give at least 1, or --freeze to train the heads alone")
    if finetune and frozen is False:
        raise UsageError("--finetune trains on from the heads of a frozen network: leave out freeze=False")
    if not frozen and not finetune:
        return
    if "model" not in given:
        raise UsageError("--freeze keeps a network as it is: name one with --model")
    if "epochs" in given:
        raise UsageError("--freeze trains the heads first: set the epochs of joint training after it by --finetune N")
    if finetune and "minutes" in given:
        raise UsageError("joint training ends after --finetune N epochs or after --minutes: give one of them")
    unused = sorted(given.keys() - _OF_HEADS - {"minutes"})
    if unused and not finetune and "minutes" not in given:
        names = ", ".join(map(option_name, unused))
        raise UsageError(
            f"--freeze alone trains the heads on clean pictures, so {names} would change nothing: leave it out, or "
            "add --finetune N to train all layers for N epochs after that"
        )
