"""What tests of attacks share: a fresh network and real images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mexit.data import digits, splits
from mexit.train.models import MultiExit, build, preset


@pytest.fixture(scope="module")
def model() -> MultiExit:
    """`digits-cnn` as it is initialised."""
    torch.manual_seed(0)
    return build("digits-cnn", 10)


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels, places of 48 digits of the selection split."""
    data = digits.load()
    index = splits.split(data).part("selection")[:48]
    images = data.batch(index, preset("digits-cnn").input)
    return torch.from_numpy(images), torch.from_numpy(data.labels[index]), torch.from_numpy(index)
