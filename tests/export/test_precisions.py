"""int8 and fp16: their graphs, the report on them, and their calibration."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from command_line import refused, typed
from onnx import TensorProto, numpy_helper
from PIL import Image

from mexit import BackendError, UsageError
from mexit.core.bundle import Bundle
from mexit.data import digits
from mexit.data.splits import Splits, split
from mexit.export.bundle_writer import BundleContents, build_bundle
from mexit.export.fp16 import HalfModule, convert_fp16
from mexit.export.macs import count_macs
from mexit.export.onnx_export import OnnxSegment, export_segment, finalize
from mexit.export.segments import cut_segments
from mexit.export.validate import compare_precisions
from mexit.flows.export import ExportOptions, export_bundle
from mexit.models import model_spec
from mexit.runtime.backends.base import HostCarried
from mexit.runtime.backends.ort import OrtBackend, OrtSegment
from mexit.runtime.reference import run_all_exits
from mexit.train.checkpoint import load_model


@pytest.fixture(scope="module")
def segments(workspace: Path) -> list[OnnxSegment]:
    """The fp32 segments of the session's run."""
    return [export_segment(part) for part in cut_segments(load_model(workspace / "runs" / "digits")[0])]


def graph_of(bundle: Bundle, variant: str, k: int) -> onnx.ModelProto:
    return onnx.load_from_string(bundle.segment(variant, k))


