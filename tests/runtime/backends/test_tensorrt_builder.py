"""TensorRT engines are built here by `tensorrt_rtx`, which needs no GPU for that. None is run."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import program, refused, typed

from mexit.commands import engines as commands
from mexit.core.atomic_io import sha256_bytes
from mexit.core.bundle import Bundle
from mexit.core.manifest import SegmentSpec, TensorSpec
from mexit.errors import BackendError, MissingExtra, UsageError
from mexit.flows.tensorrt_engines import build_engines, stored_engines
from mexit.runtime.backends import tensorrt_builder
from mexit.runtime.backends.tensorrt_builder import EngineConfig, TensorRT, build
from mexit.runtime.device_cache import cache_folder

pytest.importorskip("tensorrt_rtx")


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEXIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tensorrt() -> TensorRT:
    return tensorrt_builder.load_tensorrt()


def config_for(tensorrt: TensorRT, precision: str) -> EngineConfig:
    return tensorrt_builder.engine_config(tensorrt, precision, "a GPU")


def spec_of(model: bytes) -> SegmentSpec:
    """The tensors of an ONNX file, as a bundle records them."""
    import onnx

    graph = onnx.load_from_string(model).graph
    sides = []
    for side in (graph.input, graph.output):
        tensors = []
        for one in side:
            dims = [-1 if dim.dim_param else dim.dim_value for dim in one.type.tensor_type.shape.dim]
            kind = onnx.helper.tensor_dtype_to_np_dtype(one.type.tensor_type.elem_type).name
            tensors.append(TensorSpec(one.name, tuple(dims), kind))
        sides.append(tuple(tensors))
    return SegmentSpec("odd.onnx", sha256_bytes(model), len(model), *sides)


PARTS = (1, 2, 3, "static")  # of the digits network


def graph_of(operator: str, dtype: str = "FLOAT", domain: str = "") -> bytes:
    """A network of one node, `odd_one`, from (batch, 16) to (batch, 10)."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    kind = getattr(TensorProto, dtype)
    weights = np.ones((16, 10), helper.tensor_dtype_to_np_dtype(kind))
    node = helper.make_node(operator, ["input", "weights"], ["logits"], name="odd_one", domain=domain)
    sides = [
        [helper.make_tensor_value_info(name, kind, ["batch", size])] for name, size in (("input", 16), ("logits", 10))
    ]
    graph = helper.make_graph([node], "odd", *sides, [numpy_helper.from_array(weights, "weights")])
    opsets = [helper.make_opsetid("", 20), *([helper.make_opsetid(domain, 1)] if domain else [])]
    content: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return content


def test_every_segment_of_a_bundle_becomes_an_engine(digits_bundle: Path, tmp_path: Path) -> None:
    before = sorted(path for path in digits_bundle.rglob("*"))
    result = build_engines(digits_bundle)
    assert [(row.variant, row.segment, row.state) for row in result.rows] == [("fp32", k, "built") for k in PARTS]
    bundle = Bundle.open(digits_bundle)
    variant = bundle.manifest.variants["fp32"]
    assert variant.static is not None
    for k, spec, row in zip(PARTS, (*variant.segments, variant.static), result.rows, strict=True):
        plan = row.file.read_bytes()
        record = json.loads((row.file.parent / "engine.json").read_text())
        assert len(plan) == row.bytes > 100_000
        assert record["plan_sha256"] == sha256_bytes(plan)
        assert record["onnx_sha256"] == spec.sha256
        assert (record["model"], record["variant"]) == (bundle.id, "fp32")
        assert record["segment"] == (0 if k == "static" else k)
        assert record["config"] == {
            "builder": "tensorrt_rtx",
            "builder_version": result.builder_version,
            "targets": ["8.6", "8.9", "12.0"],
            "batches": [1, 8, 64],
            "precision": "fp32",
        }
        assert row.targets == ("8.6", "8.9", "12.0"), "Turing has no float32 matrix product in TensorRT for RTX"
    assert sorted(path for path in digits_bundle.rglob("*")) == before, "engines are never written into the bundle"


