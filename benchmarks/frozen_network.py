"""What the page of `time_saved.py` says about a frozen network beside its times.

From pictures to a calibrated bundle: duration of `mexit train --freeze` and `mexit export`, as a user types them.
Logistic regression: scikit-learn's (penalty |W|^2 / 2, weight 1 / C of the sum of the losses) on the features that the
last exit reads, as they are, in float64; of several C the best one on the test split is taken.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from time_saved_networks import PageNetwork
from torch import Tensor

from mexit.calibrate.clusters import mean_with_error
from mexit.data.dataset import split_batches
from mexit.train.feature_cache import CachedFeatures, classifiers, compute_features

INVERSE_PENALTIES = (0.01, 1.0, 100.0)  # C
_BATCH, _STEPS = 32, 1000


def time_from_pictures(network: PageNetwork) -> dict[str, Any]:
    """Seconds of training and of export in processes of their own, with empty caches, and the number of pictures."""
    folder = network.folder / "timed" / network.name
    shutil.rmtree(folder, ignore_errors=True)
    run, bundle, model = folder / "run", folder / "bundle", network.recipe.settings["model"]
    train = ["train", "--model", model, "--freeze", "--data", network.data_name, "--out", str(run)]
    seconds = {"train": _mexit(train, folder), "export": _mexit(["export", str(run), "--out", str(bundle)], folder)}
    return seconds | {"pictures": len(network.data) - len(network.splits.part("test"))}


def compare_with_regression(network: PageNetwork) -> dict[str, float]:
    """Test accuracy of the last exit, and its paired change against the regression with its standard error."""
    train, test = (_features(network, part) for part in ("train", "test"))
    with torch.no_grad():
        own = classifiers(network.model)[-1](test.exits[-1]).argmax(dim=1) == test.labels
    groups = network.splits.groups_of(network.splits.part("test"))
    other = regression_answers(train, test, network.model.classes)
    change = mean_with_error(own.numpy().astype(np.float64) - other, groups)
    return {"accuracy": float(own.double().mean()), "value": change.value, "stderr": change.stderr}


def regression_answers(train: CachedFeatures, test: CachedFeatures, classes: int) -> NDArray[np.bool_]:
    """Whether the best regression on the last exit's features is correct on each test image, (N,)."""
    features, tested = train.exits[-1].double(), test.exits[-1].double()
    fits = (_fit(features, train.labels, classes, 1 / (c * len(features))) for c in INVERSE_PENALTIES)
    correct = [F.linear(tested, weight, bias).argmax(dim=1) == test.labels for weight, bias in fits]
    return max(correct, key=lambda one: int(one.sum())).numpy()


def _fit(features: Tensor, labels: Tensor, classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    """Weight (C, D) and bias (C,) with the smallest mean cross-entropy plus penalty / 2 |W|^2."""
    weight = torch.zeros(classes, features.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(F.linear(features, weight, bias), labels) + penalty / 2 * weight.square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    return weight.detach(), bias.detach()


def _features(network: PageNetwork, part: str) -> CachedFeatures:
    index = network.splits.part(part)
    batches = (network.data.batch(rows, network.spec) for rows in split_batches(index, _BATCH))
    return compute_features(network.model, batches, network.data.labels[index])


def _mexit(arguments: list[str], folder: Path) -> float:
    """Run a command of mexit; returns its duration in seconds."""
    environment = os.environ | {"MEXIT_CACHE": str((folder / "device-cache").absolute())}
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "mexit", *arguments], env=environment, check=True)
    return time.monotonic() - start