def test_activations_are_u8_weights_s8_per_channel_and_the_last_layer_float(int8_bundle: Path) -> None:
    bundle = Bundle.open(int8_bundle)
    for k in (1, 2, 3):
        graph = graph_of(bundle, "int8", k).graph
        stored = {tensor.name: tensor for tensor in graph.initializer}
        quantised = {node.input[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
        weights = [node for name, node in quantised.items() if stored.get(name, TensorProto()).dims[1:]]
        assert len(weights) == 3, "two convolutions and the hidden layer of the head"
        for node in weights:
            assert stored[node.input[0]].data_type == TensorProto.INT8
            assert stored[node.input[1]].dims == stored[node.input[0]].dims[:1] != [1]
            assert not numpy_helper.to_array(stored[node.input[2]]).any()
        zeros = [stored[node.input[2]].data_type for node in graph.node if node.op_type == "QuantizeLinear"]
        assert set(zeros) == {TensorProto.UINT8}
        last = next(node for node in graph.node if graph.output[-1].name in node.output)
        assert last.op_type == "Gemm"
        assert stored[last.input[1]].data_type == TensorProto.FLOAT


@pytest.mark.parametrize("variant", ["int8", "fp16"])
def test_inputs_outputs_and_macs_are_those_of_fp32(variant, int8_bundle, segments) -> None:
    if variant == "int8":
        manifest = Bundle.open(int8_bundle).manifest
        chains = [[(one.inputs, one.outputs) for one in manifest.variants[name].segments] for name in ("int8", "fp32")]
        costs = [
            [count_macs(graph_of(Bundle.open(int8_bundle), name, k)) for k in (1, 2, 3)] for name in ("int8", "fp32")
        ]
    else:
        both = ([convert_fp16(one) for one in segments], segments)
        chains = [[(one.inputs, one.outputs) for one in chain] for chain in both]
        costs = [[count_macs(one.model) for one in chain] for chain in both]
    assert chains[0] == chains[1]
    assert {tensor.dtype for sides in chains[0] for side in sides for tensor in side} == {"float32"}
    assert costs[0] == costs[1]


def test_a_variant_with_other_macs_is_refused(segments) -> None:
    data = digits.load()
    variants = {"fp32": segments, "half": [*segments[:2], dataclasses.replace(segments[2], parameters=1)]}
    contents = BundleContents(data.classes, model_spec("digits-cnn").input, split(data), variants)
    with pytest.raises(BackendError, match="the half segments have other MACs than the fp32 segments"):
        build_bundle(Path("x"), contents)


def test_the_report_agrees_with_the_bundle_on_the_selection_split(int8_bundle: Path) -> None:
    bundle = Bundle.open(int8_bundle)
    data, splits = digits.load(), Splits.of_bundle(bundle)
    index = splits.part("selection")
    images, labels = data.batch(index, bundle.manifest.input), data.labels[index]
    fp32, int8 = (run_all_exits(OrtBackend(bundle, precision=one), images) for one in ("fp32", "int8"))
    report = bundle.manifest.provenance["parity"]
    assert (report["precision"], report["split"], report["n"]) == ("int8", "selection", len(index))
    for k, row in enumerate(report["exits"]):
        assert row["exit"] == k + 1
        assert row["largest_difference"] == pytest.approx(np.abs(int8[k] - fp32[k]).max(), rel=1e-6)
        assert 0 < row["largest_difference"] < 0.05 * np.abs(fp32).max()
        assert row["agreement"] == (int8[k].argmax(1) == fp32[k].argmax(1)).mean() > 0.97
        assert row["accuracy"] == (int8[k].argmax(1) == labels).mean()
        assert row["accuracy_fp32"] == (fp32[k].argmax(1) == labels).mean()


def test_a_comparison_by_hand_and_logits_that_are_not_finite() -> None:
    before = np.array([[[2.0, 1.0], [0.0, 3.0], [1.0, 0.0], [0.0, 1.0]]], np.float32)
    after = np.array([[[2.0, 1.5], [4.0, 3.0], [1.0, 0.0], [0.0, 1.0]]], np.float32)
    comparison = compare_precisions(before, after, np.array([0, 1, 0, 0]))[0]
    assert dataclasses.astuple(comparison) == (1, 4.0, 0.75, 0.5, 0.75)
    after[0, 1, 0] = np.inf
    with pytest.raises(BackendError, match="exit 1 has logits that are not finite"):
        compare_precisions(before, after, np.array([0, 1, 0, 0]))


def test_fp16_is_float16_inside_and_float32_at_inputs_and_outputs(segments, test_digits) -> None:
    images = (test_digits[0][:64, None] / np.float32(255)).astype(np.float32)
    carried = {"fp32": HostCarried([images]), "fp16": HostCarried([images])}
    for segment in segments:
        half = convert_fp16(segment)
        inferred = onnx.shape_inference.infer_shapes(half.model, strict_mode=True).graph
        ends = {value.name for value in (*inferred.input, *inferred.output)}
        types = {value.type.tensor_type.elem_type for value in inferred.value_info if value.name not in ends}
        types |= {tensor.data_type for tensor in inferred.initializer}
        assert TensorProto.FLOAT16 in types
        assert TensorProto.FLOAT not in types
        logits = {}
        for name, one in (("fp32", segment), ("fp16", half)):
            carried[name], logits[name] = OrtSegment(one.content, one.inputs, one.outputs, name).run(carried[name])
        difference = np.abs(logits["fp16"] - logits["fp32"]).max()
        assert 0 < difference < 5e-3 * np.abs(logits["fp32"]).max()


def test_constants_casts_and_outputs_with_consumers_become_float16() -> None:
    make = onnx.helper.make_node
    nodes = [
        make("Constant", [], ["half"], value_float=0.5),
        make("Constant", [], ["two"], value=numpy_helper.from_array(np.float32([2.0]))),
        make("Mul", ["x", "half"], ["features"]),
        make("Cast", ["features"], ["cast"], to=TensorProto.FLOAT),
        make("Mul", ["cast", "two"], ["logits"]),
    ]
    sides = [
        onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, ("N", 3)) for name in ("x", "features", "logits")
    ]
    graph = onnx.helper.make_graph(nodes, "g", sides[:1], sides[1:])
    segment = finalize(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), 0
    )
    half = convert_fp16(segment)
    types = {tensor.data_type for tensor in half.model.graph.initializer}
    types |= {
        attribute.t.data_type for node in half.model.graph.node for attribute in node.attribute if attribute.t.dims
    }
    types |= {value.type.tensor_type.elem_type for value in half.model.graph.value_info}
    assert types == {TensorProto.FLOAT16}
    x = np.array([[1.0, 2.0, 3.0]], np.float32)
    features, logits = OrtSegment(half.content, half.inputs, half.outputs, "x").run(HostCarried([x]))
    np.testing.assert_array_equal(logits, x)
    np.testing.assert_array_equal(features.arrays[0], x / 2)