def test_only_their_owner_can_read_the_engines_and_the_key(digits_bundle: Path, tmp_path: Path) -> None:
    build_engines(digits_bundle)
    modes = [cache_folder(Bundle.open(digits_bundle).id), tmp_path / "cache" / "device.key"]
    assert [stat.S_IMODE(path.stat().st_mode) for path in modes] == [0o700, 0o600]
    assert len(modes[1].read_bytes()) == 32


def test_the_second_call_takes_the_cache_and_replace_builds_anew(digits_bundle: Path) -> None:
    first = build_engines(digits_bundle)
    times = [row.file.stat().st_mtime_ns for row in first.rows]
    again = build_engines(digits_bundle)
    assert [row.state for row in again.rows] == ["cached"] * len(PARTS)
    assert [row.file.stat().st_mtime_ns for row in again.rows] == times
    assert [row.seconds for row in again.rows] == [row.seconds for row in first.rows]
    anew = build_engines(digits_bundle, replace=True)
    assert [row.state for row in anew.rows] == ["built"] * len(PARTS)
    assert all(row.file.stat().st_mtime_ns > then for row, then in zip(anew.rows, times, strict=True))


def test_a_segment_with_two_inputs(tensorrt: TensorRT) -> None:
    from mexit.export import onnx_export, segments
    from mexit.models import model_spec

    cut = segments.cut_segments(model_spec("msdnet-cifar10").build(10))[2]
    exported = onnx_export.export_segment(cut)
    assert len(exported.inputs) == 2
    spec = SegmentSpec("3.onnx", "", len(exported.content), exported.inputs, exported.outputs)
    plan = build(tensorrt, exported.content, spec, config_for(tensorrt, "fp32"))
    assert len(plan) > 500_000


def test_the_other_variants_that_export_makes(tensorrt: TensorRT) -> None:
    import numpy as np

    from mexit.export import fp16, int8, onnx_export, segments
    from mexit.models import model_spec

    full = onnx_export.export_segment(segments.cut_segments(model_spec("digits-cnn").build(10))[0])
    images = np.random.default_rng(0).random((8, 1, 8, 8), np.float32)
    for name, made in (("fp16", fp16.convert_fp16(full)), ("int8", int8.quantize_int8(full, [images]))):
        spec = SegmentSpec("1.onnx", "", len(made.content), made.inputs, made.outputs)
        assert {one.dtype for one in (*spec.inputs, *spec.outputs)} == {"float32"}
        assert build(tensorrt, made.content, spec, config_for(tensorrt, name))


def test_half_precision_runs_on_turing_too(tensorrt: TensorRT) -> None:
    fp16 = graph_of("MatMul", "FLOAT16")
    config = config_for(tensorrt, "fp16")
    assert config.targets == ("7.5", "8.6", "8.9", "12.0")
    assert build(tensorrt, fp16, spec_of(fp16), config)


def test_the_precision_is_that_of_the_graph(tensorrt: TensorRT) -> None:
    fp16, full = graph_of("MatMul", "FLOAT16"), graph_of("MatMul")
    with pytest.raises(BackendError, match=r"has input float16 \(-1, 16\), the bundle says input float32"):
        build(tensorrt, fp16, spec_of(full), config_for(tensorrt, "fp32"))


def test_tensors_are_compared_with_the_bundle(tensorrt: TensorRT) -> None:
    full = graph_of("MatMul")
    spec = spec_of(full)
    wide = replace(spec, outputs=(TensorSpec("logits", (-1, 11), "float32"),))
    with pytest.raises(BackendError, match=r"has logits float32 \(-1, 10\), the bundle says logits .* \(-1, 11\)"):
        build(tensorrt, full, wide, config_for(tensorrt, "fp32"))
    with pytest.raises(BackendError, match="as TensorRT reads it, has nothing, the bundle says input"):
        build(tensorrt, b"hello" * 100, spec, config_for(tensorrt, "fp32"))


@pytest.mark.parametrize("domain", ["", "com.example"])
def test_an_operator_that_tensorrt_lacks_is_named_with_its_node(tensorrt: TensorRT, domain: str) -> None:
    odd = graph_of("Unheard", domain=domain)
    with pytest.raises(BackendError, match=r"TensorRT cannot read odd\.onnx: node 'odd_one' \(Unheard\): "):
        build(tensorrt, odd, spec_of(odd), config_for(tensorrt, "fp32"))


