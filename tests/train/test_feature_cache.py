"""Cached features are the inputs of the classifiers in a fresh pass; heads without a final linear layer are refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from mexit.data import digits
from mexit.errors import UsageError
from mexit.models import MultiExit, model_spec
from mexit.models.multi_exit import Stage
from mexit.train.feature_cache import classifiers, compute_features, most_images


@pytest.fixture
def network() -> MultiExit:
    torch.manual_seed(0)
    return model_spec("digits-cnn").build(10)


def pictures(network: MultiExit, count: int) -> tuple[np.ndarray, np.ndarray]:
    data = digits.load()
    spec = model_spec("digits-cnn").input
    return data.batch(np.arange(count), spec), data.labels[:count]


def test_features_are_those_of_a_fresh_pass_whatever_the_batches(network: MultiExit) -> None:
    images, labels = pictures(network, 50)
    cached = compute_features(network, [images[:32], images[32:]], labels)
    assert torch.equal(cached.labels, torch.from_numpy(labels))
    with torch.no_grad():
        logits = network.eval()(torch.from_numpy(images))
        for values, layer, expected in zip(cached.exits, classifiers(network), logits, strict=True):
            assert values.shape == (50, layer.in_features)
            torch.testing.assert_close(layer(values), expected)


def test_batch_norm_uses_its_stored_statistics_and_keeps_them() -> None:
    torch.manual_seed(0)
    network = model_spec("wide-cnn-10m").build(10).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images, labels = np.random.default_rng(0).random((6, 3, 32, 32), np.float32), np.zeros(6, np.int64)
    whole = compute_features(network, [images], labels)
    apart = compute_features(network, [images[:1], images[1:]], labels)
    for one, other in zip(whole.exits, apart.exits, strict=True):
        torch.testing.assert_close(one, other)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_a_head_with_an_operation_after_its_linear_layer_is_refused(network: MultiExit) -> None:
    stage = network.stages[1]
    assert isinstance(stage, Stage)
    stage.head = nn.Sequential(stage.head, nn.Tanh())
    images, labels = pictures(network, 4)
    with pytest.raises(UsageError, match=r"exit 2 ends in another operation"):
        compute_features(network, [images], labels)


def test_a_head_without_a_linear_layer_of_the_classes_is_refused(network: MultiExit) -> None:
    stage = network.stages[0]
    assert isinstance(stage, Stage)
    stage.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(UsageError, match="head of exit 1 has none"):
        classifiers(network)


def test_the_memory_of_the_process_limits_the_number_of_images(
    network: MultiExit, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mexit.core import resource_limits

    limits = replace(resource_limits.read_limits(), memory_bytes=4 * 1000 * 4 * 3 * 64)
    monkeypatch.setattr("mexit.data.prepared_images.read_limits", lambda: limits)
    assert most_images(network) == 1000
