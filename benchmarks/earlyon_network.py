"""The PyPI package `earlyon` on a backbone of `time_saved.py`: its own heads, calibration and inference.

The backbone has the same weights, and the exits the same places as in the bundle. earlyon trains its own heads on the
frozen backbone and selects thresholds for a loss of at most half a point; it answers one image at a time in torch.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from time_saved_networks import PageNetwork
from torch import Tensor, nn

from mexit.core.atomic_io import to_npz, write_bytes
from mexit.core.bundle import Bundle
from mexit.data.dataset import split_batches
from mexit.models import MultiExit, Stage

EPOCHS, TRAIN_IMAGES, BATCH, SEED = 5, 5000, 128, 0  # of its heads
TARGET_DROP = 0.005
INSTALLED = find_spec("earlyon") is not None
Answer = Callable[[NDArray[np.float32]], Any]


class Trunk(nn.Module):
    """The layers between two exits, for features of one tensor."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, features: Tensor) -> Tensor:
        return self.stage.forward_trunk((features,))[0]


@dataclass(frozen=True)
class EarlyonNetwork:
    """The network in torch, static and with earlyon.

    Attributes:
        calls: name to a call that answers one image, (1, C, H, W).
        answers: name to the predicted class of each test image, (N,).
        thresholds: of each exit; None where earlyon disabled it.
    """

    calls: dict[str, Answer]
    answers: dict[str, NDArray[np.int64]]
    thresholds: tuple[float | None, ...]


def open_network(network: PageNetwork) -> EarlyonNetwork | str:
    """The network with earlyon, trained and calibrated once; or the reason why earlyon cannot run it."""
    torch.set_num_threads(1)
    try:
        wrapper = _calibrated(network)
    except ValueError as error:
        return str(error)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        staged = import_module("earlyon.staged").staged_model(wrapper)
    backbone = wrapper.backbone

    @torch.inference_mode()
    def static(images: NDArray[np.float32]) -> Tensor:
        return cast("Tensor", backbone(torch.from_numpy(images)))

    calls: dict[str, Answer] = {
        "static, torch": static,
        "earlyon, hooks in torch": lambda images: wrapper(torch.from_numpy(images), mode="inference").prediction,
        "earlyon, stages in torch": lambda images: staged.infer(torch.from_numpy(images)).prediction,
    }
    early = _answers(network, "earlyon", lambda images: np.stack([_logits(staged, image) for image in images]))
    last = _answers(network, "torch", lambda images: static(images).numpy())
    answers = dict(zip(calls, (last, early, early), strict=True))  # earlyon checks that hooks and stages agree
    config = wrapper.config
    pairs = zip(config.confidence_thresholds, config.enabled_exits, strict=True)
    return EarlyonNetwork(calls, answers, tuple(value if enabled else None for value, enabled in pairs))


def _calibrated(network: PageNetwork) -> Any:
    """The wrapper with its heads and thresholds, from its file if there is one. Raises `ValueError`."""
    train, files = import_module("earlyon.training.two_stage_trainer"), import_module("earlyon.utils")
    path = network.folder / "earlyon" / f"{network.name}.pth"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a custom backbone cannot be rebuilt from the file alone
        if path.exists():
            return files.load_wrapper(path, factory=lambda: _wrapped(network)).eval()
        torch.manual_seed(SEED)
        wrapper = train.stage2_train_exits(_wrapped(network), _loader(network, "train", TRAIN_IMAGES), epochs=EPOCHS)
        import_module("earlyon.core.thresholds").calibrate_thresholds(
            wrapper,
            _loader(network, "calibration"),
            target_accuracy_drop=TARGET_DROP,
            fit_temperature=True,
            temperature_loader=_loader(network, "selection"),
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        files.save_wrapper(wrapper, path)
    return wrapper.eval()


def _wrapped(network: PageNetwork) -> Any:
    """The backbone with untrained heads after the exits of the bundle. Raises `ValueError`."""
    model = network.model.eval()
    places = [f"stage_{k}" for k in Bundle.open(network.bundle).manifest.numbers[:-1]]
    if not places:
        raise ValueError("the bundle has only the last exit")
    return import_module("earlyon.models").custom_ee(
        _sequential(model),
        places,
        len(network.data.classes),
        input_shape=(1, *model.input_shape),
    )


def _sequential(model: MultiExit) -> nn.Sequential:
    """The static network as a sequence of its stages. Raises `ValueError` if stages pass on several tensors."""
    features: tuple[Tensor, ...] = (torch.zeros(1, *model.input_shape),)
    stages = [cast("Stage", stage) for stage in model.stages]
    with torch.no_grad():
        for stage in stages:
            features = stage.forward_trunk(features)
            if len(features) > 1:
                raise ValueError(f"stages pass on {len(features)} tensors; earlyon needs one")
    parts: list[tuple[str, nn.Module]] = [("normalise", model.normalise)]
    parts += [(f"stage_{k}", Trunk(stage)) for k, stage in enumerate(stages, start=1)]
    return nn.Sequential(OrderedDict([*parts, ("head", stages[-1].head)]))


def _loader(network: PageNetwork, part: str, limit: int | None = None) -> Sequence[tuple[Tensor, Tensor]]:
    """Batches of images and labels of a split in random order, without augmentation."""
    index = np.random.default_rng(SEED).permutation(network.splits.part(part))[:limit]
    return [
        (torch.from_numpy(network.data.batch(chunk, network.spec)), torch.from_numpy(network.data.labels[chunk]))
        for chunk in split_batches(index, BATCH)
    ]


def _logits(staged: Any, image: NDArray[np.float32]) -> NDArray[np.float32]:
    """The logits (C,) of the exit that answers an image, (C, H, W)."""
    logits: NDArray[np.float32] = staged.infer(torch.from_numpy(image[None])).prediction[0].numpy()
    return logits


def _answers(network: PageNetwork, name: str, call: Answer) -> NDArray[np.int64]:
    """The predicted class of each test image, (N,); computed once. `call` maps a batch to its logits (B, C)."""
    path = network.folder / "logits" / f"{network.name}-{name}-test.npz"
    if not path.exists():
        chunks = split_batches(network.splits.part("test"), BATCH)
        logits = [call(network.data.batch(chunk, network.spec)) for chunk in chunks]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, to_npz(answers=np.concatenate(logits).argmax(axis=1)))
    with np.load(path) as stored:
        return np.asarray(stored["answers"])
