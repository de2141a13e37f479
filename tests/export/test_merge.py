"""Merged segments and the static network compute what the chain computes, without the heads between them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mexit.core.onnx_merge import merge_models
from mexit.data import digits
from mexit.errors import Damaged
from mexit.export.fp16 import convert_fp16
from mexit.export.int8 import quantize_int8
from mexit.export.macs import count_macs
from mexit.export.merge import merge_segments, static_network
from mexit.export.onnx_export import OnnxSegment, export_segment
from mexit.export.segments import cut_segments
from mexit.models import model_spec
from mexit.runtime.backends.base import HostCarried
from mexit.runtime.backends.ort import OrtSegment
from mexit.train.checkpoint import load_model

Floats = NDArray[np.float32]


@pytest.fixture(scope="module")
def images() -> Floats:
    return digits.load().batch(np.arange(32), model_spec("digits-cnn").input)


@pytest.fixture(scope="module")
def segments(workspace: Path) -> list[OnnxSegment]:
    return [export_segment(part) for part in cut_segments(load_model(workspace / "runs" / "digits")[0])]


@pytest.fixture(scope="module")
def variants(segments: list[OnnxSegment], images: Floats) -> dict[str, list[OnnxSegment]]:
    int8, carried = [], [images]
    for segment in segments:
        int8.append(quantize_int8(segment, carried))
        carried = run(segment, carried)[:-1]
    return {"fp32": segments, "int8": int8, "fp16": [convert_fp16(segment) for segment in segments]}


def run(segment: OnnxSegment, arrays: list[Floats]) -> list[Floats]:
    features, logits = OrtSegment(segment.content, segment.inputs, segment.outputs, "s").run(HostCarried(arrays))
    return [*features.arrays, logits]


def run_chain(chain: list[OnnxSegment], images: Floats) -> list[Floats]:
    carried = [images]
    for segment in chain:
        *carried, logits = run(segment, carried)
    return [*carried, logits]


@pytest.mark.parametrize("variant", ["fp32", "int8", "fp16"])
def test_merged_segments_compute_the_same_features_and_logits(variant, variants, images) -> None:
    chain = variants[variant]
    tolerance = 0.05 if variant == "int8" else 1e-4  # one step of a scale may round the other way
    for merged, parts in (
        ([merge_segments(chain[:2]), chain[2]], chain),
        ([merge_segments(chain[:2])], chain[:2]),
        ([chain[0], merge_segments(chain[1:])], chain),
        ([static_network(chain)], chain),
    ):
        for actual, expected in zip(run_chain(merged, images), run_chain(parts, images), strict=True):
            scale = max(1.0, float(np.abs(expected).max()))
            assert np.abs(actual - expected).max() <= tolerance * scale


@pytest.mark.parametrize("variant", ["fp32", "int8", "fp16"])
def test_heads_between_merged_segments_are_gone(variant, variants, workspace) -> None:
    chain = variants[variant]
    model = load_model(workspace / "runs" / "digits")[0]
    heads = [sum(value.numel() for value in stage.head.parameters()) for stage in model.stages]
    total = sum(value.numel() for value in model.parameters())
    (trunk_1, head_1), (trunk_2, head_2), (trunk_3, _) = (count_macs(one.model) for one in chain)

    static, merged = static_network(chain), merge_segments(chain[:2])
    assert count_macs(static.model) == (trunk_1 + trunk_2 + trunk_3, 0)
    assert count_macs(merged.model) == (trunk_1 + trunk_2, head_2)
    assert static.parameters == total - heads[0] - heads[1]
    assert merged.parameters == chain[0].parameters + chain[1].parameters - heads[0]
    assert head_1 > 0
    assert merged.head_parameters == heads[1]
    assert [one.name for one in static.model.graph.output] == ["logits_3"]
    assert [one.name for one in merged.outputs] == [one.name for one in chain[1].outputs]
    stored = sum(numpy_helper.to_array(one).nbytes for one in static.model.graph.initializer)
    assert stored < sum(numpy_helper.to_array(one).nbytes for part in chain for one in part.model.graph.initializer)
    names = [name for node in static.model.graph.node for name in node.output]
    assert len(names) == len(set(names))


def test_a_merge_of_merged_segments_and_of_a_prefix(segments, images) -> None:
    again = static_network([merge_segments(segments[:2]), segments[2]])
    assert np.allclose(run(again, [images])[0], run_chain(segments, images)[-1], atol=1e-4)
    prefix = static_network(segments[:2])
    assert [one.name for one in prefix.outputs] == ["logits_2"]
    assert np.allclose(run(prefix, [images])[0], run_chain(segments[:2], images)[-1], atol=1e-4)
    assert merge_segments(segments[:1]) is segments[0]
    assert static_network(segments).content == static_network(segments).content


def graph(inputs, nodes, outputs, weights=(), opset=20) -> bytes:
    def values(names):
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, (None, 2)) for name in names]

    tensors = [helper.make_tensor(name, TensorProto.FLOAT, (2,), value) for name, value in weights]
    made = helper.make_graph(nodes, "g", values(inputs), values(outputs), tensors)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return model.SerializeToString()


def test_several_carried_tensors_and_equal_names_inside() -> None:
    node = helper.make_node
    first = graph(
        ["x"],
        [node("Add", ["x", "w"], ["a"]), node("Mul", ["x", "w"], ["b"]), node("Sub", ["a", "b"], ["logits_1"])],
        ["a", "b", "logits_1"],
        [("w", [1.0, 2.0])],
    )
    second = graph(["b", "a"], [node("Mul", ["a", "w"], ["t"]), node("Add", ["t", "b"], ["y"])], ["y"], [("w", [3, 4])])
    merged = onnx.load_model_from_string(merge_models([first, second], "m"))
    onnx.checker.check_model(merged, full_check=True)
    assert [one.op_type for one in merged.graph.node] == ["Add", "Mul", "Mul", "Add"]
    (y,) = onnx.reference.ReferenceEvaluator(merged).run(None, {"x": np.array([[1, 1]], np.float32)})
    assert y.tolist() == [[2 * 3 + 1, 3 * 4 + 2]]


def test_what_cannot_be_merged_is_an_error() -> None:
    relu = [helper.make_node("Relu", ["x"], ["y"])]
    plain = graph(["x"], relu, ["y"])
    with pytest.raises(Damaged, match="segment 2 needs x, which segment 1 does not compute"):
        merge_models([plain, plain], "m")
    other = graph(["y"], [helper.make_node("Relu", ["y"], ["z"])], ["z"], opset=19)
    with pytest.raises(Damaged, match="different versions of the operator set"):
        merge_models([plain, other], "m")
    with pytest.raises(Damaged, match="a model with one graph"):
        merge_models([b"", plain], "m")
    inner = helper.make_graph(relu, "inner", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, (None, 2))])
    branch = helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    with pytest.raises(Damaged, match="graphs of their own"):
        merge_models([graph(["x"], [branch], ["y"])], "m")
