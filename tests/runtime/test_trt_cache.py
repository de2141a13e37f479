"""Which engines may be opened: those that this device built and nobody changed, and those that its user trusts."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import refused, typed
from failing_disk import fail_every_call_in_turn

from mexit.core.bundle import Bundle
from mexit.errors import ArtifactError, Damaged, MexitError, Untrusted
from mexit.flows.tensorrt_engines import build_engines, kept
from mexit.runtime.backends import tensorrt_cache
from mexit.runtime.backends.tensorrt import recipe_for
from mexit.runtime.backends.tensorrt_builder import Built, EngineConfig, load_tensorrt
from mexit.runtime.backends.tensorrt_cache import device_key, load, load_or_none, provide, slot

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
def recipe() -> EngineConfig:
    return recipe_for(load_tensorrt(), "fp32")


def never() -> Built:
    raise AssertionError("an engine was built where one is kept")


def test_a_kept_engine_is_taken_as_it_is(cache: Path, bundle: Bundle, recipe: EngineConfig) -> None:
    place = slot(bundle, PACKAGE, "fp32", 2)
    assert provide(place, recipe, never).plan == (place.folder / "engine.plan").read_bytes()


def test_no_flipped_byte_of_a_plan_is_opened(cache: Path, bundle: Bundle, recipe: EngineConfig) -> None:
    place = slot(bundle, PACKAGE, "fp32", 1)
    plan = place.folder / "engine.plan"
    content = plan.read_bytes()
    for at in (0, 1, len(content) // 2, len(content) - 1):
        changed = bytearray(content)
        changed[at] ^= 1
        for wrong in (bytes(changed), content[:at], content + b"\0"):
            plan.write_bytes(wrong)
            with pytest.raises(Damaged) as caught:
                provide(place, recipe, never)
    assert str(plan) in str(caught.value)
    assert f"mexit export {bundle.path} --trt --replace" in str(caught.value)


def test_no_flipped_byte_of_a_record_is_believed(cache: Path, bundle: Bundle) -> None:
    place, key = slot(bundle, PACKAGE, "fp32", 1), device_key()
    path, record = place.folder / "engine.json", load(place, key).record
    content = path.read_bytes()
    refusals = []
    for at in range(len(content)):
        changed = bytearray(content)
        changed[at] ^= 1 << at % 8
        path.write_bytes(changed)
        try:
            assert load(place, key).record == record, "white space says nothing"
        except ArtifactError as error:
            refusals.append(str(error))
    assert len(refusals) > 0.6 * len(content)
    assert all(str(path) in said and "--trt --replace" in said for said in refusals)


def test_a_forged_engine_needs_the_key(cache: Path, bundle: Bundle, recipe: EngineConfig) -> None:
    """Everything is consistent but for the signature, which only this device can make."""
    place = slot(bundle, PACKAGE, "fp32", 1)
    evil = b"a plan that runs code of somebody else"
    record = tensorrt_cache.read_record(place)
    for key in (b"\0" * 32, os.urandom(32)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tensorrt_cache, "device_key", lambda key=key: key)
            forged = replace(record, plan_sha256=tensorrt_cache.sha256_bytes(evil), plan_bytes=len(evil))
            tensorrt_cache._store(place, forged, evil)
        with pytest.raises(Untrusted, match="was not written by this device"):
            provide(place, recipe, never)
    for field, value in (("seconds", 0.0), ("targets", ["9.0"]), ("signature", ""), ("plan_bytes", 1)):
        stored = json.loads((place.folder / "engine.json").read_text())
        (place.folder / "engine.json").write_text(json.dumps({**stored, field: value}))
        with pytest.raises(Untrusted):
            load(place, device_key())


def test_another_devices_cache_is_refused(cache: Path, digits_bundle: Path) -> None:
    (cache / "device.key").unlink()
    with pytest.raises(Untrusted, match="was not written by this device, so its engine is not opened"):
        build_engines(digits_bundle)
    assert [row.state for row in build_engines(digits_bundle, replace=True).rows] == ["built"] * 3
    assert [row.state for row in build_engines(digits_bundle).rows] == ["cached"] * 3


def test_an_engine_under_another_name_is_refused(cache: Path, bundle: Bundle, recipe: EngineConfig) -> None:
    first, second = (slot(bundle, PACKAGE, "fp32", k) for k in (1, 2))
    shutil.rmtree(first.folder)
    shutil.copytree(second.folder, first.folder)
    with pytest.raises(Untrusted, match=r"is the engine of segment 2, fp32, .*, expected is .* segment 1, fp32"):
        provide(first, recipe, never)
    other = slot(replace(bundle, id="0" * 64), PACKAGE, "fp32", 2)
    shutil.copytree(second.folder, other.folder)
    with pytest.raises(Untrusted, match=rf"model {bundle.id[:12]}, expected is .* model 000000000000"):
        provide(other, recipe, never)


def test_a_damaged_cache_ends_the_command_with_code_5(cache: Path, bundle: Bundle) -> None:
    plan = slot(bundle, PACKAGE, "fp32", 2).folder / "engine.plan"
    plan.write_bytes(b"\0" + plan.read_bytes()[1:])
    said = refused("export", bundle.path, "--trt", code=5)
    assert str(plan) in said
    assert f"mexit export {bundle.path} --trt --replace" in said
    assert str(plan) in kept(bundle)[1].state
    assert typed("export", bundle.path, "--trt", "--replace").exit_code == 0
    assert [row.state for row in kept(bundle)] == ["ready"] * 3


@pytest.mark.parametrize(
    "change",
    [{"builder_version": "0.9"}, {"targets": ("8.6",)}, {"batches": (1, 2, 4)}, {"builder": "tensorrt"}],
    ids=lambda change: next(iter(change)),
)
def test_what_was_built_otherwise_is_built_anew(
    cache: Path, bundle: Bundle, recipe: EngineConfig, change: dict[str, str]
) -> None:
    place = slot(bundle, PACKAGE, "fp32", 1)
    now = replace(recipe, **change)
    found = provide(place, now, lambda: Built(b"new", now.targets, 0.5))
    assert (found.origin, found.plan, found.record.recipe) == ("built", b"new", now)
    assert provide(place, now, never).origin == "cached"
    assert f"{next(iter(change))} was" in kept(bundle)[0].state
    assert kept(bundle)[0].state.startswith("stale, to be built anew: ")


def test_an_engine_of_other_onnx_bytes_is_stale(cache: Path, bundle: Bundle, recipe: EngineConfig) -> None:
    place = slot(bundle, PACKAGE, "fp32", 1)
    other = replace(tensorrt_cache.read_record(place), onnx_sha256="0" * 64)
    assert tensorrt_cache.changes(other, recipe, place) == "built from another segment"
    assert not tensorrt_cache.changes(tensorrt_cache.read_record(place), recipe, place)


@pytest.mark.parametrize("file", ["engine.plan", "engine.json"])
def test_a_missing_file_is_no_engine(cache: Path, bundle: Bundle, recipe: EngineConfig, file: str) -> None:
    place = slot(bundle, PACKAGE, "fp32", 1)
    (place.folder / file).unlink()
    assert provide(place, recipe, lambda: Built(b"new", recipe.targets, 0.5)).origin == "built"
    assert provide(place, recipe, never).plan == b"new"


def test_a_full_disk_leaves_the_old_engine_or_the_new_one(
    cache: Path, bundle: Bundle, recipe: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = slot(bundle, PACKAGE, "fp32", 1)
    old = (place.folder / "engine.plan").read_bytes()
    plans = iter(range(1000))
    making: list[bytes] = []

    def write() -> None:
        making.append(f"new {next(plans)}".encode())
        provide(place, recipe, lambda: Built(making[-1], recipe.targets, 0.5), replace_it=True)

    def check(written: bool) -> None:
        found = load_or_none(place, device_key())
        assert found is not None
        assert found.plan in (old, *making)
        assert not written or found.plan == making[-1]

    assert fail_every_call_in_turn(monkeypatch, write, check) > 5


def chmod(path: Path) -> None:
    path.chmod(0o640)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:31])


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


@pytest.mark.parametrize("spoil", [chmod, cut, link])
def test_a_key_that_others_may_know_is_no_key(cache: Path, bundle: Bundle, spoil: Callable[[Path], None]) -> None:
    spoil(cache / "device.key")
    said = refused("export", bundle.path, "--trt", code=5)
    assert f"{cache / 'device.key'} must be a file of 32 bytes that its owner alone can read" in said
    assert "remove it" in said


def test_processes_that_start_together_agree_on_one_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEXIT_CACHE", str(tmp_path / "new"))
    keys: list[bytes] = []
    start = threading.Barrier(8)

    def ask() -> None:
        start.wait()
        keys.append(device_key())

    threads = [threading.Thread(target=ask) for _ in range(8)]
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
    """A bundle that brings along engines of another device, on a device without any."""
    monkeypatch.setenv("MEXIT_CACHE", str(tmp_path / "own"))
    engines = next(built.glob("*/*/engines"))
    shutil.copytree(engines, bundle_copy / "engines")
    return bundle_copy


def test_engines_that_came_with_a_bundle_are_not_taken_unless_trusted(shipped: Path) -> None:
    result = build_engines(shipped)
    assert [row.state for row in result.rows] == ["built"] * 3
    assert "--trust-engines takes them" in typed("export", shipped, "--trt").stderr


def test_engines_that_the_user_trusts_become_this_devices_own(shipped: Path) -> None:
    result = build_engines(shipped, trust_engines=True)
    assert [row.state for row in result.rows] == ["adopted"] * 3
    plans = [row.file.read_bytes() for row in result.rows]
    shutil.rmtree(shipped / "engines")
    again = build_engines(shipped)
    assert [row.state for row in again.rows] == ["cached"] * 3
    assert [row.file.read_bytes() for row in again.rows] == plans


def test_even_a_trusted_engine_must_be_what_its_record_says(shipped: Path) -> None:
    place = shipped / "engines" / PACKAGE / "fp32"
    plan = place / "1" / "engine.plan"
    plan.write_bytes(b"\0" + plan.read_bytes()[1:])
    with pytest.raises(Damaged, match=f"{plan} was changed"):
        build_engines(shipped, trust_engines=True)
    shutil.rmtree(place / "1")
    shutil.copytree(place / "2", place / "1")
    with pytest.raises(Untrusted, match="is the engine of segment 2"):
        build_engines(shipped, trust_engines=True)
    shutil.rmtree(place / "1")
    (place / "1").symlink_to(next(shipped.parents[1].glob("*")))
    with pytest.raises(Untrusted, match="leaves the bundle"):
        build_engines(shipped, trust_engines=True)


def test_a_trusted_engine_of_another_version_is_built_here_instead(shipped: Path) -> None:
    path = shipped / "engines" / PACKAGE / "fp32" / "3" / "engine.json"
    record = json.loads(path.read_text())
    record["recipe"]["builder_version"] = "0.9"
    path.write_text(json.dumps(record))
    states = [row.state for row in build_engines(shipped, trust_engines=True).rows]
    assert states == ["adopted", "adopted", "built"]
