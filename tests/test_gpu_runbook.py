"""The GPU run-book: its queue, its state file, the journey of the data and of the results, and kills at any time."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mexit.data import registry
from mexit.data.splits import NAMES, Splits, split
from mexit.errors import Damaged
from mexit.train import checkpoint
from mexit.train.config import resolve

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks" / "gpu"
MODULES = ("context", "data_parts", "items", "miniature", "results", "state")
# Items whose results do not depend on the clock.
REPEATABLE = ("small-cnn-adversarial-0", "small-cnn-lw-0", "small-cnn-neo-kd-0")
FAILED, SMALL, MSDNET = *REPEATABLE[:2], "msdnet-cifar10-adversarial"
KILLS = {"few": 3, "twenty": 20}


@pytest.fixture(scope="module")
def book() -> Iterator[Any]:
    """The modules of the run-book."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield SimpleNamespace(**{name: __import__(name) for name in MODULES})
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def tiny_data(book: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data sets of the rehearsal, packed and unpacked; `original` below holds the complete CIFARs."""
    folder: Path = book.miniature.write_data(tmp_path_factory.mktemp("data"))
    return folder


def start(state: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Start the program in the rehearsal."""
    command = [sys.executable, str(FOLDER / "run.py"), "--miniature", "--state", str(state), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def read_state(folder: Path) -> dict[str, Any]:
    path = folder / "state.json"
    items: dict[str, Any] = json.loads(path.read_text())["items"] if path.exists() else {}
    return items


def done_items(folder: Path) -> dict[str, Any]:
    return {name: record["done"] for name, record in read_state(folder).items() if record["done"]}


def report_of(folder: Path, name: str) -> dict[str, Any]:
    """The evaluation of a training item without its duration and the hash of the weights file.

    safetensors writes the metadata of a file in random order; `tensors` compares their content.
    """
    report: dict[str, Any] = json.loads((folder / "items" / name / "evaluation.json").read_text())
    del report["settings"]["seconds"], report["settings"]["model_sha256"]
    return report


def test_the_queue_has_every_group_in_order_and_needs_come_first(book: Any) -> None:
    queue = book.items.QUEUE
    assert sorted({item.name for item in queue}) == sorted(item.name for item in queue)
    assert [item.group for item in queue] == sorted(item.group for item in queue)
    assert {item.group for item in queue} == set("abcdefg")
    seen: set[str] = set()
    for item in queue:
        assert seen.issuperset(item.needs)
        assert item.transfer is None or item.transfer in seen
        seen.add(item.name)
    trained = [item.name for item in queue if item.kind == "train"]
    assert seen.issuperset(f"autoattack-{name}" for name in trained)


def test_the_settings_of_every_training_item_are_valid(book: Any) -> None:
    for item in (item for item in book.items.QUEUE if item.kind == "train"):
        for one in (item, book.items.miniature(item)):
            settings = resolve(one.data, one.preset, one.settings)
            assert settings.model == item.settings["model"]
    pair = [resolve(i.data, i.preset, i.settings) for i in book.items.QUEUE if i.kind == "train" and i.group == "c"]
    assert [one.method for one in pair] == ["adversarial", "neo-kd"]
    assert pair[0].epochs == pair[1].epochs == 150


def test_a_long_item_begins_with_little_time_left_and_a_short_one_only_if_it_fits(book: Any) -> None:
    long, short = book.items.find("msdnet-cifar10-neo-kd"), book.items.find("timing")
    assert long.fits(121)
    assert not long.fits(119)
    assert short.fits(60 * short.minutes)
    assert not short.fits(60 * short.minutes - 1)


def test_the_state_keeps_every_attempt_and_what_is_done(book: Any, tmp_path: Path) -> None:
    state = book.state.State.read(tmp_path / "state.json")
    record = book.state.Record("python work.py one", 2.0, ("data:mnist",), ("items/one/a.json",))
    state.begin("one", record)
    killed = book.state.State.read(tmp_path / "state.json")
    assert killed.records["one"].attempts[0].result == "running"
    assert not killed.is_done("one")
    killed.begin("one", record)
    killed.finish("one", 12.34, "card", "2.11", "abc")
    again = book.state.State.read(tmp_path / "state.json")
    assert again.records == killed.records
    assert [attempt.result for attempt in again.records["one"].attempts] == ["running", "done"]
    assert (again.records["one"].done.card, again.records["one"].done.seconds) == ("card", 12.3)


def test_an_item_that_failed_twice_waits_until_it_is_named(book: Any) -> None:
    state = book.state.State(None)
    for count in (1, 2):
        state.begin("one", book.state.Record("c", 1.0, (), ()))
        state.end("one", "failed", 1.0, "reason")
        assert state.records["one"].gave_up == (count == 2)
    state.begin("one", book.state.Record("c", 1.0, (), ()))
    state.end("one", "unfinished", 1.0)
    assert not state.records["one"].gave_up


def test_merging_a_later_state_loses_no_finished_item(book: Any) -> None:
    earlier, later = book.state.State(None), book.state.State(None)
    record = book.state.Record("c", 1.0, (), ())
    for state, names in ((earlier, ("a", "b")), (later, ("b", "c"))):
        for name in names:
            state.begin(name, record)
    earlier.finish("b", 1.0, "card", "2.11", "abc")
    later.end("b", "failed", 1.0, "reason")
    earlier.merge(later)
    assert set(earlier.records) == {"a", "b", "c"}
    assert earlier.is_done("b")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_unpacked_pictures_and_splits_are_those_of_the_complete_set(book: Any, tiny_data: Path, name: str) -> None:
    check_journey(book, name, tiny_data / "original", tiny_data, book.miniature.COUNTS)


def test_a_part_of_the_real_cifar10_makes_the_journey(book: Any, data_dir: Path, tmp_path: Path) -> None:
    if not (data_dir / "cifar-10-batches-py" / "data_batch_1").exists():
        pytest.skip("needs CIFAR-10 below MEXIT_DATA")
    counts = {"train": 90, "selection": 20, "calibration": 20, "certification": 20, "test": 50}
    for part in book.data_parts.pack("cifar10", data_dir, tmp_path / "parts", 2, counts, effort=0):
        book.data_parts.unpack(part, tmp_path / "there")
    check_journey(book, "cifar10", data_dir, tmp_path / "there", counts)


def check_journey(book: Any, name: str, here: Path, there: Path, counts: dict[str, int | None]) -> None:
    full = registry.load(name, here)
    data, present = book.data_parts.load(name, there)
    assert present.complete
    assert present.full_sha256 == full.sha256
    np.testing.assert_array_equal(data.labels, full.labels)
    np.testing.assert_array_equal(data.images.array[present.mask], full.images.array[present.mask])
    assert not data.images.array[~present.mask].any()
    whole, kept = split(full), book.data_parts.present_splits(split(data), present)
    for part in NAMES:
        wanted = counts[part] if counts[part] is not None else len(whole.part(part))
        assert len(kept.part(part)) == min(wanted, len(whole.part(part)))
        assert np.isin(kept.part(part), whole.part(part)).all()
        assert present.mask[kept.part(part)].all()
    completed = book.data_parts.complete_splits(kept, data, present)
    if counts["train"] is None:
        assert completed.hashes() == whole.hashes()
    completed.check(full)
    with pytest.raises(Damaged):
        kept.check(full)


def test_one_part_alone_is_half_of_every_split(book: Any, tiny_data: Path, tmp_path: Path) -> None:
    present = book.data_parts.unpack(tiny_data / "parts" / "cifar10-1of2.part.npz", tmp_path)
    assert (present.parts, present.complete) == ((1,), False)
    data, _ = book.data_parts.load("cifar10", tmp_path)
    kept, whole = book.data_parts.present_splits(split(data), present), split(data)
    assert abs(2 * len(kept.part("train")) - len(whole.part("train"))) < 60
    again = book.data_parts.unpack(tiny_data / "parts" / "cifar10-1of2.part.npz", tmp_path)
    assert (again.mask == present.mask).all()


def test_a_damaged_part_is_refused(book: Any, tiny_data: Path, tmp_path: Path) -> None:
    content = bytearray((tiny_data / "parts" / "cifar10-1of2.part.npz").read_bytes())
    content[len(content) // 2] ^= 255
    part = tmp_path / "cifar10-1of2.part.npz"
    part.write_bytes(content)
    with pytest.raises(Damaged):
        book.data_parts.unpack(part, tmp_path / "data")


@dataclass(frozen=True)
class Session:
    """A session of three items, of which the first one fails because its run is damaged. Read it only."""

    state: Path
    out: Path
    exit_code: int


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    folder = tmp_path_factory.mktemp("session")
    state, out = folder / "state", folder / "out"
    (state / "runs" / FAILED).mkdir(parents=True)
    (state / "runs" / FAILED / "settings.json").write_text("damaged")
    return Session(state, out, start(state, "--items", FAILED, SMALL, MSDNET, "--results", str(out)).wait())


@pytest.mark.long
def test_a_failed_item_is_recorded_and_the_next_ones_run(session: Session) -> None:
    records = read_state(session.state)
    assert session.exit_code == 1
    assert records[FAILED]["attempts"][-1]["result"] == "failed"
    assert "settings.json" in records[FAILED]["attempts"][-1]["error"]
    assert list(done_items(session.state)) == [SMALL, MSDNET]


@pytest.mark.long
def test_results_of_a_session_come_back_as_runs_of_the_complete_data_set(
    book: Any, session: Session, tmp_path: Path
) -> None:
    state, root = session.state, tmp_path / "repository"
    files = sorted(Path(shutil.copytree(session.out, tmp_path / "out")).iterdir())
    assert [file.name for file in files] == ["results.json", "weights-1.safetensors"]
    assert all(file.stat().st_size < 16e6 for file in files)
    book.results.bring_in(tmp_path / "out", root)
    stored = read_state(root / "benchmarks" / "results" / "gpu")
    assert stored[MSDNET]["done"]["torch"]
    report = json.loads((root / "benchmarks" / "results" / "gpu" / MSDNET / "evaluation.json").read_text())
    assert report == json.loads((state / "items" / MSDNET / "evaluation.json").read_text())
    run = root / "zoo" / "gpu" / MSDNET
    model, settings, splits = checkpoint.load_model(run)
    assert (settings.model, model.exits) == ("msdnet-cifar10", 3)
    full = registry.load("cifar10", state / "data" / "original")
    splits.check(full)
    expected = split(full).thinned(full, settings.fraction, None)
    assert splits.hashes() == expected.hashes()
    there = checkpoint.load_model(state / "runs" / MSDNET)[0].state_dict()
    assert all((value == there[key]).all() for key, value in model.state_dict().items())
    files[1].write_bytes(b"weights of another collection")
    with pytest.raises(Damaged, match="not of one collection"):
        book.results.bring_in(tmp_path / "out", tmp_path / "again")


@pytest.mark.long
def test_an_unfinished_run_comes_back_with_its_checkpoint(book: Any, session: Session, tmp_path: Path) -> None:
    state, root = Path(shutil.copytree(session.state, tmp_path / "state")), tmp_path / "repository"
    (state / "runs" / SMALL / "weights.safetensors").unlink()
    content = json.loads((state / "state.json").read_text())
    content["items"][SMALL]["done"] = None
    (state / "state.json").write_text(json.dumps(content))
    book.results.collect(state, state / "data", tmp_path / "out")
    book.results.bring_in(tmp_path / "out", root)
    here, there = root / "runs" / "gpu" / SMALL, state / "runs" / SMALL
    assert not (root / "zoo" / "gpu" / SMALL).exists()
    assert Splits.load(here / "splits.npz").hashes() == Splits.load(there / "splits.npz").hashes()
    assert tensors(here / "checkpoint.safetensors") == tensors(there / "checkpoint.safetensors")


def tensors(path: Path) -> dict[str, bytes]:
    """The tensors and the metadata of a safetensors file."""
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        values = {key: file.get_tensor(key).tobytes() for key in file.keys()}  # noqa: SIM118
        return {**values, "metadata": json.dumps(file.metadata(), sort_keys=True).encode()}


@pytest.mark.long
@pytest.mark.parametrize("kills", ["few", "twenty"])
def test_kills_lose_no_finished_item_and_change_no_result(tmp_path: Path, kills: str) -> None:
    undisturbed, state = tmp_path / "undisturbed", tmp_path / "state"
    began_s = time.monotonic()
    assert start(undisturbed, "--items", *REPEATABLE).wait() == 0
    usual_s = (time.monotonic() - began_s) / len(REPEATABLE)
    rng, finished, left = random.Random(0), {}, KILLS[kills]
    while left:
        process = start(state, "--items", *REPEATABLE)
        try:
            process.wait(timeout=rng.uniform(0.1, 1.6 * usual_s))
            shutil.rmtree(state / "items" / REPEATABLE[-1])  # all done before the last kill: one item begins again
            content = json.loads((state / "state.json").read_text())
            content["items"].pop(REPEATABLE[-1])
            (state / "state.json").write_text(json.dumps(content))
            finished.pop(REPEATABLE[-1], None)
            continue
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            left -= 1
        done = done_items(state)
        assert finished == {name: done.get(name) for name in finished}
        finished = done
        for name in finished:
            assert (state / "items" / name / "evaluation.json").exists()
    assert start(state, "--items", *REPEATABLE).wait() == 0
    assert set(done_items(state)) == set(REPEATABLE)
    assert {name: done_items(state)[name] for name in finished} == finished
    for name in REPEATABLE:
        weights = [tensors(folder / "runs" / name / "weights.safetensors") for folder in (undisturbed, state)]
        assert weights[0] == weights[1]
        assert report_of(undisturbed, name) == report_of(state, name)


@pytest.mark.long
def test_the_whole_queue_runs_in_the_rehearsal(book: Any, tmp_path: Path) -> None:
    assert start(tmp_path / "state", "--minutes", "60", "--results", str(tmp_path / "out")).wait() == 0
    expected = {item.name for item in book.items.QUEUE}
    try:
        import pyautoattack  # noqa: F401
    except ImportError:
        expected = {name for name in expected if not name.startswith("autoattack-")}
    assert set(done_items(tmp_path / "state")) == expected
    assert len(list((tmp_path / "out").iterdir())) <= 8
