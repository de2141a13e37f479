"""Results as people see them: which tables, which captions, what to type next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mexit.commands import output
from mexit.core.budget import format_macs, short_macs

if TYPE_CHECKING:
    from mexit.camera.pipeline import CameraPrediction
    from mexit.core.policies import PolicyEntry
    from mexit.flows.bench import BenchResult
    from mexit.flows.calibrate import CalibrateResult
    from mexit.flows.camera import CameraReport
    from mexit.flows.demo import DemoResult
    from mexit.flows.evaluate import EvaluateResult
    from mexit.flows.export import ExportResult
    from mexit.flows.inspect import InspectResult
    from mexit.flows.models import NetworkCosts
    from mexit.flows.run import Answer
    from mexit.runtime.autotune import Explanation


def show_demo(result: DemoResult) -> None:
    """The demo's one table, and what to try next."""
    report = result.report
    rows = [
        [
            name,
            output.percent(row["accuracy"]),
            output.percent(row["attacked"]),
            short_macs(row["budget_macs"]),
            short_macs(row["mean_macs"]),
            output.percent(row["saved"]),
            output.counts(row["exits"]),
            f"{result.latency_us[name]:.0f}",
        ]
        for name, row in report["budgets"].items()
    ]
    columns = ["budget", "clean", "attacked", "MACs", "mean", "saved", "exits taken", "us"]
    exits = ", ".join(f"exit {row['exit']} {output.percent(row['clean'])}" for row in report["exits"])
    caption = (
        f"accuracy on {report['n']} test images that chose nothing; attack: {report['attack']}\n"
        f"MACs: budget, and mean spent; us: median time of one image\n"
        f"each exit alone: {exits}; {report['seconds']:.0f} s in all"
    )
    output.table("digits with NEO-KD, three exits", columns, rows, caption)
    written = [path for path in (result.picture, result.samples[0].parent) if path]
    output.say(f"wrote {report['run']}, {report['bundle']}, " + ", ".join(str(path) for path in written))
    output.next_commands(
        f"mexit run {result.samples[0]} {result.samples[1]} --budget low",
        "mexit serve --budget low",
        f"curl --data-binary @{result.samples[0]} http://127.0.0.1:8000/v1/classify",
        f"mexit camera --source '{result.samples[0].parent}/*.png' --out annotated.mp4",
        "mexit inspect",
        "mexit train --help",
    )


def show_evaluation(result: EvaluateResult) -> None:
    """Per exit, transfer, per budget, radius, flags."""
    report = result.report
    settings = report["settings"]
    caption = f"{settings['n']} of {settings['of']} test images, {settings['precision']}; {settings['attack']}"
    if settings["strong_n"]:
        caption += f"\n{settings['strong_n']} of them under every attack: {', '.join(settings['attacks'])}"
    names = [name for name in ("clean", "average", "max-average", "autoattack", "worst")
             if any(name in row for row in report["exits"])]  # fmt: skip
    rows = [
        [str(row["exit"]), *(output.with_error(row[name]) if name in row else "-" for name in names)]
        for row in report["exits"]
    ]
    output.table(f"{settings['source']}: accuracy per exit", ["exit", *names], rows, caption)
    exits = [str(row["exit"]) for row in report["exits"]]
    transfer = [
        [f"exit {k}", *(output.percent(cell["value"]) for cell in row)]
        for k, row in zip(exits, report["transfer"], strict=True)
    ]
    output.table(
        "accuracy when one exit is attacked (row) and another answers (column)",
        ["attacked", *(f"exit {k}" for k in exits)],
        transfer,
    )
    if report["budgets"]:
        _show_budgets(report["budgets"], settings)
    if report["curve"]:
        _show_curve(report["curve"])
    _say_flags(report)
    output.say("wrote " + ", ".join(str(path) for path in result.written))


def _show_budgets(budgets: dict[str, Any], settings: dict[str, Any]) -> None:
    """A row for each budget and condition; what slows it down in a table of its own."""
    rows = []
    for name, row in budgets.items():
        first = f"{name} ≤{short_macs(row['budget_macs'])}"
        for condition, found in row.items():
            if condition == "budget_macs":
                continue
            spent = ["-", "-"]
            if "exits" in found:
                spent = [short_macs(found["mean_macs"]), output.counts(found["exits"])]
            rows.append([first, condition, output.with_error(found), *spent])
            first = ""
    columns = ["budget", "images", "accuracy", "mean MACs", "exits taken"]
    caption = "worst: right under every attack, the slow ones included"
    output.table("accuracy and cost of the deployed policy", columns, rows, caption)
    slow = [name for name in ("clean", "sloth", "hinge") if all(name in row for row in budgets.values())]
    if len(slow) > 1:
        rows = [
            [name, *(f"{row[one]['efficacy']:.2f} ({short_macs(row[one]['mean_macs'])})" for one in slow)]
            for name, row in budgets.items()
        ]
        caption = (
            "efficacy is 1 if all leave at once, and falls as they are kept; in brackets the mean MACs\n"
            f"clean: {settings['n']} images; attacked: {settings['strong_n']} of them"
        )
        output.table("slowdown: efficacy of the exits", ["budget", *slow], rows, caption)


