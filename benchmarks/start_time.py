"""Measure the time from starting a process to its first answer: `small-cnn`, the `cpu` extra, one image.

    git worktree add /tmp/old v0.1.0
    python benchmarks/start_time.py [PYTHON] [--repeats 30] [--other /tmp/old]

PYTHON is the interpreter of an environment with the packages of mexit[cpu] only; default this one, where torch is
installed but not imported. The network has random weights, which do not change the time to load it. Target: 0.35 s.
Starts of the different kinds alternate. Processor time shows the share of the program when other programs run at the
same time. `--other` adds a comparison with another checkout, of which each exports the same network: size of the
bundle, resident memory after an answer of exit 1, which does not open the static network, and time to the first answer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from page import table, write_page

WARM_UP = 3
TARGET_S = 0.35
MOST_RATIO = 1.1  # of bundle size and resident memory
HERE = Path(__file__).parents[1]
# The clock is the same for all processes of the machine.
_STAGES = """
import time; stages = [("interpreter", time.monotonic())]
import numpy; stages.append(("import numpy", time.monotonic()))
from mexit import Runtime; stages.append(("import mexit", time.monotonic()))
runtime = Runtime.open({bundle!r}, "full"); stages.append(("Runtime.open, onnxruntime included", time.monotonic()))
runtime(numpy.zeros((28, 28), numpy.uint8)); stages.append(("first answer", time.monotonic()))
import json, sys
print(json.dumps({{"stages": stages, "cpu": time.process_time(), "torch": "torch" in sys.modules}}))
"""
_MEMORY = """
import numpy; from mexit import Runtime
runtime = Runtime.open({bundle!r}, "full", backend="ort", threads=1)
runtime.answer_tensor(numpy.zeros((1, *runtime.bundle.manifest.input.shape), numpy.float32), max_exit=1)
[line] = [line for line in open("/proc/self/status") if line.startswith("VmRSS")]
print(int(line.split()[1]) / 1024)
"""
_ENGINE = """
import json, time, numpy, onnxruntime
print(json.dumps({{"stages": [("all", time.monotonic())], "cpu": time.process_time(), "torch": False}}))
"""


def make_bundle(path: Path) -> None:
    """A bundle of `small-cnn` with random weights."""
    import torch

    from mexit.data import digits, splits
    from mexit.export.bundle_writer import BundleContents, build_bundle
    from mexit.export.onnx_export import export_segment
    from mexit.export.segments import cut_segments
    from mexit.models import build_model, model_spec

    torch.manual_seed(0)
    spec, data = model_spec("small-cnn").input, digits.load()
    segments = [export_segment(segment) for segment in cut_segments(build_model("small-cnn", 10).eval(), spec.name)]
    build_bundle(path, BundleContents(data.classes, spec, splits.split(data), {"fp32": segments})).write()


def run(python: str, code: str, cache: str, *paths: Path) -> str:
    """The standard output of a program; mexit is that of this checkout, or of `paths`."""
    paths = paths or (HERE,)
    environment = {**os.environ, "MEXIT_CACHE": cache, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # otherwise every start would compile mexit again
    done = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, check=True, env=environment,
        cwd=paths[0],  # which Python searches first
    )  # fmt: skip
    return done.stdout


def start(python: str, code: str, cache: str, checkout: Path = HERE) -> dict[str, Any]:
    """Seconds from the start of a process to each stage, and its processor time."""
    begin = time.monotonic()
    times = json.loads(run(python, code, cache, checkout))
    assert not times["torch"], "torch was imported"
    return {"stages": {name: at - begin for name, at in times["stages"]}, "cpu": times["cpu"]}


def tune(python: str, bundle: str, cache: str) -> None:
    """Time the engines for `auto`, as `mexit export` does."""
    code = f"from mexit import Bundle; from mexit.runtime.autotune import tune; tune(Bundle.open({bundle!r}))"
    run(python, code, cache)


def compare(python: str, other: Path, repeats: int) -> list[list[object]]:
    """The rows of the comparison with another checkout; starts alternate."""
    sizes, memory, first = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        checkouts = {HERE: Path(folder) / "this", other: Path(folder) / "other"}
        for checkout, bundle in checkouts.items():
            code = f"from pathlib import Path; from start_time import make_bundle; make_bundle(Path({str(bundle)!r}))"
            run(sys.executable, code, folder, checkout, checkout / "benchmarks")
            sizes.append(sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file()) / 2**20)
        for _ in range(WARM_UP + repeats):
            pairs = [(checkout, str(bundle), f"{bundle}-cache") for checkout, bundle in checkouts.items()]
            memory.append([float(run(python, _MEMORY.format(bundle=b), cache, at)) for at, b, cache in pairs])
            starts = [start(python, _STAGES.format(bundle=b), cache, at) for at, b, cache in pairs]
            first.append([1e3 * max(one["stages"].values()) for one in starts])
    rows: list[list[object]] = []
    kinds = (
        ("size of the bundle, MiB", np.array([sizes]), MOST_RATIO),
        ("resident memory, MiB", np.array(memory[WARM_UP:]), MOST_RATIO),
        ("first answer, ms", np.array(first[WARM_UP:]), None),
    )
    for name, values, most in kinds:
        (this, before), ratio = np.median(values, axis=0), float(np.median(values[:, 0] / values[:, 1]))
        met = "" if most is None else f"at most {most}: " + ("met" if ratio <= most else "**missed**")
        rows.append([name, f"{before:.1f}", f"{this:.1f}", f"{ratio:.3f}", met])
    return rows


def spread(values: list[float]) -> str:
    """Median and 95th percentile in milliseconds."""
    p50, p95 = np.quantile(values, [0.5, 0.95]) * 1e3
    return f"{p50:.0f} / {p95:.0f}"


def measure(python: str, repeats: int) -> dict[str, list[dict[str, Any]]]:
    """Start each kind `repeats` times, alternating, after the warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        bundle, tuned, empty = (str(Path(folder) / name) for name in ("start", "tuned", "empty"))
        make_bundle(Path(bundle))
        tune(python, bundle, tuned)
        kinds = {
            "first answer, engines timed before": (_STAGES.format(bundle=bundle), tuned),
            "first answer, nothing timed": (_STAGES.format(bundle=bundle), empty),
            "numpy and onnxruntime imported, no mexit": (_ENGINE.format(), empty),
        }
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in kinds}
        for _ in range(WARM_UP + repeats):
            for name, (code, cache) in kinds.items():
                runs[name].append(start(python, code, cache))
    return {name: starts[WARM_UP:] for name, starts in runs.items()}