def test_the_reason_is_given_for_a_graph_that_cannot_be_built(tensorrt: TensorRT) -> None:
    full = graph_of("MatMul")
    turing = replace(config_for(tensorrt, "fp32"), targets=("7.5",))
    with pytest.raises(BackendError, match=r"tensorrt_rtx cannot build odd\.onnx: .*FP32 .*not supported"):
        build(tensorrt, full, spec_of(full), turing)
    build(tensorrt, full, spec_of(full), config_for(tensorrt, "fp32"))
    last = tensorrt_builder.logger(tensorrt.module).last_error
    assert last == "it gives no reason", "the error of the earlier build is forgotten"


def test_float32_is_not_tf32_and_rows_are_independent(tensorrt: TensorRT) -> None:
    """Read back from TensorRT's settings, because a plan cannot be opened without a GPU."""
    module, content = tensorrt.module, graph_of("MatMul")
    builder = RecordingBuilder(module.Builder(tensorrt_builder.logger(module)))
    assert builder.create_builder_config().get_flag(module.BuilderFlag.TF32), "TensorRT's default"
    network = tensorrt_builder.parse_network(tensorrt, builder, content, spec_of(content))
    config = tensorrt_builder.build_settings(tensorrt, builder, network, config_for(tensorrt, "fp16"))
    assert not config.get_flag(module.BuilderFlag.TF32)
    assert config.get_flag(module.BuilderFlag.DISTRIBUTIVE_INDEPENDENCE)
    assert network.get_flag(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    targets = [config.get_compute_capability(i) for i in range(config.num_compute_capabilities)]
    assert [target.name for target in targets] == ["SM75", "SM86", "SM89", "SM120"]
    assert [tuple(shape) for shape in builder.profile.get_shape("input")] == [(1, 16), (8, 16), (64, 16)]
    assert config.num_optimization_profiles == 1


class RecordingBuilder:
    """TensorRT's builder, which also records the optimisation profile that it made."""

    def __init__(self, builder) -> None:
        self._builder = builder

    def create_optimization_profile(self):
        self.profile = self._builder.create_optimization_profile()
        return self.profile

    def __getattr__(self, name):
        return getattr(self._builder, name)


INTERRUPTED = """
import signal, sys, threading, _thread
from mexit.core.bundle import Bundle
from mexit.runtime.backends.tensorrt_builder import build, engine_config, load_tensorrt

signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background the signal may be ignored
bundle, tensorrt = Bundle.open(sys.argv[1]), load_tensorrt()
rest = bundle.segment("fp32", 1), bundle.manifest.variants["fp32"].segments[0], engine_config(tensorrt, "fp32", "")
build(tensorrt, *rest)
threading.Timer(0.02, _thread.interrupt_main).start()
try:
    for _ in range(1000):
        build(tensorrt, *rest)
except KeyboardInterrupt:
    print(f"interrupted; then {len(build(tensorrt, *rest)) > 0}")
"""


def test_ctrl_c_ends_a_build_at_once(digits_bundle: Path) -> None:
    """In a process of its own, which an interrupt in native code might take along."""
    command = [sys.executable, "-c", INTERRUPTED, str(digits_bundle)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "interrupted; then True\n", done.stderr


KILL = """
import os, signal
real, left = os.fsync, [{nth}]
def fsync(handle):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    real(handle)
os.fsync = fsync
"""


@pytest.mark.parametrize("nth", [1, 3, 6, 9])
def test_a_killed_build_leaves_nothing_half_written(digits_bundle: Path, tmp_path: Path, nth: int) -> None:
    done = program("export", digits_bundle, "--trt", before=KILL.format(nth=nth))
    assert done.returncode == -signal.SIGKILL
    assert all(row.state == "ready" for row in stored_engines(Bundle.open(digits_bundle)))
    result = build_engines(digits_bundle)
    assert len(stored_engines(Bundle.open(digits_bundle))) == len(PARTS)
    folders = {path.name for path in result.rows[0].file.parents[1].iterdir()}
    assert folders == {str(part) for part in PARTS}, "the temporary folder of the killed process is gone"


def test_a_variant_that_cannot_be_built_is_left_out_and_named(digits_bundle: Path, tmp_path: Path) -> None:
    bundle = with_variants(digits_bundle, tmp_path / "more", int8=True, fp16=False)
    result = build_engines(bundle.path)
    assert [(row.variant, row.segment) for row in result.rows if row.variant != "fp32"] == [
        ("int8", part) for part in PARTS
    ]
    assert set(result.skipped) == {"fp16"}
    assert "TensorRT cannot read segments/fp16/1.onnx: node 'odd_one' (Unheard)" in result.skipped["fp16"]
    text = typed("export", bundle.path, "--trt").output
    assert "no fp16 engines: TensorRT cannot read" in text


def with_variants(source: Path, path: Path, **can_be_built: bool) -> Bundle:
    """A bundle with further variants: those that can be built are its fp32 segments, the others an odd graph."""
    opened = Bundle.open(source)
    files = {spec.file: opened.content(spec.file) for spec in opened.manifest.files}
    variants = dict(opened.manifest.variants)
    for name, good in can_be_built.items():
        specs = []
        for k, spec in enumerate(variants["fp32"].segments, start=1):
            content = opened.segment("fp32", k) if good else graph_of("Unheard")
            file = f"segments/{name}/{k}.onnx"
            files[file] = content
            specs.append(replace(spec, file=file, sha256=sha256_bytes(content), bytes=len(content)))
        variants[name] = replace(variants["fp32"], segments=tuple(specs))
    bundle = Bundle.from_parts(path, replace(opened.manifest, variants=variants), files)
    bundle.write()
    return Bundle.open(path)


def test_the_command_names_the_supported_gpus_and_says_that_no_engine_was_run(digits_bundle: Path) -> None:
    text = " ".join(typed("export", digits_bundle, "--trt").output.split())
    assert "built, not run" in text
    assert "compute capability 8.6 (GeForce RTX 30), 8.9 (GeForce RTX 40), 12.0 (GeForce RTX 50)" in text
    assert "not for 7.5 (GeForce RTX 20)" in text
    printed = json.loads(typed("export", digits_bundle, "--trt", "--json").stdout)
    assert set(printed) == {"bundle", "model", "engines"}
    assert printed["engines"]["run_here"] is False
    assert [row["state"] for row in printed["engines"]["rows"]] == ["cached"] * len(PARTS)


def test_inspect_lists_them(digits_bundle: Path) -> None:
    assert json.loads(typed("inspect", digits_bundle, "--json").stdout)["engines"] == []
    assert "TensorRT" not in typed("inspect", digits_bundle).stdout.replace("trt", "")
    build_engines(digits_bundle)
    rows = json.loads(typed("inspect", digits_bundle, "--json").stdout)["engines"]
    assert [row["state"] for row in rows] == ["ready"] * len(PARTS)
    Path(rows[0]["file"]).write_bytes(b"")
    rows = json.loads(typed("inspect", digits_bundle, "--json").stdout)["engines"]
    assert rows[0]["file"] in rows[0]["state"]
    assert "ready" in typed("inspect", digits_bundle).stdout


def test_trust_is_about_engines(digits_bundle: Path) -> None:
    assert "add --trt" in refused("export", digits_bundle, "--trust-engines", code=UsageError.exit_code)


def test_the_exported_bundle_is_printed_even_if_no_engines_can_be_built(
    digits_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in tensorrt_builder.PACKAGES:
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=r"the ONNX bundle .* is complete"):
        commands.build(digits_bundle, replace=False, trust_engines=False, json=True, fields={"bundle": "b"})
    assert json.loads(capsys.readouterr().out) == {"bundle": "b"}


@pytest.mark.skipif(os.path.exists("/proc/driver/nvidia"), reason="there is a GPU here")
def test_without_a_gpu_the_engine_says_so(digits_bundle: Path) -> None:
    text = refused("run", digits_bundle, "x.png", "--backend", "trt", code=BackendError.exit_code)
    assert "no NVIDIA GPU can be used here" in text
    assert "--backend ort" in text
    assert "cuda" in sys.modules, "the error comes from CUDA"
