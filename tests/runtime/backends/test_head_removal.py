"""A segment without its head computes the same features, and contains nothing of the head."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from mexit.core.bundle import Bundle
from mexit.errors import Damaged
from mexit.export.macs import count_macs
from mexit.export.onnx_export import OnnxSegment, export_segment
from mexit.export.segments import cut_segments
from mexit.models import build_model
from mexit.runtime.backends.head_removal import without_outputs


@pytest.fixture(scope="module", params=["digits-cnn", "msdnet-cifar10"])
def segments(request: pytest.FixtureRequest) -> list[OnnxSegment]:
    return [export_segment(one) for one in cut_segments(build_model(request.param, 10))[:2]]


def run(content: bytes, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


@pytest.mark.slow
def test_features_stay_bit_equal_and_the_head_is_gone(segments: list[OnnxSegment]) -> None:
    for segment in segments:
        head = segment.outputs[-1].name
        pruned = without_outputs(segment.content, [head], "1.onnx")
        model = onnx.load_from_string(pruned)
        onnx.checker.check_model(model, full_check=True)
        assert not [value.name for value in model.graph.output if value.name == head]
        assert sum(count_macs(onnx.shape_inference.infer_shapes(model))) == count_macs(segment.model)[0]
        assert len(model.graph.initializer) < len(segment.model.graph.initializer)
        rng = np.random.default_rng(0)
        feeds = {one.name: rng.random((3, *one.shape[1:]), np.float32) for one in segment.inputs}
        whole, part = run(segment.content, feeds), run(pruned, feeds)
        assert [*part] == [*whole][:-1]
        for name, features in part.items():
            np.testing.assert_array_equal(features, whole[name])


def test_removing_no_output_copies_the_file(segments: list[OnnxSegment]) -> None:
    assert onnx.load_from_string(without_outputs(segments[0].content, [], "1.onnx")) == segments[0].model


def test_outputs_that_cannot_be_removed_are_refused(digits_bundle: Path) -> None:
    content = Bundle.open(digits_bundle).segment("fp32", 3)
    with pytest.raises(Damaged, match=r"last\.onnx has the outputs .*logits_3.* cannot be taken out"):
        without_outputs(content, ["logits_3"], "last.onnx")
    with pytest.raises(Damaged, match="cannot be taken out"):
        without_outputs(content, ["features_9"], "last.onnx")
    with pytest.raises(Damaged):
        without_outputs(content[:-7], ["features_9"], "last.onnx")


def test_a_node_with_subgraphs_is_refused() -> None:
    value = helper.make_tensor_value_info
    inner = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["z"])], "i", [], [value("z", TensorProto.FLOAT, [1])]
    )
    nodes = [
        helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner),
        helper.make_node("Identity", ["x"], ["w"]),
    ]
    sides = [value("c", TensorProto.BOOL, []), value("x", TensorProto.FLOAT, [1])]
    outputs = [value("y", TensorProto.FLOAT, [1]), value("w", TensorProto.FLOAT, [1])]
    content = helper.make_model(helper.make_graph(nodes, "g", sides, outputs)).SerializeToString()
    with pytest.raises(Damaged, match="keeps all of its outputs"):
        without_outputs(content, ["w"], "if.onnx")


@pytest.mark.parametrize("number", [0, 1, 127, 128, 300, 2**31, 2**62])
def test_numbers_and_texts_of_every_size_are_copied(segments: list[OnnxSegment], number: int) -> None:
    model = onnx.load_from_string(segments[0].content)
    model.model_version, model.doc_string = number, "x" * (number % 500)
    assert onnx.load_from_string(without_outputs(model.SerializeToString(), [], "1.onnx")) == model
