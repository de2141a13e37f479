"""The model repository of Triton: its files, and what it refuses to replace."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import onnx
import pytest
from command_line import refused, typed
from triton_stub import read_config

from mexit import Bundle, NotCalibrated, UsageError
from mexit.core.policies_file import Policies
from mexit.export.triton_repository import MODEL_SOURCE, write_repository

GOLDEN = Path(__file__).parents[1] / "golden" / "0.1.0" / "bundles" / "demo"


def written(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_command_writes_every_model(tmp_path) -> None:
    result = typed("export", GOLDEN, "--triton", "models", "--json")
    assert result.exit_code == 0, result.output
    bundle = Bundle.open(GOLDEN)
    segments = [f"demo-exit{k}" for k in (1, 2, 3)]
    assert json.loads(result.stdout) == {
        "bundle": str(GOLDEN), "model": bundle.id, "triton": {"folder": "models", "models": ["demo", *segments]},
    }  # fmt: skip
    onnx_files = {f"{one}/{file}" for one in segments for file in ("config.pbtxt", "1/model.onnx")}
    python_files = {f"demo/{file}" for file in ("config.pbtxt", "labels.txt", "1/model.py", "1/policy.json")}
    assert written(tmp_path / "models") == onnx_files | python_files
    assert (tmp_path / "models/demo-exit2/1/model.onnx").read_bytes() == bundle.segment("fp32", 2)
    assert (tmp_path / "models/demo/labels.txt").read_text().split() == list(bundle.manifest.classes)


@pytest.mark.slow
def test_configurations_have_the_tensors_of_the_graphs(digits_bundle, tmp_path) -> None:
    models = write_repository(Bundle.open(digits_bundle), tmp_path / "models")
    assert models == ("digits", "digits-exit1", "digits-exit2", "digits-exit3", "digits-static")
    for model in models[1:]:
        config = read_config(tmp_path / "models" / model)
        graph = onnx.load(tmp_path / "models" / model / "1" / "model.onnx").graph
        assert (config.name, config.backend, config.max_batch_size) == (model, "onnxruntime", 64)
        assert config.HasField("dynamic_batching")
        for specs, values in ((config.input, graph.input), (config.output, graph.output)):
            sizes = [[dim.dim_value or -1 for dim in value.type.tensor_type.shape.dim[1:]] for value in values]
            assert [one.name for one in specs] == [value.name for value in values]
            assert [list(one.dims) for one in specs] == sizes
    config = read_config(tmp_path / "models" / "digits")
    assert config.backend == "python"
    assert {one.name: list(one.dims) for one in config.output}["probabilities"] == [10]
    assert config.parameters["budget"].string_value == "low"


def test_the_python_model_imports_numpy_and_triton_alone() -> None:
    tree = ast.parse(MODEL_SOURCE.read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    others = {name.partition(".")[0] for name in modules} - set(sys.stdlib_module_names)
    assert others == {"numpy", "triton_python_backend_utils"}


def test_an_existing_repository_is_replaced_only_on_request(tmp_path) -> None:
    assert typed("export", GOLDEN, "--triton", "models").exit_code == 0
    (tmp_path / "models/demo/old").write_text("of an earlier version")
    assert "add --replace" in refused("export", GOLDEN, "--triton", "models", code=2)
    assert typed("export", GOLDEN, "--triton", "models", "--replace").exit_code == 0
    assert not (tmp_path / "models/demo/old").exists()
    assert [path.name for path in tmp_path.glob(".*")] == []


@pytest.mark.parametrize("entry", ["resnet/1/model.onnx", "resnet/config.pbtxt", "notes.txt"])
def test_other_files_are_never_replaced(tmp_path, entry) -> None:
    (tmp_path / "models" / entry).parent.mkdir(parents=True)
    (tmp_path / "models" / entry).write_text("name: 'resnet'")
    message = refused("export", GOLDEN, "--triton", "models", "--replace", code=2)
    assert "holds other files" in message
    assert written(tmp_path / "models") == {entry}


def test_an_empty_directory_is_used_and_a_file_is_refused(tmp_path) -> None:
    (tmp_path / "models").mkdir()
    assert typed("export", GOLDEN, "--triton", "models").exit_code == 0
    (tmp_path / "file").write_text("")
    assert "is a file" in refused("export", GOLDEN, "--triton", "file", "--replace", code=2)


@pytest.mark.slow
def test_without_thresholds_nothing_is_written(bundle_copy, tmp_path) -> None:
    bundle = Bundle.open(bundle_copy)
    bundle.save_policies(Policies(bundle.id, ()))
    with pytest.raises(NotCalibrated, match="mexit calibrate --backend ort"):
        write_repository(bundle, tmp_path / "models")
    assert not (tmp_path / "models").exists()


@pytest.mark.long
def test_a_run_is_exported_with_its_repository(workspace, tmp_path) -> None:
    run = workspace / "runs" / "digits"
    result = typed("export", run, "--out", "bundles/new", "--exits", "2", "--triton", "models", "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["triton"]["models"] == ["new", "new-exit2", "new-exit3", "new-static"]
    assert printed["differences"]
    policy = json.loads((tmp_path / "models/new/1/policy.json").read_text())
    assert policy["exits"] == [2, 3]
    assert policy["model"] == Bundle.open(Path("bundles/new")).id


def test_the_target_is_checked_before_any_work(tmp_path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "notes.txt").write_text("")
    assert "holds other files" in refused("export", "no-such-run", "--triton", "models", code=2)
    assert "--no-calibrate" in refused("export", "no-such-run", "--no-calibrate", "--triton", "new", code=2)
    with pytest.raises(UsageError, match="holds other files"):
        write_repository(Bundle.open(GOLDEN), tmp_path / "models")
