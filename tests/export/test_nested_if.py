"""The single file, run by plain onnxruntime, gives the answers of the engine."""

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
from mexit.core.atomic_io import sha256_bytes, to_json
from mexit.core.bundle import Bundle
from mexit.core.exit_policy import Policy, should_exit
from mexit.core.manifest import FileSpec
from mexit.core.onnx_safety import refuse_external_data
from mexit.errors import BackendError, Damaged, Untrusted, UsageError
from mexit.export.nested_if import MAX_EXITS, MEASURES, OUTPUTS, build_single_file, policy_inputs
from mexit.export.validate import check_single_file, policy_for_exit
from mexit.runtime.backends.ort import OrtBackend
from mexit.runtime.engine import answer
from mexit.runtime.reference import run_all_exits

TEMPERATURES = (1.3, 0.8, 1.1)


@pytest.fixture(scope="module")
def backend(digits_bundle) -> OrtBackend:
    return OrtBackend(Bundle.open(digits_bundle))


@pytest.fixture(scope="module")
def graph(digits_bundle) -> bytes:
    return build_single_file([onnx.load_from_string(Bundle.open(digits_bundle).segment("fp32", k)) for k in (1, 2, 3)])


@pytest.fixture(scope="module")
def session(graph) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def images(test_digits) -> np.ndarray:
    return (test_digits[0][:, None] / np.float32(255)).astype(np.float32)


def run(session, image: np.ndarray, policy: Policy) -> dict[str, np.ndarray]:
    outputs = session.run(None, {"input": image, **policy_inputs(policy)})
    return dict(zip(OUTPUTS, outputs, strict=True))


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("ensemble", [False, True], ids=["own", "ensemble"])
def test_every_test_image_exits_where_it_does_in_the_engine(session, backend, images, measure, ensemble) -> None:
    scorer = Policy(measure, ensemble, TEMPERATURES, (None, None)).scorer(10)
    logits = run_all_exits(backend, images)
    scores = scorer.score(logits)
    first = float(np.quantile(scores[0], 0.6))
    second = float(np.median(scores[1][scores[0] < first]))
    between_scores = (first + 1e-9, second + 1e-9)  # as calibration places them
    policy = Policy(measure, ensemble, TEMPERATURES, between_scores)
    exits = []
    for row in range(len(images)):
        expected = answer(backend, images[row : row + 1], policy, 10)
        outputs = run(session, images[row : row + 1], policy)
        k = int(outputs["exit"][0])
        exits.append(k)
        assert k == expected.exits[0]
        np.testing.assert_array_equal(outputs["logits"][0], logits[k - 1, row])
        np.testing.assert_allclose(outputs["probabilities"], expected.probabilities, rtol=1e-9, atol=1e-300)
        np.testing.assert_allclose(outputs["score"][0], scores[k - 1, row], rtol=1e-9, atol=1e-12)
    assert set(exits) == {1, 2, 3}


def identity_network(exits: int) -> bytes:
    """The single file of a network whose logits at every exit are its three pixels."""
    segments = []
    for k in range(1, exits + 1):
        carried, last = "input" if k == 1 else f"features_{k - 1}_1", k == exits
        nodes = [onnx.helper.make_node("Reshape", [carried, "shape"], [f"logits_{k}"])]
        nodes += [] if last else [onnx.helper.make_node("Identity", [carried], [f"features_{k}_1"])]
        values = [(f"logits_{k}", ["batch", 3])] if last else [
            (f"features_{k}_1", ["batch", 1, 1, 3]), (f"logits_{k}", ["batch", 3])
        ]  # fmt: skip
        graph = onnx.helper.make_graph(
            nodes,
            "segment",
            [onnx.helper.make_tensor_value_info(carried, 1, ["batch", 1, 1, 3])],
            [onnx.helper.make_tensor_value_info(name, 1, shape) for name, shape in values],
            [onnx.helper.make_tensor("shape", 7, [2], [-1, 3])],
        )
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
        segments.append(model)
    return build_single_file(segments)


@pytest.mark.parametrize("measure", MEASURES)
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
def test_extreme_logits_have_the_scores_of_core_and_nan_never_exits(measure, ensemble, logits) -> None:
    session = onnxruntime.InferenceSession(identity_network(2), providers=["CPUExecutionProvider"])
    image = np.array(logits, np.float32).reshape(1, 1, 1, 3)
    policy = Policy(measure, ensemble, (1.0, 2.0), (-1e300,))
    with np.errstate(all="ignore"):
        scores = policy.scorer(3).score(np.stack([image.reshape(1, 3)] * 2))[:, 0]
        exits = bool(should_exit(scores[:1], -1e300)[0])
    outputs = run(session, image, policy)
    assert outputs["exit"].tolist() == [1 if exits else 2]
    np.testing.assert_allclose(outputs["score"][0], scores[0 if exits else 1], rtol=1e-9, atol=1e-12)
    assert run(session, image, replace(policy, thresholds=(None,)))["exit"].tolist() == [2]


def test_the_largest_number_of_exits_loads_and_one_more_is_refused() -> None:
    deepest = identity_network(MAX_EXITS)
    refuse_external_data(deepest, "deepest")
    session = onnxruntime.InferenceSession(deepest, providers=["CPUExecutionProvider"])
    image = np.array([1, 2, 3], np.float32).reshape(1, 1, 1, 3)
    for k in (1, 7, MAX_EXITS):
        outputs = session.run(None, {"input": image, **policy_inputs(policy_for_exit(k, MAX_EXITS))})
        assert outputs[2].tolist() == [k]
    with pytest.raises(UsageError, match=f"at most {MAX_EXITS} exits, this network has {MAX_EXITS + 1}"):
        identity_network(MAX_EXITS + 1)


