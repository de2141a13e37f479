"""MACs counted on the exported graph equal counts by hand; an unknown operator is an error."""

from __future__ import annotations

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from mexit import attach_exits
from mexit.errors import BackendError
from mexit.export.macs import count_macs
from mexit.export.onnx_export import export_segment
from mexit.export.segments import cut_segments
from mexit.models import build_model
from mexit.models.exit_costs import exit_costs

# By hand: (trunk, head) of each segment, convolution = C_in k k C_out H W, linear = in x out.
BY_HAND = {
    "digits-cnn": [
        (9 * 16 * 64 + 16 * 9 * 24 * 64, 24 * 16 * 64 + 640),
        (24 * 9 * 40 * 16 + 40 * 9 * 40 * 16, 40 * 4 * 64 + 640),
        (40 * 9 * 64 * 16 + 64 * 9 * 64 * 16 + 64 * 4 * 64 + 640, 0),
    ],
    "small-cnn": [
        (9 * 32 * 676, 32 * 9 * 16 * 144 + 576 * 200 + 200 * 200 + 2000),
        (32 * 9 * 32 * 576 + 32 * 9 * 64 * 100, 1600 * 200 + 200 * 200 + 2000),
        (64 * 9 * 64 * 64 + 1024 * 200 + 200 * 200 + 2000, 0),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_HAND)
def test_costs_and_parameters_equal_a_hand_count(name) -> None:
    model = build_model(name, 10)
    exported = [export_segment(part) for part in cut_segments(model)]
    assert [count_macs(segment.model) for segment in exported] == BY_HAND[name]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert sum(segment.parameters for segment in exported) == parameters


class Tokens(nn.Module):
    """(B, D, N) to (B, N, D)."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.transpose(1, 2)


class Mean(nn.Module):
    """(B, N, D) to (B, D)."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.mean(dim=1)


class Attention(nn.Module):
    """A block of a vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm(tokens)).reshape(-1, 16, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        tokens = tokens + self.out(mixed.transpose(1, 2).flatten(2))
        return tokens + self.mlp(tokens)


@pytest.mark.long
def test_the_counts_of_attention_equal_those_of_torch() -> None:
    torch.manual_seed(0)
    embed = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(2))
    module = nn.Sequential(embed, Tokens(), Attention(), Attention(), Mean(), nn.Linear(8, 5))
    network = attach_exits(module, ["2"], classes=5, input_shape=(3, 16, 16), mean=(0.5,) * 3, std=(0.25,) * 3).eval()
    counted = [count_macs(export_segment(part).model) for part in cut_segments(network)]
    first, last = exit_costs(network)
    assert [sum(counted[0]), sum(map(sum, counted))] == [first.macs, last.macs]
    assert counted[0][1] == first.head_macs


def test_products_of_windows_and_of_another_order_of_sides_count_every_row_of_one_image() -> None:
    windows = _graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": (8, 6)}, ("x", ("4*batch", 5, 8)), ("y", (None, 5, 6))
    )
    assert count_macs(windows) == (4 * 5 * 8 * 6, 0)
    rows = _graph(
        [helper.make_node("Gemm", ["x", "w"], ["y"])], {"w": (8, 6)}, ("x", ("16*batch", 8)), ("y", ("16*batch", 6))
    )
    assert count_macs(rows) == (16 * 8 * 6, 0)
    second = _graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": (8, 6)}, ("x", (5, "batch", 8)), ("y", (5, "batch", 6))
    )
    assert count_macs(second) == (5 * 8 * 6, 0)


def test_grouped_convolution_and_matmul_by_hand() -> None:
    model = _graph(
        [
            helper.make_node("Conv", ["x", "w"], ["c"], group=4, pads=[1, 1, 1, 1]),
            helper.make_node("Flatten", ["c"], ["f"]),
            helper.make_node("MatMul", ["f", "m"], ["y"]),
        ],
        {"w": (8, 1, 3, 3), "m": (8 * 25, 6)},
        ("x", (None, 4, 5, 5)),
        ("y", (None, 6)),
    )
    assert count_macs(model) == (8 * 9 * 25 + 200 * 6, 0)


def test_an_operator_without_a_known_cost_is_an_error_that_names_it() -> None:
    model = _graph([helper.make_node("Erf", ["x"], ["y"])], {}, ("x", (None, 4)), ("y", (None, 4)))
    with pytest.raises(BackendError, match=r"ai\.onnx\.Erf"):
        count_macs(model)


def test_an_unknown_shape_is_an_error() -> None:
    model = _graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": (4, 3)}, ("x", (None, None)), ("y", (None, 3))
    )
    with pytest.raises(BackendError, match="unknown shape of x"):
        count_macs(model)


def _graph(nodes, weights, source, target) -> onnx.ModelProto:
    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)] for name, shape in (source, target)
    )
    tensors = []
    for name, shape in weights.items():
        size = 1
        for side in shape:
            size *= side
        tensors.append(helper.make_tensor(name, TensorProto.FLOAT, shape, [0.5] * size))
    model = helper.make_model(helper.make_graph(nodes, "g", inputs, outputs, tensors))
    return onnx.shape_inference.infer_shapes(model)
