"""Trains the heads of a frozen network: a logistic regression per exit on cached features.

Each classifier is a multinomial logistic regression with an L2 penalty on standardised features, fitted by L-BFGS on
all images at once (D. C. Liu, J. Nocedal: On the limited memory BFGS method for large scale optimization, 1989). The
penalty is the one with the smallest cross-entropy on the selection split.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mexit.core.progress import Advance, Progress
from mexit.data.dataset import DataSet, evenly_spaced, split_batches
from mexit.data.splits import Splits
from mexit.models.multi_exit import MultiExit, Stage
from mexit.train.config import TrainSettings
from mexit.train.dataloader import load_batches
from mexit.train.feature_cache import classifiers, compute_features, most_images

# Weights of the penalty |W|^2 / 2 beside the mean cross-entropy, from strong to weak. scikit-learn's default, C = 1,
# is 1 / N.
PENALTIES = (1.0, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)
_PATIENCE = 2  # weaker penalties that are tried after the best one
_STEPS, _HISTORY, _TOLERANCE = 200, 20, 1e-5  # of L-BFGS, per penalty: at most, pairs that it keeps, of the gradient
_CONSTANT = 1e-5  # standard deviation relative to the mean below which a feature is a constant
_BATCH = 32


class _Stopped(Exception):
    """The caller asked to stop before the heads were complete."""


@dataclass(frozen=True)
class Regression:
    """A fitted logistic regression: logits = (features - mean) / std @ weight.T + bias.

    Attributes:
        mean, std: of the features of the training images, (D,) float32; std is 1 for a constant.
        weight: (C, D) float32.
        bias: (C,) float32.
        penalty: weight of the penalty, one of `PENALTIES`.
    """

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor
    penalty: float

    def logits(self, features: Tensor) -> Tensor:
        """Features (N, D) to logits (N, C)."""
        return F.linear((features - self.mean) / self.std, self.weight, self.bias)

    @torch.no_grad()
    def store(self, head: nn.Module, classifier: nn.Linear) -> None:
        """Write the regression into a head that ends in `classifier`.

        A BatchNorm before the classifier, whose own weights were not trained, standardises the features, so that
        fine-tuning starts from inputs of one scale. Without one, the weights of the classifier do it.
        """
        layers = [layer for layer in head.modules() if not isinstance(layer, nn.Dropout)]
        norm = layers[layers.index(classifier) - 1]
        mean, std = self.mean, self.std
        if isinstance(norm, nn.BatchNorm1d) and _is_untrained(norm):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            scale = (norm.running_var + norm.eps).sqrt()  # the features were measured behind this layer
            norm.running_mean += scale * mean
            norm.running_var.copy_(((scale * std).square() - norm.eps).clamp(min=0))
            mean, std = torch.zeros_like(mean), scale * std / (norm.running_var + norm.eps).sqrt()
        weight = self.weight / std
        classifier.weight.copy_(weight)
        classifier.bias.copy_(self.bias - weight @ mean)


def _is_untrained(norm: nn.BatchNorm1d) -> bool:
    """Whether a BatchNorm has no weights of its own, or those that it was created with."""
    return not norm.affine or bool((norm.weight == 1).all() and (norm.bias == 0).all())


def train_heads(
    model: MultiExit,
    settings: TrainSettings,
    data: DataSet,
    splits: Splits,
    workers: int,
    progress: Progress,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[float] | None:
    """Train the classifier of every exit, in place; all other weights stay as they are.

    Args:
        model: network; it is in eval mode afterwards.
        settings: settings of the run.
        data, splits: images and their parts. Where memory does not hold the features of all training images, the heads
            are trained on evenly spaced ones.
        workers: loader threads, see `dataloader.load_batches`.
        progress: receives progress bars and notes.
        should_stop: called after every batch and every head.

    Returns:
        Accuracy of every exit on the selection split, (E,); None if `should_stop` ended the training.

    Raises:
        UsageError: a head does not end in a linear layer.
        BadInput, NotFound, Damaged: an image cannot be read; the message names it.
    """
    index, selection = splits.part("train"), splits.part("selection")
    chosen = evenly_spaced(index, max(1, most_images(model) - len(selection)))
    if len(chosen) < len(index):
        progress.note(f"memory holds the features of {len(chosen)} of {len(index)} training images: heads use these")
    spec = settings.model_spec().input
    try:
        with progress.track("frozen network", len(chosen) + len(selection)) as advance:
            train, held_out = (
                compute_features(
                    model,
                    _until(should_stop, advance, load_batches(data, split_batches(part, _BATCH), spec, workers)),
                    data.labels[part],
                )
                for part in (chosen, selection)
            )
        accuracy = []
        layers = classifiers(model)
        with progress.track("heads", len(layers)) as advance:
            for k, layer in enumerate(layers):
                if should_stop():
                    return None
                fitted = fit_regression(train.exits[k], train.labels, held_out.exits[k], held_out.labels, model.classes)
                fitted.store(cast("Stage", model.stages[k]).head, layer)
                correct = fitted.logits(held_out.exits[k]).argmax(dim=1) == held_out.labels
                accuracy.append(round(float(correct.float().mean()), 6))
                advance(1, f"exit {k + 1}: {100 * accuracy[-1]:.1f}% of the selection split")
    except _Stopped:
        return None
    return accuracy


def fit_regression(
    features: Tensor, labels: Tensor, held_out: Tensor, held_out_labels: Tensor, classes: int
) -> Regression:
    """Fit a logistic regression on standardised features, with the penalty that suits held-out images best.

    The penalties are tried from strong to weak, each from the solution before, until the cross-entropy on the held-out
    images has grown `_PATIENCE` times.

    Args:
        features: of the training images, (N, D) float32.
        labels: their classes, (N,) int64.
        held_out, held_out_labels: features (M, D) and classes (M,) of other images.
        classes: C.
    """
    std, mean = torch.std_mean(features, dim=0, correction=0)
    std = torch.where(std > _CONSTANT * mean.abs(), std, torch.ones_like(std))
    standardised, tested = (features - mean) / std, (held_out - mean) / std
    weight = torch.zeros(classes, features.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    best, lowest, worse = Regression(mean, std, weight.detach(), bias.detach(), PENALTIES[0]), math.inf, 0
    for penalty in PENALTIES:
        _minimise(weight, bias, standardised, labels, penalty)
        with torch.no_grad():
            loss = float(F.cross_entropy(F.linear(tested, weight, bias), held_out_labels))
            if loss < lowest:
                best, lowest, worse = Regression(mean, std, weight.clone(), bias.clone(), penalty), loss, 0
                continue
        worse += 1
        if worse == _PATIENCE:
            break
    return best


def _minimise(weight: Tensor, bias: Tensor, features: Tensor, labels: Tensor, penalty: float) -> None:
    """Minimise the mean cross-entropy plus penalty / 2 |W|^2 over `weight` (C, D) and `bias` (C,), in place."""
    optimiser = torch.optim.LBFGS(
        [weight, bias], max_iter=_STEPS, history_size=_HISTORY, tolerance_grad=_TOLERANCE, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(F.linear(features, weight, bias), labels) + penalty / 2 * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimiser.step(loss)  # type: ignore[no-untyped-call]


def _until(
    should_stop: Callable[[], bool], advance: Advance, loaded: Generator[NDArray[np.float32], None, None]
) -> Iterator[NDArray[np.float32]]:
    """The batches; each is reported once the next one is requested, and the loader ends with the last or on a stop."""
    with closing(loaded):
        for batch in loaded:
            yield batch
            advance(len(batch), "")
            if should_stop():
                raise _Stopped