@pytest.mark.parametrize("factor", [1.0, 1e5])
def test_an_activation_beyond_float16_is_detected(workspace, segments, test_digits, factor) -> None:
    """ONNX Runtime on a CPU would hide it, because it computes float16 graphs in float32."""
    model = load_model(workspace / "runs" / "digits")[0]
    arrays = [(test_digits[0][:8, None] / np.float32(255) * np.float32(factor)).astype(np.float32)]
    *_, logits = HalfModule(cut_segments(model)[0].module)(arrays)
    opened = OrtSegment(segments[0].content, segments[0].inputs, segments[0].outputs, "x")
    expected = opened.run(HostCarried(arrays))[1]
    assert np.isfinite(expected).all()
    assert next(model.parameters()).dtype == torch.float32, "the network itself is unchanged"
    if factor == 1.0:
        assert 0 < np.abs(logits - expected).max() < 1e-2 * np.abs(expected).max()
    else:
        with pytest.raises(BackendError, match="not finite"):
            compare_precisions(expected[None], logits[None], test_digits[1][:8])


def test_a_weight_beyond_float16_is_refused(segments) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(segments[0].model)
    weight = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 4)
    values = numpy_helper.to_array(weight).copy()
    values.flat[0] = 7e4
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    with pytest.raises(BackendError, match=rf"{weight.name} has values beyond float16's largest \(65504\)"):
        convert_fp16(dataclasses.replace(segments[0], model=model))


def test_quantising_leaves_no_handler_on_the_root_logger(int8_bundle: Path) -> None:
    assert not [one for one in logging.getLogger().handlers if type(one) is logging.StreamHandler]


def test_int8_has_a_calibration_of_its_own(int8_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(int8_bundle, tmp_path / "int8"))
    Image.fromarray(digits.load().images.at(np.array([5]))[0]).save("x.png")
    run = ("run", bundle, "x.png", "--budget", "low", "--backend")
    assert "run mexit calibrate" in refused(*run, "ort:int8", code=3)
    done = typed("calibrate", bundle, "--backend", "ort:int8", "--attack", "none", "--json")
    entry = json.loads(done.stdout)["entry"]
    assert (entry["engine"], entry["precision"], entry["variant"]) == ("ort", "int8", "int8")
    assert entry["trace"]["file"].startswith("traces/ort-int8-calibration-")
    assert typed(*run, "ort:int8").exit_code == 0
    for other in ("ort", "openvino:int8"):
        assert f"run mexit calibrate --backend {other}" in refused(*run, other, code=3)
    opened = Bundle.open(bundle)
    trace = opened.load_trace(opened.policies().entries[0].trace)
    images = digits.load().batch(trace.index[:50], opened.manifest.input)
    np.testing.assert_array_equal(trace.logits[:, :50], run_all_exits(OrtBackend(opened, precision="int8"), images))


def test_unknown_precisions_and_bundles_are_refused(workspace: Path, int8_bundle: Path) -> None:
    with pytest.raises(UsageError, match="unknown precision 'int4': choose from fp32, int8, fp16"):
        export_bundle(workspace / "runs" / "digits", options=ExportOptions(precision="int4"))
    assert "--precision: for the export of a run" in refused(
        "export", int8_bundle, "--trt", "--precision", "int8", code=2
    )


@pytest.mark.long
def test_the_command_prints_the_report(workspace: Path) -> None:
    run = workspace / "runs" / "digits"
    said = typed(
        "export", run, "--out", "bundles/int8", "--precision", "int8", "--no-calibrate", "--exits", "all"
    ).stdout
    assert "int8 against fp32 on 81 images of the selection split" in said
    assert "mexit calibrate --backend ort:int8" in said
    done = typed(
        "export", run, "--out", "bundles/half", "--precision", "fp16", "--no-calibrate", "--exits", "all", "--json"
    )
    report = json.loads(done.stdout)["parity"]
    assert [one["exit"] for one in report["exits"]] == [1, 2, 3]
    assert all(1e-4 < one["largest_difference"] < 0.2 and one["agreement"] > 0.97 for one in report["exits"])
    assert set(Bundle.open(Path("bundles/half")).manifest.variants) == {"fp32", "fp16"}