def kind_row(name: str, runs: list[dict[str, Any]]) -> list[object]:
    """One line of the first table."""
    wall = [list(run["stages"].values())[-1] for run in runs]
    within = sum(value < TARGET_S for value in wall)
    cpu = spread([run["cpu"] for run in runs])
    return [name, spread(wall), f"{min(wall) * 1e3:.0f}", cpu, f"{within} of {len(wall)}"]


def stage_rows(runs: list[dict[str, Any]]) -> list[list[str]]:
    """Duration of each stage."""
    rows, before = [], [0.0] * len(runs)
    for stage in runs[0]["stages"]:
        at = [run["stages"][stage] for run in runs]
        rows.append([stage, spread([here - there for here, there in zip(at, before, strict=True)])])
        before = at
    return rows


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", nargs="?", default=sys.executable)
    parser.add_argument("--repeats", type=int, default=30, help="starts of each kind")
    parser.add_argument("--other", type=Path, help="another checkout, for the comparison")
    parser.add_argument("--dry", action="store_true", help="print the tables, and write no page")
    arguments = parser.parse_args()
    python = arguments.python
    runs = measure(python, arguments.repeats)
    compared: list[str] = []
    if arguments.other is not None:
        columns = ["", "other", "this", "ratio, median", "target"]
        rows = compare(python, arguments.other.resolve(), arguments.repeats)
        compared = [f"Against the checkout `{arguments.other.name}`:", table(columns, rows)]
    versions = subprocess.run(
        [python, "-c", "import numpy, onnxruntime; print(numpy.__version__, onnxruntime.__version__)"],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    where = "an environment with mexit[cpu] only" if python != sys.executable else "this environment"
    parts = [
        f"`small-cnn` with random weights, one uint8 image, budget full; {where}: numpy {versions[0]}, "
        f"onnxruntime {versions[1]}. {arguments.repeats} starts of each kind, alternating, after "
        f"{WARM_UP} warm-up starts; "
        f"{os.getloadavg()[0]:.1f} busy threads on the machine at "
        "the end. Milliseconds, median / 95th percentile.",
        table(
            ["", "wall", "fastest wall", "processor time", f"within {TARGET_S} s"],
            [kind_row(name, starts) for name, starts in runs.items()],
        ),
        "Stages of the first row, wall, milliseconds:",
        table(["stage", "duration"], stage_rows(next(iter(runs.values())))),
        *compared,
    ]
    if arguments.dry:
        print("\n\n".join(parts))
    else:
        write_page("start_time", "2-core-cpu", "From process start to first answer", parts)


if __name__ == "__main__":
    main()
