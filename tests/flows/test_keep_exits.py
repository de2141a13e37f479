"""`mexit export --exits`: kept exits answer as those of the whole network; the choice is recorded and reused."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from command_line import refused, typed

from mexit import UsageError
from mexit.core.atomic_io import to_json
from mexit.core.budget import format_macs
from mexit.core.bundle import Bundle
from mexit.flows.bench import bench_bundle
from mexit.flows.export import ExportOptions, export_bundle
from mexit.flows.keep_exits import keep_all, keep_named
from mexit.runtime.backends.ort import OrtBackend
from mexit.runtime.latency_profile import Profile
from mexit.runtime.reference import run_all_exits


class Notes:
    """Collects the notes."""

    def __init__(self) -> None:
        from mexit.core.progress import Silent

        self.texts: list[str] = []
        self.track = Silent().track

    def note(self, text: str) -> None:
        self.texts.append(text)

    log = note


@pytest.fixture(scope="module")
def run(workspace: Path) -> Path:
    return workspace / "runs" / "digits"


@pytest.fixture(scope="module")
def int8_without_exit_1(run, tmp_path_factory) -> Bundle:
    out = tmp_path_factory.mktemp("kept") / "kept"
    result = export_bundle(run, out=out, options=ExportOptions("int8", single_file=True, exits="2"))
    assert result.precision_report is not None
    assert [row.exit for row in result.precision_report.exits] == [2, 3]
    return Bundle.open(out)


def test_bench_stops_at_the_first_kept_exit(int8_without_exit_1) -> None:
    rows = bench_bundle(int8_without_exit_1.path, backend="ort", batches=[1], repeats=20).rows
    assert [row.path for row in rows][:2] == ["full", "exit 2"]


def test_kept_exits_have_the_numbers_logits_and_parameters_of_the_network(
    int8_without_exit_1, digits_bundle, int8_bundle, test_digits
) -> None:
    kept, whole = int8_without_exit_1, Bundle.open(digits_bundle)
    assert kept.manifest.numbers == (2, 3)
    assert whole.manifest.numbers == (1, 2, 3)
    images = (test_digits[0][:64, None] / np.float32(255)).astype(np.float32)
    expected = run_all_exits(OrtBackend(whole), images)[1:]
    assert np.allclose(run_all_exits(OrtBackend(kept), images), expected, atol=1e-5)
    closeness = np.abs(run_all_exits(OrtBackend(kept, precision="int8"), images) - expected).mean()
    assert (
        closeness
        < 2
        * np.abs(run_all_exits(OrtBackend(Bundle.open(int8_bundle), precision="int8"), images)[1:] - expected).mean()
    )
    first, *_ = whole.manifest.exits
    for one, other in zip(kept.manifest.exits, whole.manifest.exits[1:], strict=True):
        assert one.cumulative_macs == other.cumulative_macs - first.head_macs
        assert one.head_macs == other.head_macs
    assert kept.manifest.static == whole.manifest.static
    (entry,) = kept.policies().entries
    assert len(entry.temperatures) == 2


def test_named_exits_are_recorded_with_the_reason_of_the_others(int8_without_exit_1) -> None:
    record = int8_without_exit_1.manifest.provenance["exits"]
    assert record == {
        "option": "2", "kept": [2, 3], "dropped": {"1": "not among the exits that --exits names"},
    }  # fmt: skip


def test_the_automatic_choice_is_recorded_and_reused_for_the_same_weights(run, tmp_path) -> None:
    notes = Notes()
    options = ExportOptions(calibrate=False)
    first = export_bundle(run, out=tmp_path / "auto", options=options, progress=notes).exits
    assert first["option"] == "auto"
    assert first["kept"][-1] == 3
    assert set(first["kept"]) | set(map(int, first["dropped"])) == {1, 2, 3}
    assert first["choice"]["static_us"] > 0
    (said,) = [text for text in notes.texts if text.startswith(("the exits", "no early exit saves time"))]
    early = ("of the time at a loss of", "mexit calibrate --target-drop 0.005 selects")
    for words in ("every budget equals full",) if first["kept"] == [3] else early:
        assert words in said

    again = Notes()
    second = export_bundle(run, out=tmp_path / "auto", replace=True, options=options, progress=again).exits
    assert json.loads(json.dumps(second)) == json.loads(json.dumps(first))
    assert any("as the bundle of the same weights has them" in text for text in again.texts)
    assert Bundle.open(tmp_path / "auto").manifest.numbers == tuple(first["kept"])


@pytest.mark.long
def test_a_profile_of_another_device_chooses_the_exits(run, tmp_path) -> None:
    """Where exit 1 takes as long as the static network, no early exit is kept; an earlier choice has no say."""
    for exit_1_us, early in ((200.0, True), (1000.0, False)):
        path = store_profile(tmp_path, (exit_1_us, 1100.0, 1200.0))
        options = ExportOptions(calibrate=False, profile=path)
        record = export_bundle(run, out=tmp_path / "auto", replace=True, options=options).exits
        assert (len(record["kept"]) > 1) is early, record
        assert record["choice"]["engine"] == "openvino bf16, 2 thread(s), from a profile"
        assert record["choice"]["static_us"] == 1000


def test_a_profile_that_does_not_fit_is_refused(run, tmp_path) -> None:
    profile = store_profile(tmp_path, (300.0, 1000.0))
    assert "has 2 exits and the network 3" in refused(
        "export", run, "--out", tmp_path / "new", "--profile", profile, code=2
    )
    assert not (tmp_path / "new").exists()
    assert "which --exits all names" in refused("export", run, "--exits", "all", "--profile", profile, code=2)
    assert "does not exist" in refused("export", run, "--profile", tmp_path / "none.json", code=2)


def store_profile(folder: Path, exits_us: tuple[float, ...]) -> Path:
    """A profile of another device, whose static network takes 1000 us."""
    profile = Profile(exits_us, 1000.0, "0" * 64, "openvino", "bf16", 2, {"openvino": "1"})
    path = folder / "profile.json"
    path.write_bytes(to_json(asdict(profile)))
    return path


@pytest.mark.long
def test_a_single_kept_exit_makes_every_budget_full(run, tmp_path) -> None:
    done = typed("export", run, "--out", tmp_path / "last", "--exits", "3", "--json")
    assert json.loads(done.stdout)["exits"]["kept"] == [3]
    rows = json.loads(done.stdout)["expected"]["budgets"]
    assert [set(row["names"]) for row in rows] == [{"low", "medium", "high", "full"}]


def test_wrong_exits_are_refused(run) -> None:
    assert "auto, all or the numbers of exits such as 1,3,7; found '0'" in refused(
        "export", run, "--exits", "0", code=2
    )
    with pytest.raises(UsageError, match=r"numbers of exits such as 1,3,7; found '9{60}'"):
        keep_named("9" * 5000, 3)
    with pytest.raises(UsageError, match="the network has the exits 1 to 3"):
        keep_named("1,7", 3)
    assert keep_named("3, 1,1", 5).numbers == (1, 3, 5)
    assert keep_all(3).numbers == (1, 2, 3)


def test_an_evaluation_names_the_exits_by_their_numbers_in_the_network(int8_without_exit_1, tmp_path) -> None:
    """The network that is attacked has the kept exits alone, and its costs are those of the bundle."""
    bundle = shutil.copytree(int8_without_exit_1.path, tmp_path / "kept")
    done = typed("evaluate", bundle, "--samples", "40", "--attacks", "pgd", "--steps", "1", "--no-report")
    assert "exit 2" in done.stdout
    assert "exit 1" not in done.stdout
    report = json.loads((bundle / "reports" / "evaluation.json").read_text())
    assert [row["exit"] for row in report["exits"]] == [2, 3]
    assert len(report["transfer"]) == 2
    card = (bundle / "reports" / "model_card.md").read_text()
    for number, macs in zip((2, 3), int8_without_exit_1.manifest.cumulative_macs, strict=True):
        assert f"| {number} | {format_macs(macs)}" in card
    assert "this network has exits 2, 3" in refused("evaluate", bundle, "--exits", "1", "--attacks", "pgd", code=2)
