"""After a failed write or a killed process, an artifact is the complete old one or the complete new one."""

from __future__ import annotations

import dataclasses
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import program, quiet
from failing_disk import fail_each_call

from mexit.core.bundle import Bundle
from mexit.core.trace import Trace
from mexit.flows.inspect import inspect_bundle
from mexit.flows.train import TrainOptions, train_model
from mexit.train import checkpoint

pytestmark = pytest.mark.slow

once_or_permanently = pytest.mark.parametrize("permanent", [False, True], ids=["once", "permanently"])


@pytest.fixture
def other_bundle(bundle_copy: Path) -> Bundle:
    """A bundle in memory that differs in its class names and so has another id."""
    opened = Bundle.open(bundle_copy)
    manifest = dataclasses.replace(opened.manifest, classes=tuple("abcdefghij"))
    contents = {spec.file: (bundle_copy / spec.file).read_bytes() for spec in manifest.files}
    return Bundle.from_parts(bundle_copy, manifest, contents)


@pytest.fixture
def run_copy(workspace: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(workspace / "runs" / "digits", tmp_path / "runs" / "digits"))


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


@once_or_permanently
def test_a_new_bundle_is_complete_or_absent(
    other_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, permanent: bool
) -> None:
    target = dataclasses.replace(other_bundle, path=tmp_path / "new" / "digits")

    def check(succeeded: bool) -> None:
        if target.path.exists():
            assert Bundle.open(target.path).id == target.id
            shutil.rmtree(target.path)
        else:
            assert not succeeded
        assert not target.path.parent.exists() or names(target.path.parent) == set()

    assert fail_each_call(monkeypatch, target.write, check, permanent=permanent) > 25


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_a_replaced_bundle_is_the_old_or_the_new_one(
    other_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    old = Bundle.open(other_bundle.path)
    seen = set()

    def check(succeeded: bool) -> None:
        bundle = Bundle.open(old.path)
        seen.add(bundle.id)
        assert bundle.id == other_bundle.id if succeeded else bundle.id in (old.id, other_bundle.id)
        assert names(old.path.parent) == {"digits"}
        old.write(replace=True)

    count = fail_each_call(monkeypatch, lambda: other_bundle.write(replace=True), check, exchange=exchange)
    assert count > 25
    assert seen == {old.id, other_bundle.id}


@once_or_permanently
def test_policies_and_their_traces_are_the_old_or_the_new_ones(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch, permanent: bool
) -> None:
    bundle = Bundle.open(bundle_copy)
    old = bundle.policies()
    trace = bundle.load_trace(old.entries[0].trace)
    kept = {ref.file: (bundle_copy / ref.file).read_bytes() for ref in (old.entries[0].trace, *old.entries[0].evidence)}

    def write() -> None:
        newer = bundle.save_trace(Trace(trace.logits + 1, trace.labels, trace.index, trace.origin))
        bundle.save_policies(old.with_entry(dataclasses.replace(old.entries[0], trace=newer, evidence=())))

    def check(succeeded: bool) -> None:
        policies = inspect_bundle(bundle_copy).policies  # loads every trace that it names
        assert policies is not None
        assert policies != old or not succeeded
        assert not [
            name for folder in (bundle_copy, bundle_copy / "traces") for name in names(folder) if ".tmp" in name
        ]
        for file, content in kept.items():
            (bundle_copy / file).write_bytes(content)
        bundle.save_policies(old)

    assert fail_each_call(monkeypatch, write, check, permanent=permanent) >= 12


def weights_of(run: Path) -> bytes:
    return b"".join(value.numpy().tobytes() for value in checkpoint.load_model(run)[0].state_dict().values())


def double_weights(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)


def test_weights_are_the_old_or_the_new_ones(run_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, settings, _ = checkpoint.load_model(run_copy)
    old = weights_of(run_copy)
    original = (run_copy / checkpoint.WEIGHTS).read_bytes()
    double_weights(model)

    def check(succeeded: bool) -> None:
        assert weights_of(run_copy) != old or not succeeded
        assert not [name for name in names(run_copy) if ".tmp" in name]
        (run_copy / checkpoint.WEIGHTS).write_bytes(original)

    def write() -> None:
        checkpoint.save_weights(run_copy, model.state_dict(), settings, 10)

    assert fail_each_call(monkeypatch, write, check) >= 6


def test_a_checkpoint_is_the_old_or_the_new_one(run_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, _ = checkpoint.load_model(run_copy)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    state = checkpoint.restore(run_copy, model, optimiser)
    old = state.position
    original = (run_copy / checkpoint.CHECKPOINT).read_bytes()
    newer = dataclasses.replace(old, epoch=old.epoch + 1)
    seen = set()

    def check(succeeded: bool) -> None:
        position = checkpoint.restore(run_copy, model, optimiser).position
        assert position == newer if succeeded else position in (old, newer)
        seen.add(position.epoch)
        (run_copy / checkpoint.CHECKPOINT).write_bytes(original)

    def write() -> None:
        checkpoint.save(run_copy, model, optimiser, dataclasses.replace(state, position=newer))

    assert fail_each_call(monkeypatch, write, check) >= 6
    assert seen == {old.epoch, newer.epoch}


QUICK = {"method": "clean", "epochs": 1, "batch": 943, "precision": "fp32"}


def test_a_run_whose_disk_failed_anywhere_ends_in_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # no picture
    run = Path("runs/quick")
    train_model(settings=QUICK, out=run, options=TrainOptions(threads=1))
    expected = weights_of(run)
    shutil.rmtree("runs")

    seen = set()

    def check(succeeded: bool) -> None:
        state = (succeeded, *sorted((str(file), file.stat().st_size) for file in Path().rglob("runs/**/*")))
        if state not in seen:
            seen.add(state)
            if not succeeded:
                train_model(
                    settings=QUICK,
                    out=run,
                    resume=(run / checkpoint.SETTINGS).exists(),
                    options=TrainOptions(threads=1),
                )
            assert weights_of(run) == expected
            assert len((run / checkpoint.LOG).read_text().splitlines()) == 1
        shutil.rmtree("runs", ignore_errors=True)

    assert (
        fail_each_call(
            monkeypatch, lambda: train_model(settings=QUICK, out=run, options=TrainOptions(threads=1)), check
        )
        > 25
    )
    assert len(seen) > 3


def limit_files_to(size: int) -> Callable[[], None]:
    """For a program that is about to start: no file it writes can grow beyond `size` bytes."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_limit_on_file_size_leaves_a_bundle_as_it_was(bundle_copy: Path) -> None:
    before = {path: path.read_bytes() for path in bundle_copy.rglob("*") if path.is_file()}
    done = program("calibrate", bundle_copy, "--attack", "none", preexec_fn=limit_files_to(2_000))
    assert done.returncode == 1
    assert "File too large; what was there before is untouched" in done.stderr
    assert {path: path.read_bytes() for path in bundle_copy.rglob("*") if path.is_file()} == before


def test_a_limit_on_file_size_before_the_first_checkpoint_leaves_nothing() -> None:
    flags = ["--method", "clean", "--epochs", "1", "--batch", "943", "--threads", "1"]
    done = program("train", *flags, preexec_fn=limit_files_to(50_000))
    assert done.returncode == 1
    assert "checkpoint.safetensors: File too large; what was there before is untouched" in done.stderr
    assert list(Path("runs").iterdir()) == []


WRITERS: dict[str, str] = {
    "bundle": """
        one, other = [Bundle.open(path) for path in sys.argv[2:4]]
        target = sys.argv[4] + "/target"
        bundles = [dataclasses.replace(bundle, path=Path(target)) for bundle in (one, other)]
        def write(turn): bundles[turn % 2].write(replace=True)
        def check(): assert Bundle.open(target).id in (one.id, other.id)
    """,
    "policies": """
        bundle = Bundle.open(sys.argv[2])
        old = bundle.policies()
        trace = bundle.load_trace(old.entries[0].trace)
        traces = [Trace(trace.logits + turn, trace.labels, trace.index, trace.origin) for turn in (0, 1)]
        def write(turn):
            ref = bundle.save_trace(traces[turn % 2])
            bundle.save_policies(old.with_entry(dataclasses.replace(old.entries[0], trace=ref, evidence=())))
        def check(): assert inspect_bundle(bundle.path).policies.entries
    """,
    "checkpoint": """
        import torch
        from mexit.train import checkpoint
        run = Path(sys.argv[5])
        model, settings, _ = checkpoint.load_model(run)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        state = checkpoint.restore(run, model, optimiser)
        def write(turn):
            position = dataclasses.replace(state.position, epoch=turn % 2)
            checkpoint.save(run, model, optimiser, dataclasses.replace(state, position=position))
            checkpoint.save_weights(run, model.state_dict(), settings, 10)
        def check():
            assert checkpoint.restore(run, model, optimiser).position.epoch in (0, 1)
            checkpoint.load_model(run)
    """,
}
KILLER = """
import dataclasses, json, os, random, signal, struct, sys, time
from pathlib import Path
from mexit.core.bundle import Bundle
from mexit.core.trace import Trace
from mexit.flows.inspect import inspect_bundle
{writer}
sync = os.fsync
def sync_to_a_slow_disk(file):
    sync(file)
    time.sleep(0.005)
os.fsync = sync_to_a_slow_disk
write(0)
check()
moments, caught, root = random.Random(7), 0, Path(sys.argv[4])
for turn in range(int(sys.argv[1])):
    done, says_done = os.pipe()
    child = os.fork()
    if child == 0:
        for again in range(1_000_000):
            began = time.perf_counter()
            write(again)
            os.write(says_done, struct.pack("d", time.perf_counter() - began))
    os.close(says_done)
    took_s, = struct.unpack("d", os.read(done, 8))
    os.close(done)
    time.sleep(moments.uniform(0, 2 * took_s))
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "the writer ended by itself"
    check()
    caught += any(root.rglob(".*.tmp-*"))
write(0)
write(1)
check()
print(json.dumps({{"caught": caught, "left": [str(path) for path in root.rglob(".*.tmp-*")]}}))
"""
KILLS = 30


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "bundle" else pytest.mark.long) for kind in WRITERS]
)
def test_a_writer_killed_at_any_moment_leaves_the_old_or_the_new_one(
    kind: str, bundle_copy: Path, other_bundle: Bundle, run_copy: Path, tmp_path: Path
) -> None:
    other = dataclasses.replace(other_bundle, path=tmp_path / "other")
    other.write()
    writer = "\n".join(line[8:] for line in WRITERS[kind].splitlines())
    arguments = [str(KILLS), str(bundle_copy), str(other.path), str(tmp_path), str(run_copy)]
    command = [sys.executable, "-c", KILLER.format(writer=writer), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=quiet(), check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["caught"] > KILLS // 10, "too few processes were killed during a write"
    assert report["left"] == []