def _show_curve(curve: list[dict[str, Any]]) -> None:
    names = [f"exit {k}" for k in range(1, len(curve[0]["exits"]) + 1)] + list(curve[0]["budgets"])
    rows = [
        [f"{row['eps']:.4g}"]
        + [output.percent(found["value"]) for found in (*row["exits"], *row["budgets"].values())]
        for row in curve
    ]
    output.table("accuracy against the radius of the attack", ["eps", *names], rows)


def _say_flags(report: Mapping[str, Any]) -> None:
    """What speaks against the evaluation itself."""
    if not report["flags"]:
        output.say(f"no flags: {len(report['checks'])} checks of the attacks themselves passed")
        return
    failed = [check for check in report["checks"] if not check["passed"]]
    rows = [[check["name"], check["found"], check["expected"], check["means"]] for check in failed]
    title = f"FLAGS: {len(failed)} of {len(report['checks'])} checks failed; accuracy under attack may be too high"
    output.table(title, ["check", "found", "expected", "it means"], rows)


def show_export(result: ExportResult) -> None:
    """What was written, and what it promises."""
    if result.calibration:
        output.calibration_table(result.calibration.entry)
    differences = ", ".join(f"{difference:.1e}" for difference in result.differences)
    output.say(
        f"wrote {result.bundle}, model {result.model[:12]}; largest difference from torch per exit: {differences}"
    )
    if result.parity:
        output.parity_table(result.parity)
    output.next_commands(
        *(["mexit calibrate"] if not result.calibration else []),
        *(["mexit calibrate --backend ort:int8"] if result.parity and result.parity.precision == "int8" else []),
        "mexit serve --budget low",
        "mexit evaluate",
        "mexit bench",
    )


def show_calibration(result: CalibrateResult) -> None:
    """What each budget promises, how the scores rank, and the certificate in words."""
    if result.scores:
        conditions = ["clean", "attacked"][: len(result.scores[0].auroc)]
        rows = [
            [one.measure, "yes" if one.ensemble else "no", *(f"{value:.4f}" for value in one.auroc)]
            for one in result.scores
        ]
        title = "how well each score ranks right above wrong (AUROC)"
        output.table(title, ["score", "ensemble", *conditions], rows, f"chosen: {_score(result.entry)}")
    output.calibration_table(result.entry)
    for found in result.entry.certificates:
        _say_certificate(found)
    written = ", ".join(str(path) for path in (result.bundle / "policies.json", *result.written))
    output.say(f"wrote {written}")
    output.next_commands("mexit serve --budget low", "mexit evaluate")


def _score(entry: PolicyEntry) -> str:
    return entry.measure + (", ensemble of exits" if entry.ensemble else "")


def _say_certificate(found: Any) -> None:
    """A certificate as `policies.json` stores it."""
    measured = ", ".join(f"{value:.4f} ({name}, n {found['n'][name]})" for name, value in found["risk"].items())
    output.say(f"certificate {found['id']} ({found['method']}): {found['promise']} Measured: {measured}.")
    output.say(f"  {found['limits']}")


def show_answers(answers: Sequence[Answer]) -> None:
    """One row an image; errors after the table."""
    rows = []
    for answer in answers:
        found = answer.prediction
        if found is not None:
            saved = found.saved_macs / (found.macs + found.saved_macs)
            rows.append(
                [
                    answer.image.name,
                    found.label,
                    output.percent(found.confidence),
                    str(found.exit),
                    found.reason,
                    short_macs(found.macs),
                    output.percent(saved),
                    f"{found.latency_ms:.2f} ms",
                ]
            )
    if rows:
        output.table("", ["image", "label", "confidence", "exit", "why there", "MACs", "saved", "time"], rows)
    for answer in answers:
        if answer.error is not None:
            output.error(f"{answer.image}: {answer.error}")


def run_json(answers: Sequence[Answer]) -> dict[str, Any]:
    """The object of `mexit run --json`."""
    rows = []
    for answer in answers:
        found = answer.prediction.to_json() if answer.prediction else {"error": str(answer.error)}
        rows.append({"image": str(answer.image), **found})
    return {"predictions": rows}


def say_serving(url: str, bundle: Path, budget: str, *, with_token: bool) -> None:
    """Once the server listens."""
    output.say(f"serving {bundle} at {url} within budget {budget}; Ctrl-C stops it")
    header = '-H "Authorization: Bearer $MEXIT_TOKEN" ' if with_token else ""
    output.next_commands(f"curl {header}--data-binary @IMAGE.png {url}/v1/classify", f"curl {header}{url}/metrics")


class LabelChanges:
    """Says what a camera sees whenever that changes; for watching without a file to write."""

    def __init__(self) -> None:
        self._last: str | None = None

    def __call__(self, found: CameraPrediction) -> None:
        """One answered frame."""
        if found.label != self._last:
            self._last = found.label
            sure = output.percent(found.confidence)
            output.say(f"frame {found.frame_index}: {found.label}, {sure} at exit {found.exit}")


