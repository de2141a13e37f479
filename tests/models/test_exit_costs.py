"""The costs counted on a network equal those of its exported graph, and the graph computes what torch computes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from mexit.cli import app
from mexit.data import digits, splits
from mexit.errors import MexitError
from mexit.export import macs
from mexit.export.bundle_writer import BundleContents, build_bundle
from mexit.export.onnx_export import OnnxSegment, export_segment
from mexit.export.segments import cut_segments
from mexit.flows import models
from mexit.models import MODELS, MultiExit, Stage, build_model, model_spec
from mexit.models.exit_costs import exit_costs
from mexit.runtime.backends.ort import OrtBackend
from mexit.runtime.reference import run_all_exits

pytestmark = pytest.mark.slow

EXPORTED = ["msdnet-cifar10", "msdnet-cifar10-single", "resnet38", "mobilenetv2", "wide-cnn", "wide-cnn-single"]


@dataclass
class Exported:
    """A network with random weights and statistics, and its segments."""

    name: str
    network: MultiExit
    segments: list[OnnxSegment]


@pytest.fixture(scope="module", params=EXPORTED)
def exported(request) -> Exported:
    return export(request.param)


def export(name: str) -> Exported:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = build_model(name, 10).eval()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):  # fresh BatchNorms are identities: a missing one would not show
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            for values in (layer.bias, layer.running_mean):
                nn.init.normal_(values, 0, 0.2)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return Exported(name, network, [export_segment(segment) for segment in cut_segments(network)])


def on_meta(name: str, classes: int) -> MultiExit:
    with torch.device("meta"):
        return build_model(name, classes)


def assert_counts_agree(exported: Exported) -> None:
    costs = exit_costs(on_meta(exported.name, 10))
    total, parameters = 0, 0
    for cost, segment in zip(costs, exported.segments, strict=True):
        trunk, head = macs.count_macs(segment.model)
        total += trunk + head
        parameters += segment.parameters
        assert (cost.macs, cost.parameters) == (total, parameters)


def assert_onnx_equals_torch(exported: Exported, batch: int) -> None:
    data = digits.load()
    spec = model_spec(exported.name).input
    names = [str(label) for label in range(10)]
    contents = BundleContents(names, spec, splits.split(data), {"fp32": exported.segments})
    backend = OrtBackend(build_bundle(Path("test"), contents))
    images = torch.rand(batch, *model_spec(exported.name).input_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = exported.network(images).numpy()
    logits = run_all_exits(backend, images.numpy())
    assert logits.shape == (model_spec(exported.name).exits, batch, 10)
    spread = expected.std(axis=(1, 2))
    assert (spread > 1e-3).all(), "constant logits would hide a difference"
    differences = np.abs(logits - expected).max(axis=(1, 2))
    assert (differences < 1e-4 * np.maximum(1, np.abs(expected).max(axis=(1, 2)))).all(), differences


def test_costs_of_the_network_equal_those_of_the_exported_graph(exported) -> None:
    assert_counts_agree(exported)


@pytest.mark.parametrize("batch", [1, 3])
def test_exported_segments_equal_torch_at_every_exit(exported, batch) -> None:
    assert_onnx_equals_torch(exported, batch)


@pytest.mark.long
def test_the_network_of_imagenet_size_exports_and_counts() -> None:
    exported = export("msdnet-imagenet")
    assert_counts_agree(exported)
    assert_onnx_equals_torch(exported, 1)


@pytest.mark.parametrize("name", MODELS)
def test_counting_on_meta_takes_no_memory_and_leaves_the_network_unchanged(name) -> None:
    network = on_meta(name, MODELS[name].classes)
    costs = exit_costs(network)
    assert network.training
    assert all(parameter.device.type == "meta" for parameter in network.parameters())
    assert not any(layer._forward_hooks for layer in network.modules())
    assert network.exits == MODELS[name].exits == len(costs)
    assert [cost.macs for cost in costs] == sorted({cost.macs for cost in costs})
    assert costs[-1].parameters == sum(parameter.numel() for parameter in network.parameters())


def test_weights_in_an_unknown_layer_are_an_error_that_names_it() -> None:
    stage = Stage(nn.ConvTranspose2d(1, 2, 3), nn.Sequential(nn.Flatten(), nn.Linear(72, 3)))
    network = MultiExit([stage], (1, 4, 4), 3)
    with pytest.raises(MexitError, match="a layer ConvTranspose2d"):
        exit_costs(network)
    assert network.training
    assert not any(layer._forward_hooks for layer in network.modules())


def test_a_layer_that_runs_twice_costs_twice() -> None:
    twice = nn.Conv2d(2, 2, 1)
    stage = Stage(nn.Sequential(twice, nn.ReLU(), twice), nn.Sequential(nn.Flatten(), nn.Linear(8, 3)))
    (cost,) = exit_costs(MultiExit([stage], (2, 2, 2), 3))
    assert cost.macs == 2 * 2 * 2 * 4 + 24


def test_models_prints_every_network_with_its_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = models.network_costs()
    monkeypatch.setattr(models, "network_costs", lambda: counted)  # counting once is enough
    done = CliRunner().invoke(app, ["models", "--json"])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert [row["name"] for row in rows] == list(MODELS)
    assert all(set(row) == {"name", "input_shape", "classes", "exits"} for row in rows)
    assert all(set(entry) == {"exit", "macs", "parameters"} for row in rows for entry in row["exits"])
    by_name = {row["name"]: row for row in rows}
    assert by_name["msdnet-imagenet"]["input_shape"] == [3, 224, 224]
    assert by_name["msdnet-imagenet"]["classes"] == 1000
    small = 9 * 32 * 676 + 32 * 9 * 16 * 144 + 576 * 200 + 200 * 200 + 2000
    assert by_name["small-cnn"]["exits"][0] == {"exit": 1, "macs": small, "parameters": 162_554}
    shown = CliRunner().invoke(app, ["models"], env={"COLUMNS": "80"})
    assert shown.exit_code == 0
    assert all(name in shown.stdout for name in MODELS)
