"""The trust rule: an engine is opened only if this device signed it, unchanged, or if the user trusts it."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from command_line import refused, typed
from failing_disk import fail_each_call

from mexit.core.atomic_io import sha256_bytes, to_json
from mexit.core.bundle import Bundle
from mexit.errors import ArtifactError, Damaged, MexitError, NotFound, Untrusted
from mexit.flows.tensorrt_engines import build_engines, stored_engines
from mexit.runtime.backends.engine_slot import EngineSlot, cache_slot
from mexit.runtime.backends.tensorrt_builder import (
    Engine,
    EngineConfig,
    TensorRT,
    engine_config,
    load,
    load_tensorrt,
    provide,
)
from mexit.runtime.device_cache import device_key

pytest.importorskip("tensorrt_rtx")
PACKAGE = "tensorrt_rtx"


@pytest.fixture(scope="module")
def built(digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the engines of the session's bundle, built by TensorRT. Read it only."""
    root = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEXIT_CACHE", str(root))
        build_engines(digits_bundle)
    return root


@pytest.fixture
def cache(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which is this device's cache for the test."""
    monkeypatch.setenv("MEXIT_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(built, tmp_path / "cache"))


@pytest.fixture
def bundle(digits_bundle: Path) -> Bundle:
    return Bundle.open(digits_bundle)


@pytest.fixture(scope="module")
def tensorrt() -> TensorRT:
    return load_tensorrt()


@pytest.fixture(scope="module")
def config(tensorrt: TensorRT) -> EngineConfig:
    return engine_config(tensorrt, "fp32", "")


def get(slot: EngineSlot, tensorrt: TensorRT, config: EngineConfig, new_plan: bytes | None = None) -> Engine:
    """The engine of a slot; fails if a build is needed and no plan is given for it."""

    def build_plan(*_: object) -> bytes:
        assert new_plan is not None, "an engine was built although one is stored"
        return new_plan

    return provide(slot, tensorrt, config, build_plan=build_plan)


def test_a_stored_engine_is_returned_unchanged(cache: Path, bundle: Bundle, tensorrt, config) -> None:
    slot = cache_slot(bundle, PACKAGE, "fp32", 2)
    assert get(slot, tensorrt, config).plan == (slot.folder / "engine.plan").read_bytes()


def test_a_plan_with_a_changed_byte_is_not_opened(cache: Path, bundle: Bundle, tensorrt, config) -> None:
    slot = cache_slot(bundle, PACKAGE, "fp32", 1)
    plan = slot.folder / "engine.plan"
    content = plan.read_bytes()
    for at in (0, 1, len(content) // 2, len(content) - 1):
        changed = bytearray(content)
        changed[at] ^= 1
        for wrong in (bytes(changed), content[:at], content + b"\0"):
            plan.write_bytes(wrong)
            with pytest.raises(Damaged) as caught:
                get(slot, tensorrt, config)
    assert str(plan) in str(caught.value)
    assert f"mexit export {bundle.path} --trt --replace" in str(caught.value)


def test_a_record_with_a_changed_bit_is_refused(cache: Path, bundle: Bundle) -> None:
    slot, key = cache_slot(bundle, PACKAGE, "fp32", 1), device_key()
    path, record = slot.folder / "engine.json", load(slot, key)[0]
    content = path.read_bytes()
    refusals = []
    for at in range(len(content)):
        changed = bytearray(content)
        changed[at] ^= 1 << at % 8
        path.write_bytes(changed)
        try:
            assert load(slot, key)[0] == record, "white space has no meaning"
        except (ArtifactError, NotFound) as error:
            refusals.append(str(error))
    assert len(refusals) > 0.6 * len(content)
    assert all(str(path) in refusal for refusal in refusals)


def test_a_forged_engine_needs_the_key(cache: Path, bundle: Bundle, tensorrt, config) -> None:
    """Everything is consistent except the signature, which only this device can make."""
    slot = cache_slot(bundle, PACKAGE, "fp32", 1)
    evil = b"a plan that runs code of an attacker"
    record, _ = load(slot, device_key())
    forged = replace(record, plan_sha256=sha256_bytes(evil), plan_bytes=len(evil))
    (slot.folder / "engine.plan").write_bytes(evil)
    for key in (b"\0" * 32, os.urandom(32)):
        signed = replace(forged, signature=forged.sign(key))
        (slot.folder / "engine.json").write_bytes(to_json(asdict(signed)))
        with pytest.raises(Untrusted, match="was not written by this device"):
            get(slot, tensorrt, config)
    for field, value in (("seconds", 0.0), ("onnx_sha256", "0"), ("signature", ""), ("plan_bytes", 1)):
        stored = json.loads((slot.folder / "engine.json").read_text())
        (slot.folder / "engine.json").write_text(json.dumps({**stored, field: value}))
        with pytest.raises(Untrusted):
            load(slot, device_key())


def test_the_cache_of_another_device_is_refused(cache: Path, digits_bundle: Path) -> None:
    (cache / "device.key").unlink()
    with pytest.raises(Untrusted, match="was not written by this device, so its engine is not opened"):
        build_engines(digits_bundle)
    assert [row.state for row in build_engines(digits_bundle, replace=True).rows] == ["built"] * 4
    assert [row.state for row in build_engines(digits_bundle).rows] == ["cached"] * 4


def test_an_engine_of_another_segment_is_refused(cache: Path, bundle: Bundle, tensorrt, config) -> None:
    first, second = (cache_slot(bundle, PACKAGE, "fp32", k) for k in (1, 2))
    shutil.rmtree(first.folder)
    shutil.copytree(second.folder, first.folder)
    with pytest.raises(Untrusted, match=r"is the engine of segment 2, fp32, .*, expected is .* segment 1, fp32"):
        get(first, tensorrt, config)
    other = cache_slot(replace(bundle, id="0" * 64), PACKAGE, "fp32", 2)
    shutil.copytree(second.folder, other.folder)
    with pytest.raises(Untrusted, match=rf"model {bundle.id[:12]}, expected is .* model 000000000000"):
        get(other, tensorrt, config)


def test_a_damaged_cache_ends_the_command_with_code_5(cache: Path, bundle: Bundle) -> None:
    plan = cache_slot(bundle, PACKAGE, "fp32", 2).folder / "engine.plan"
    plan.write_bytes(b"\0" + plan.read_bytes()[1:])
    message = refused("export", bundle.path, "--trt", code=5)
    assert str(plan) in message
    assert f"mexit export {bundle.path} --trt --replace" in message
    assert str(plan) in stored_engines(bundle)[1].state
    assert typed("export", bundle.path, "--trt", "--replace").exit_code == 0
    assert [row.state for row in stored_engines(bundle)] == ["ready"] * 4


@pytest.mark.parametrize(
    "change",
    [{"builder_version": "0.9"}, {"targets": ("8.6",)}, {"batches": (1, 2, 4)}, {"builder": "tensorrt"}],
    ids=lambda change: next(iter(change)),
)
def test_an_engine_of_another_configuration_is_built_again(
    cache: Path, bundle: Bundle, tensorrt, config, change
) -> None:
    slot = cache_slot(bundle, PACKAGE, "fp32", 1)
    new = replace(config, **change)
    engine = get(slot, tensorrt, new, b"new")
    assert (engine.origin, engine.plan, engine.record.config) == ("built", b"new", new)
    assert get(slot, tensorrt, new).origin == "cached"
    state = stored_engines(bundle)[0].state
    assert state.startswith("stale, to be built anew: ")
    assert f"{next(iter(change))} was" in state


def test_an_engine_of_an_older_format_is_built_again(cache: Path, bundle: Bundle, tensorrt, config) -> None:
    slot = cache_slot(bundle, PACKAGE, "fp32", 1)
    path = slot.folder / "engine.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 1}))
    assert get(slot, tensorrt, config, b"new").origin == "built"
    assert get(slot, tensorrt, config).plan == b"new"


def test_an_engine_of_other_onnx_bytes_is_stale(cache: Path, bundle: Bundle, config) -> None:
    slot = cache_slot(bundle, PACKAGE, "fp32", 1)
    record, _ = load(slot, device_key())
    assert record.staleness(config, "0" * 64) == "built from another segment"
    assert not record.staleness(config, slot.spec.sha256)


@pytest.mark.parametrize("file", ["engine.plan", "engine.json"])
def test_an_engine_with_a_missing_file_is_built_again(cache: Path, bundle: Bundle, tensorrt, config, file) -> None:
    slot = cache_slot(bundle, PACKAGE, "fp32", 1)
    (slot.folder / file).unlink()
    assert get(slot, tensorrt, config, b"new").origin == "built"
    assert get(slot, tensorrt, config).plan == b"new"


def test_a_full_disk_leaves_the_old_engine_or_the_new_one(
    cache: Path, bundle: Bundle, tensorrt, config, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = cache_slot(bundle, PACKAGE, "fp32", 1)
    old = (slot.folder / "engine.plan").read_bytes()
    numbers = iter(range(1000))
    new: list[bytes] = []

    def write() -> None:
        new.append(f"new {next(numbers)}".encode())
        provide(slot, tensorrt, config, rebuild=True, build_plan=lambda *_: new[-1])

    def check(written: bool) -> None:
        _, plan = load(slot, device_key())
        assert plan in (old, *new)
        assert not written or plan == new[-1]

    assert fail_each_call(monkeypatch, write, check) > 5


def chmod(path: Path) -> None:
    path.chmod(0o640)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:31])


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


@pytest.mark.parametrize("spoil", [chmod, shorten, link])
def test_a_key_that_others_can_read_is_refused(cache: Path, bundle: Bundle, spoil: Callable[[Path], None]) -> None:
    spoil(cache / "device.key")
    message = refused("export", bundle.path, "--trt", code=5)
    assert f"{cache / 'device.key'} must be a file of 32 bytes that its owner alone can read" in message
    assert "remove it" in message


def test_concurrent_first_calls_return_the_same_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEXIT_CACHE", str(tmp_path / "new"))
    keys: list[bytes] = []
    start = threading.Barrier(8)

    def read_key() -> None:
        start.wait()
        keys.append(device_key())

    threads = [threading.Thread(target=read_key) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(keys)) == 1
    assert len(keys) == 8
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["device.key"]


def test_a_cache_that_cannot_be_made_is_an_error(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("file").write_text("")
    monkeypatch.setenv("MEXIT_CACHE", "file/cache")
    with pytest.raises(MexitError, match="set MEXIT_CACHE to a folder that can be written"):
        build_engines(bundle.path)


@pytest.fixture
def shipped(built: Path, bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle with engines of another device, on a device without any."""
    monkeypatch.setenv("MEXIT_CACHE", str(tmp_path / "own"))
    engines = next(built.glob("*/*/engines"))
    shutil.copytree(engines, bundle_copy / "engines")
    return bundle_copy


def test_engines_that_came_with_a_bundle_are_not_used_unless_trusted(shipped: Path) -> None:
    result = build_engines(shipped)
    assert [row.state for row in result.rows] == ["built"] * 4
    assert "--trust-engines uses them" in typed("export", shipped, "--trt").stderr


def test_trusted_engines_are_signed_by_this_device(shipped: Path) -> None:
    result = build_engines(shipped, trust_engines=True)
    assert [row.state for row in result.rows] == ["adopted"] * 4
    plans = [row.file.read_bytes() for row in result.rows]
    shutil.rmtree(shipped / "engines")
    again = build_engines(shipped)
    assert [row.state for row in again.rows] == ["cached"] * 4
    assert [row.file.read_bytes() for row in again.rows] == plans


def test_a_trusted_engine_must_match_its_record(shipped: Path) -> None:
    folder = shipped / "engines" / PACKAGE / "fp32"
    plan = folder / "1" / "engine.plan"
    plan.write_bytes(b"\0" + plan.read_bytes()[1:])
    with pytest.raises(Damaged, match=f"{plan} was changed"):
        build_engines(shipped, trust_engines=True)
    shutil.rmtree(folder / "1")
    shutil.copytree(folder / "2", folder / "1")
    with pytest.raises(Untrusted, match="is the engine of segment 2"):
        build_engines(shipped, trust_engines=True)
    shutil.rmtree(folder / "1")
    (folder / "1").symlink_to(next(shipped.parents[1].glob("*")))
    with pytest.raises(Untrusted, match="leads out of the bundle"):
        build_engines(shipped, trust_engines=True)


def test_a_trusted_engine_of_another_version_is_built_again(shipped: Path) -> None:
    path = shipped / "engines" / PACKAGE / "fp32" / "3" / "engine.json"
    record = json.loads(path.read_text())
    record["config"]["builder_version"] = "0.9"
    path.write_text(json.dumps(record))
    states = [row.state for row in build_engines(shipped, trust_engines=True).rows]
    assert states == ["adopted", "adopted", "built", "adopted"]
