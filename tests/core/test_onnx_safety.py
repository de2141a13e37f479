"""ONNX files with external data are refused, whichever message of the format holds the tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mexit.core.atomic_io import sha256_bytes
from mexit.core.bundle import Bundle
from mexit.core.onnx_safety import refuse_external_data
from mexit.errors import Damaged, Untrusted

FLOATS = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])


def stored_tensor() -> TensorProto:
    return numpy_helper.from_array(np.asarray([1.0, 2.0], np.float32), "w")


def external_tensor() -> TensorProto:
    """A tensor whose data lies in /etc/passwd."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../../../etc/passwd")
    return tensor


def constant(tensor: TensorProto) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["y"], value=tensor)


def in_graph(tensor: TensorProto) -> onnx.GraphProto:
    return helper.make_graph([helper.make_node("Identity", ["w"], ["y"])], "g", [], [FLOATS], [tensor])


def model(graph: onnx.GraphProto) -> onnx.ModelProto:
    return helper.make_model(graph)


def in_if(tensor: TensorProto, depth: int) -> onnx.GraphProto:
    graph = in_graph(tensor)
    for _ in range(depth):
        node = helper.make_node("If", ["c"], ["y"], then_branch=graph, else_branch=in_graph(stored_tensor()))
        graph = helper.make_graph([node], "g", [], [FLOATS])
    return graph


def in_sparse(field: str) -> Callable[[TensorProto], onnx.ModelProto]:
    def build(tensor: TensorProto) -> onnx.ModelProto:
        built = model(in_graph(stored_tensor()))
        sparse = built.graph.sparse_initializer.add(dims=[10])
        sparse.values.CopyFrom(stored_tensor())
        sparse.indices.CopyFrom(numpy_helper.from_array(np.asarray([1, 3], np.int64), "i"))
        getattr(sparse, field).CopyFrom(tensor)
        return built

    return build


def in_attribute(field: str) -> Callable[[TensorProto], onnx.ModelProto]:
    def build(tensor: TensorProto) -> onnx.ModelProto:
        attribute = onnx.AttributeProto(name="a")
        if field == "tensors":
            attribute.tensors.append(tensor)
        elif field == "graphs":
            attribute.graphs.append(in_graph(tensor))
        elif field == "sparse_tensor":
            attribute.sparse_tensor.values.CopyFrom(tensor)
        else:
            attribute.sparse_tensors.add().values.CopyFrom(tensor)
        node = helper.make_node("Any", [], ["y"])
        node.attribute.append(attribute)
        return model(helper.make_graph([node], "g", [], [FLOATS]))

    return build


def in_function(tensor: TensorProto) -> onnx.ModelProto:
    built = model(in_graph(stored_tensor()))
    built.functions.append(helper.make_function("own", "f", [], ["y"], [constant(tensor)], []))
    return built


def in_function_default(tensor: TensorProto) -> onnx.ModelProto:
    built = model(in_graph(stored_tensor()))
    function = helper.make_function("own", "f", [], ["y"], [constant(stored_tensor())], [])
    function.attribute_proto.append(helper.make_attribute("a", tensor))
    built.functions.append(function)
    return built


def in_training(tensor: TensorProto) -> onnx.ModelProto:
    built = model(in_graph(stored_tensor()))
    built.training_info.add().algorithm.CopyFrom(in_graph(tensor))
    return built


MODELS: dict[str, Callable[[TensorProto], onnx.ModelProto]] = {
    "initializer": lambda tensor: model(in_graph(tensor)),
    "constant": lambda tensor: model(helper.make_graph([constant(tensor)], "g", [], [FLOATS])),
    "if branch": lambda tensor: model(in_if(tensor, 1)),
    "if in if in if": lambda tensor: model(in_if(tensor, 3)),
    "sparse values": in_sparse("values"),
    "sparse indices": in_sparse("indices"),
    "list of tensors": in_attribute("tensors"),
    "list of graphs": in_attribute("graphs"),
    "sparse attribute": in_attribute("sparse_tensor"),
    "list of sparse": in_attribute("sparse_tensors"),
    "function": in_function,
    "function default": in_function_default,
    "training graph": in_training,
}
each_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())


@each_model
def test_external_data_is_refused_in_every_message(
    build: Callable[[TensorProto], onnx.ModelProto],
) -> None:
    with pytest.raises(Untrusted, match=r"x.onnx keeps weights in another file \(ONNX external data\)"):
        refuse_external_data(build(external_tensor()).SerializeToString(), "x.onnx")


@each_model
def test_the_same_model_with_stored_weights_is_accepted(build: Callable[[TensorProto], onnx.ModelProto]) -> None:
    refuse_external_data(build(stored_tensor()).SerializeToString(), "x.onnx")


@pytest.mark.parametrize("half", ["data_location", "external_data"])
def test_either_field_alone_is_enough(half: str) -> None:
    tensor = external_tensor()
    tensor.ClearField("external_data" if half == "data_location" else "data_location")
    with pytest.raises(Untrusted):
        refuse_external_data(MODELS["initializer"](tensor).SerializeToString(), "x.onnx")


def test_the_default_data_location_is_accepted() -> None:
    tensor = stored_tensor()
    tensor.data_location = TensorProto.DEFAULT
    refuse_external_data(MODELS["initializer"](tensor).SerializeToString(), "x.onnx")


def test_a_field_number_hidden_in_high_bits_is_refused() -> None:
    """Parsers keep 32 bits of a key, so 2**32 + (14 << 3) would mean `data_location` to them."""
    hidden = bytes([0x80 | 14 << 3, 0x80, 0x80, 0x80, 0x10, 1])
    tensor = stored_tensor().SerializeToString() + hidden
    graph = b"\x2a" + bytes([len(tensor)]) + tensor
    with pytest.raises(Damaged, match="is not an ONNX file"):
        refuse_external_data(b"\x3a" + bytes([len(graph)]) + graph, "x.onnx")


@pytest.mark.parametrize(
    "content",
    [b"\xff" * 30, b"not onnx at all", b"\x3a\xff\xff\xff\xff\x0f", b"\x3a\x05ab", b"\x3b\x00", b"\x08"],
    ids=["endless number", "text", "huge length", "cut short", "group", "number cut short"],
)
def test_other_bytes_are_damaged(content: bytes) -> None:
    with pytest.raises(Damaged, match=r"x\.onnx is (not an ONNX file|cut short)"):
        refuse_external_data(content, "x.onnx")


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(Damaged, match="nested deeper than 64"):
        refuse_external_data(model(in_if(stored_tensor(), 30)).SerializeToString(), "x.onnx")


@pytest.mark.parametrize("name", ["segments/fp32/1.onnx", "segments/fp32/1.bin", "1"])
def test_a_bundle_with_external_data_does_not_open_whatever_the_file_is_called(bundle_copy: Path, name: str) -> None:
    content = MODELS["if branch"](external_tensor()).SerializeToString()
    (bundle_copy / name).write_bytes(content)
    manifest = json.loads((bundle_copy / "bundle.json").read_bytes())
    spec = {"file": name, "sha256": sha256_bytes(content), "bytes": len(content)}
    manifest["variants"]["fp32"]["segments"][0].update(spec)
    manifest["splits"]["file"] = spec
    (bundle_copy / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(Untrusted, match="export it in one file"):
        Bundle.open(bundle_copy)
