"""The single file answers as the engine does: every test image, every measure it knows, in plain onnxruntime."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from typer.testing import CliRunner

from mexit import Runtime
from mexit.cli import app
from mexit.core import single_file
from mexit.core.atomic_io import sha256_bytes, to_json
from mexit.core.bundle import Bundle
from mexit.core.manifest import FileSpec
from mexit.core.onnx_safety import refuse_external_data
from mexit.core.policy import Policy, should_exit
from mexit.errors import BackendError, Damaged, Untrusted, UsageError
from mexit.export.nested_if import MOST_EXITS
from mexit.export.nested_if import single_file as nest
from mexit.flows import single_file as flow
from mexit.runtime.backends.ort import OrtBackend
from mexit.runtime.engine import answer
from mexit.runtime.reference import run_all_exits

TEMPERATURES = (1.3, 0.8, 1.1)


@pytest.fixture(scope="module")
def backend(digits_bundle) -> OrtBackend:
    return OrtBackend(Bundle.open(digits_bundle))


@pytest.fixture(scope="module")
def graph(digits_bundle) -> bytes:
    return nest([onnx.load_from_string(Bundle.open(digits_bundle).segment("fp32", k)) for k in (1, 2, 3)])


@pytest.fixture(scope="module")
def session(graph) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def images(test_digits) -> np.ndarray:
    return (test_digits[0][:, None] / np.float32(255)).astype(np.float32)


def ask(session, image: np.ndarray, policy: Policy) -> dict[str, np.ndarray]:
    found = session.run(None, {"input": image, **single_file.feeds(policy)})
    return dict(zip(single_file.OUTPUTS, found, strict=True))


@pytest.mark.parametrize("measure", single_file.MEASURES)
@pytest.mark.parametrize("ensemble", [False, True], ids=["own", "ensemble"])
def test_every_test_image_leaves_where_the_engine_lets_it(session, backend, images, measure, ensemble) -> None:
    scorer = Policy(measure, ensemble, TEMPERATURES, (None, None)).scorer(10)
    logits = run_all_exits(backend, images)
    scores = scorer.score(logits)
    first = float(np.quantile(scores[0], 0.6))
    second = float(np.median(scores[1][scores[0] < first]))
    policy = Policy(
        measure, ensemble, TEMPERATURES, (first + 1e-9, second + 1e-9)
    )  # between scores, as stored ones
    exits = []
    for row in range(len(images)):
        expected = answer(backend, images[row : row + 1], policy, 10)
        found = ask(session, images[row : row + 1], policy)
        k = int(found["exit"][0])
        exits.append(k)
        assert k == expected.exits[0]
        np.testing.assert_array_equal(found["logits"][0], logits[k - 1, row])
        np.testing.assert_allclose(found["probabilities"], expected.probabilities, rtol=1e-9, atol=1e-300)
        np.testing.assert_allclose(found["score"][0], scores[k - 1, row], rtol=1e-9, atol=1e-12)
    assert set(exits) == {1, 2, 3}


def one_linear_layer(exits: int) -> bytes:
    """A network whose logits at every exit are its three pixels."""
    segments = []
    for k in range(1, exits + 1):
        taken, last = "input" if k == 1 else f"features_{k - 1}_1", k == exits
        nodes = [onnx.helper.make_node("Reshape", [taken, "shape"], [f"logits_{k}"])]
        nodes += [] if last else [onnx.helper.make_node("Identity", [taken], [f"features_{k}_1"])]
        values = [(f"logits_{k}", ["batch", 3])] if last else [
            (f"features_{k}_1", ["batch", 1, 1, 3]), (f"logits_{k}", ["batch", 3])
        ]  # fmt: skip
        made = onnx.helper.make_graph(
            nodes,
            "segment",
            [onnx.helper.make_tensor_value_info(taken, 1, ["batch", 1, 1, 3])],
            [onnx.helper.make_tensor_value_info(name, 1, shape) for name, shape in values],
            [onnx.helper.make_tensor("shape", 7, [2], [-1, 3])],
        )
        model = onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
        segments.append(model)
    return nest(segments)


@pytest.mark.parametrize("measure", single_file.MEASURES)
@pytest.mark.parametrize("ensemble", [False, True], ids=["own", "ensemble"])
@pytest.mark.parametrize(
    "logits",
    [
        [1, 2, 3],
        [0, 0, 0],
        [300, 1, 2],
        [-1e30, 5, 1e30],
        [np.nan, 1, 2],
        [1, 2, np.nan],
        [1, np.inf, 2],
        [3e38] * 3,
    ],
    ids=str,
)
def test_extreme_logits_are_scored_as_core_does_and_nan_is_never_sure(measure, ensemble, logits) -> None:
    session = onnxruntime.InferenceSession(one_linear_layer(2), providers=["CPUExecutionProvider"])
    image = np.array(logits, np.float32).reshape(1, 1, 1, 3)
    policy = Policy(measure, ensemble, (1.0, 2.0), (-1e300,))
    with np.errstate(all="ignore"):
        scores = policy.scorer(3).score(np.stack([image.reshape(1, 3)] * 2))[:, 0]
        leaves = bool(should_exit(scores[:1], -1e300)[0])
    found = ask(session, image, policy)
    assert found["exit"].tolist() == [1 if leaves else 2]
    np.testing.assert_allclose(found["score"][0], scores[0 if leaves else 1], rtol=1e-9, atol=1e-12)
    assert ask(session, image, replace(policy, thresholds=(None,)))["exit"].tolist() == [2]


def test_as_many_exits_as_promised_load_and_one_more_is_refused() -> None:
    deepest = one_linear_layer(MOST_EXITS)
    refuse_external_data(deepest, "deepest")
    session = onnxruntime.InferenceSession(deepest, providers=["CPUExecutionProvider"])
    image = np.array([1, 2, 3], np.float32).reshape(1, 1, 1, 3)
    for k in (1, 7, MOST_EXITS):
        found = session.run(None, {"input": image, **flow.leaving_at(k, MOST_EXITS)})
        assert found[2].tolist() == [k]
    with pytest.raises(UsageError, match=f"at most {MOST_EXITS} exits, this network has {MOST_EXITS + 1}"):
        one_linear_layer(MOST_EXITS + 1)


def test_a_score_at_its_threshold_leaves_as_in_core() -> None:
    session = onnxruntime.InferenceSession(one_linear_layer(2), providers=["CPUExecutionProvider"])
    image = np.zeros((1, 1, 1, 3), np.float32)
    for threshold, k in ((0.0, 1), (1e-300, 2)):
        assert should_exit(np.zeros(1), threshold)[0] == (k == 1)
        assert ask(session, image, Policy("margin", False, (1.0, 1.0), (threshold,)))["exit"].tolist() == [k]


def test_never_leave_is_nan_and_no_number() -> None:
    given = single_file.feeds(Policy("margin", True, (1.0, 2.0, 3.0), (None, 0.5)))
    np.testing.assert_array_equal(given["thresholds"], [np.nan, 0.5])
    assert (given["measure"], given["ensemble"], given["temperatures"].tolist()) == (1, True, [1.0, 2.0, 3.0])


def test_agreement_is_refused_with_what_to_type() -> None:
    with pytest.raises(UsageError, match="cannot score by agreement: mexit calibrate --measure with one of max-p"):
        single_file.feeds(Policy("agreement", False, (1.0, 1.0), (1.5,)))


def test_a_file_that_says_something_else_than_the_segments_is_refused(graph, backend, images) -> None:
    logits = run_all_exits(backend, images[:4])
    flow.check(graph, images[:4], logits)
    logits[1, 3, 4] += 0.01
    with pytest.raises(BackendError, match="told to leave at exit 2, left at 2 with logits that differ"):
        flow.check(graph, images[:4], logits)


def with_single_file(bundle: Path, content: bytes, as_recorded: bytes | None = None) -> Path:
    """Add a single file to a bundle, recorded with the size and hash of `as_recorded`."""
    (bundle / "segments/fp32/all.onnx").write_bytes(content)
    recorded = as_recorded or content
    manifest = Bundle.open(bundle).manifest
    spec = FileSpec("segments/fp32/all.onnx", sha256_bytes(recorded), len(recorded))
    variants = {**manifest.variants, "fp32": replace(manifest.variants["fp32"], single_file=spec)}
    (bundle / "bundle.json").write_bytes(to_json(replace(manifest, variants=variants).to_json()))
    return bundle


def test_a_bundle_vouches_for_its_single_file_like_for_any_other(bundle_copy, graph) -> None:
    opened = Bundle.open(with_single_file(bundle_copy, graph))
    single = opened.manifest.variants["fp32"].single_file
    assert single is not None
    assert opened.content(single.file) == graph
    with pytest.raises(Damaged, match=r"all\.onnx was changed"):
        Bundle.open(with_single_file(bundle_copy, graph[:-1] + b"\x00", as_recorded=graph))


def test_a_single_file_with_weights_elsewhere_inside_a_branch_is_refused(bundle_copy, graph) -> None:
    model = onnx.load_from_string(graph)
    branch = next(node for node in model.graph.node if node.op_type == "If").attribute[0].g
    tensor = max(branch.initializer, key=lambda found: len(found.raw_data))
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    with pytest.raises(Untrusted, match="external data"):
        Bundle.open(with_single_file(bundle_copy, model.SerializeToString()))


def test_export_single_file_by_the_command_and_the_example_of_the_docs(
    workspace, images, tmp_path, monkeypatch
) -> None:
    workspace = Path(shutil.copytree(workspace, tmp_path / "workspace"))  # the newest bundle stays what it was
    monkeypatch.chdir(workspace)
    done = CliRunner().invoke(
        app, ["export", "runs/digits", "--out", "bundles/whole", "--single-file", "--no-calibrate", "--json"]
    )
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(
        app, ["calibrate", "bundles/whole", "--measure", "margin", "--attack", "none", "--json"]
    )
    assert done.exit_code == 0, done.output
    page = (Path(__file__).parents[2] / "docs" / "bundle-format.md").read_text()
    (example,) = [part for part in page.split("```python\n")[1:] if "segments/fp32/all.onnx" in part]
    (workspace / "bundles" / "traffic").symlink_to(workspace / "bundles" / "whole")
    names: dict[str, object] = {"image": images[:1]}
    exec(example.split("```")[0], names)  # the page's own words
    entry = json.loads((workspace / "bundles/whole/policies.json").read_text())["entries"][0]
    assert entry["measure"] == "margin"
    runtime = Runtime.open(workspace / "bundles" / "whole", "low")
    expected = runtime(images[:1])[0]
    assert (int(names["k"][0]), int(names["probabilities"].argmax())) == (expected.exit, expected.index)  # type: ignore[index,attr-defined]


def test_a_bundle_gets_no_single_file_afterwards(digits_bundle) -> None:
    done = CliRunner().invoke(app, ["export", str(digits_bundle), "--trt", "--single-file"])
    assert done.exit_code == 2
    assert "--single-file is decided when a run is exported" in done.output.replace("\n", " ")