def camera_json(result: CameraReport) -> dict[str, Any]:
    """The object of `mexit camera --json`."""
    return {name: _plain(value) for name, value in asdict(result).items()}


def show_camera(result: CameraReport) -> None:
    """Frames, drops, ages, cost."""
    age = "-" if result.age_ms is None else f"{result.age_ms['p50']:.1f} / {result.age_ms['p95']:.1f} ms"
    rows = [
        ["frames answered", f"{result.frames} ({result.fps:.1f} a second)"],
        ["dropped for newer ones", str(result.dropped - result.refused)],
        *([["dropped by the rate limiter", str(result.refused)]] if result.refused else []),
        ["damaged", str(result.undecodable)],
        ["reconnects", str(result.reconnects)],
        ["age of an answer, p50 / p95", age],
        ["exits taken", output.counts(result.exits)],
        ["mean cost", f"{format_macs(result.mean_macs)}, {output.percent(result.saved)} saved"],
    ]
    output.table(result.source, ["", ""], rows)
    if result.outputs:
        output.say("wrote " + ", ".join(str(path) for path in result.outputs))


def show_bench(result: BenchResult) -> None:
    """Latency per path, after how the engines compare."""
    if result.tuning:
        _show_tuning(result.tuning)
    rows = [
        [
            row.path,
            str(row.batch),
            f"{row.p50_us:.0f}",
            f"{row.p95_us:.0f}",
            f"{row.mean_us / row.batch:.1f}",
            str(row.n),
        ]
        for row in result.rows
    ]
    first = result.rows[0]
    caption = f"{first.engine}, {first.threads} thread(s), {result.machine['cpu']}; {result.images}"
    output.table("microseconds a call", ["path", "batch", "p50", "p95", "mean an image", "n"], rows, caption)
    if slower := result.slower_than_full():
        named = ", ".join(f"{path} (batch {batch})" for path, batch in slower)
        output.say(f"slower here than full, which runs no early heads: {named}; choose a lower budget, or full")


def show_inspection(result: InspectResult) -> None:
    """Exits, costs, provenance, policies."""
    manifest = result.bundle.manifest
    full = manifest.cumulative_macs[-1]
    rows = [
        [
            str(k),
            format_macs(spec.cumulative_macs),
            output.percent(spec.cumulative_macs / full),
            format_macs(spec.trunk_macs),
            format_macs(spec.head_macs),
            f"{spec.parameters:,}",
        ]
        for k, spec in enumerate(manifest.exits, start=1)
    ]
    shape = " x ".join(str(side) for side in manifest.input.shape)
    title = f"{manifest.name}, model {result.bundle.id[:12]}: {shape} in, {len(manifest.classes)} classes"
    output.table(title, ["exit", "cost", "of full", "trunk", "head", "parameters"], rows, "every byte as recorded")
    if manifest.splits:
        parts = ", ".join(f"{name} {part.n}" for name, part in manifest.splits.parts.items())
        output.say(f"trained on {manifest.splits.data_set}: {parts}")
    _show_tuning(result.tuning)
    if result.policies is None:
        output.next_commands("mexit calibrate")
        return
    for entry in result.policies.entries:
        output.say(f"calibrated for {entry.engine} {entry.precision} with {_score(entry)}")
        output.calibration_table(entry)
        for found in entry.certificates:
            _say_certificate(found)


def _show_tuning(found: Explanation) -> None:
    """What auto takes, what it was held against, and what would make more engines fit."""
    choice = found.choice
    said = f"auto on this device: {choice.backend}, {choice.threads} thread(s), {choice.reason}"
    if not found.rows:
        output.say(f"{said}; mexit bench --tune times the engines")
        return
    rows = [
        [row.timing.backend, str(row.timing.threads), output.counts([round(us) for us in row.timing.segments_us]),
         f"{row.timing.total_us:.0f}", row.state]
        for row in found.rows
    ]  # fmt: skip
    output.table("engines: microseconds an image", ["engine", "threads", "segments", "all", ""], rows, said)
    for name, why in found.skipped.items():
        output.say(f"not timed: {name}: {why}")
    for command in dict.fromkeys(row.command for row in found.rows if row.command):
        output.say(f"faster once calibrated: {command}")


def show_models(result: Sequence[NetworkCosts]) -> None:
    """Every network, one line an exit."""
    rows = []
    for network in result:
        shape = " x ".join(str(side) for side in network.input_shape)
        names = [network.name, f"{shape}, {network.classes} classes"]
        for found in network.exits:
            share = output.percent(found.macs / network.exits[-1].macs)
            name = names.pop(0) if names else ""  # side by side they would not fit 80 columns
            rows.append([name, str(found.exit), short_macs(found.macs), share, f"{found.parameters:,}"])
    columns = ["network", "exit", "MACs", "of full", "parameters"]
    caption = (
        "MACs of a sample that leaves at the exit, the heads it passed included\n"
        "-single: the same backbone with its last exit alone, the baseline"
    )
    output.table("networks for mexit train --model", columns, rows, caption)
    output.next_commands("mexit train --model NAME --data NAME")


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