def test_a_score_equal_to_its_threshold_exits_as_in_core() -> None:
    session = onnxruntime.InferenceSession(identity_network(2), providers=["CPUExecutionProvider"])
    image = np.zeros((1, 1, 1, 3), np.float32)
    for threshold, k in ((0.0, 1), (1e-300, 2)):
        assert should_exit(np.zeros(1), threshold)[0] == (k == 1)
        assert run(session, image, Policy("margin", False, (1.0, 1.0), (threshold,)))["exit"].tolist() == [k]


def test_a_threshold_of_none_becomes_nan() -> None:
    inputs = policy_inputs(Policy("margin", True, (1.0, 2.0, 3.0), (None, 0.5)))
    np.testing.assert_array_equal(inputs["thresholds"], [np.nan, 0.5])
    assert (inputs["measure"], inputs["ensemble"], inputs["temperatures"].tolist()) == (1, True, [1.0, 2.0, 3.0])


def test_agreement_is_refused() -> None:
    with pytest.raises(
        UsageError, match="cannot score by agreement: calibrate with mexit calibrate --measure and one of max-p"
    ):
        policy_inputs(Policy("agreement", False, (1.0, 1.0), (1.5,)))


def test_a_file_that_differs_from_the_segments_is_refused(session, backend, images) -> None:
    def run_file(inputs):
        return session.run(list(OUTPUTS), inputs)

    logits = run_all_exits(backend, images[:4])
    check_single_file(run_file, "input", images[:4], logits)
    logits[1, 3, 4] += 0.01
    with pytest.raises(BackendError, match="forced to exit 2, answered at exit 2 with logits that differ"):
        check_single_file(run_file, "input", images[:4], logits)


def with_single_file(bundle: Path, content: bytes, as_recorded: bytes | None = None) -> Path:
    """Add a single file to a bundle, recorded with the size and hash of `as_recorded`."""
    (bundle / "segments/fp32/all.onnx").write_bytes(content)
    recorded = as_recorded or content
    manifest = Bundle.open(bundle).manifest
    spec = FileSpec("segments/fp32/all.onnx", sha256_bytes(recorded), len(recorded))
    variants = {**manifest.variants, "fp32": replace(manifest.variants["fp32"], single_file=spec)}
    (bundle / "bundle.json").write_bytes(to_json(replace(manifest, variants=variants).to_json()))
    return bundle


def test_a_bundle_checks_the_hash_of_its_single_file(bundle_copy, graph) -> None:
    opened = Bundle.open(with_single_file(bundle_copy, graph))
    single = opened.manifest.variants["fp32"].single_file
    assert single is not None
    assert opened.content(single.file) == graph
    with pytest.raises(Damaged, match=r"all\.onnx was changed"):
        Bundle.open(with_single_file(bundle_copy, graph[:-1] + b"\x00", as_recorded=graph))


def test_external_data_inside_a_branch_is_refused(bundle_copy, graph) -> None:
    model = onnx.load_from_string(graph)
    branch = next(node for node in model.graph.node if node.op_type == "If").attribute[0].g
    tensor = max(branch.initializer, key=lambda weight: len(weight.raw_data))
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    with pytest.raises(Untrusted, match="external data"):
        Bundle.open(with_single_file(bundle_copy, model.SerializeToString()))


@pytest.mark.slow
def test_export_single_file_by_the_command_and_the_example_of_the_docs(
    workspace, images, tmp_path, monkeypatch
) -> None:
    workspace = Path(shutil.copytree(workspace, tmp_path / "workspace"))  # the newest bundle stays what it was
    monkeypatch.chdir(workspace)
    done = CliRunner().invoke(
        app,
        [
            "export",
            "runs/digits",
            "--out",
            "bundles/whole",
            "--single-file",
            "--no-calibrate",
            "--exits",
            "all",
            "--json",
        ],
    )
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, ["calibrate", "bundles/whole", "--measure", "margin", "--attack", "none", "--json"])
    assert done.exit_code == 0, done.output
    page = (Path(__file__).parents[2] / "docs" / "bundle-format.md").read_text()
    (example,) = [part for part in page.split("```python\n")[1:] if "segments/fp32/all.onnx" in part]
    (workspace / "bundles" / "traffic").symlink_to(workspace / "bundles" / "whole")
    names: dict[str, object] = {"image": images[:1]}
    exec(example.split("```")[0], names)  # the code of the page
    entry = json.loads((workspace / "bundles/whole/policies.json").read_text())["entries"][0]
    assert entry["measure"] == "margin"
    runtime = Runtime.open(workspace / "bundles" / "whole", "low")
    expected = runtime(images[:1])[0]
    assert (int(names["k"][0]), int(names["probabilities"].argmax())) == (expected.exit, expected.index)  # type: ignore[index,attr-defined]


def test_a_single_file_cannot_be_added_to_a_bundle(digits_bundle) -> None:
    done = CliRunner().invoke(app, ["export", str(digits_bundle), "--trt", "--single-file"])
    assert done.exit_code == 2
    assert "--single-file: for the export of a run" in done.output.replace("\n", " ")
