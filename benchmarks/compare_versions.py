"""Compare latency, start-up and training speed of this checkout with those of another checkout of mexit.

    git worktree add /tmp/old v0.1.0
    python benchmarks/compare_versions.py /tmp/old BUNDLE... [--rounds 15]

Each checkout runs in its own process. The processes alternate, so that other programs slow both. Latency: the median
of a round of calls of `Runtime.answer_tensor` on prepared tensors and of `Runtime(...)` on uint8 images, at the
budgets `low` and `full`. Start-up: from starting Python to the first answer. Training: processor time of one epoch
of `digits-cnn` on digits, data preparation included. A figure is the ratio this/other of one round; the table gives
the median ratio and a 95 % interval of the median (order statistics).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

HERE = Path(__file__).parents[1]
BATCHES = (1, 8, 64)
BUDGETS = ("low", "full")
CALLS = {1: 200, 8: 60, 64: 15}
LIMIT = 1.03


def latency_cases(bundles: list[str]) -> dict[str, Callable[[], float]]:
    """Named measurements of one round each, in seconds per call."""
    from mexit import Runtime

    cases: dict[str, Callable[[], float]] = {}
    for path in bundles:
        for budget in BUDGETS:
            runtime = Runtime.open(path, budget=budget, backend="ort", threads=1)
            shape = runtime.bundle.manifest.input.shape
            for batch in BATCHES:
                rng = np.random.default_rng(0)
                tensor = rng.random((batch, *shape)).astype(np.float32)
                picture = shape[1:] if shape[0] == 1 else (*shape[1:], shape[0])
                pictures = [rng.integers(0, 256, picture).astype(np.uint8) for _ in range(batch)]
                name = f"{Path(path).name}, {budget}, batch {batch}"
                cases[f"prepared tensors: {name}"] = _median_of(runtime.answer_tensor, tensor, CALLS[batch])
                cases[f"pictures: {name}"] = _median_of(runtime, pictures, CALLS[batch])
    return cases


def _median_of(call: Callable[[object], object], argument: object, calls: int) -> Callable[[], float]:
    def measure() -> float:
        times = []
        for _ in range(calls):
            begin = time.perf_counter()
            call(argument)
            times.append(time.perf_counter() - begin)
        return float(np.median(times))

    return measure


def training_case() -> float:
    """Processor seconds of one epoch of the demo's network with NEO-KD."""
    settings = {"data": "digits", "model": "digits-cnn", "method": "neo-kd", "epochs": 1}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        try:
            from mexit.flows.train import TrainOptions, train_model
        except ImportError:  # version 0.1.0
            from mexit.flows.train import train

            imported_s = time.process_time()
            train(given=settings, out=out, threads=1)
        else:
            imported_s = time.process_time()
            train_model(settings=settings, out=out, options=TrainOptions(threads=1))
        return time.process_time() - imported_s


def work(bundles: list[str]) -> None:
    """Run the case named by each line of standard input, and print its seconds. Runs in its own process."""
    cases = latency_cases(bundles)
    print(json.dumps(list(cases)), flush=True)
    for line in sys.stdin:
        print(cases[line.rstrip("\n")](), flush=True)


class Checkout:
    """A checkout and its worker process."""

    def __init__(self, folder: Path, bundles: list[str]) -> None:
        threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        self.folder, self.environment = folder, {**os.environ, **threads, "PYTHONPATH": str(folder)}
        self.worker = self._python(__file__, "--work", *bundles)
        assert self.worker.stdout is not None
        self.names = json.loads(self.worker.stdout.readline())

    def measure(self, name: str) -> float:
        """One round of a latency case."""
        assert self.worker.stdin is not None
        assert self.worker.stdout is not None
        self.worker.stdin.write(f"{name}\n")
        self.worker.stdin.flush()
        return float(self.worker.stdout.readline())

    def start_up(self, bundle: str) -> float:
        """Seconds from starting Python to the first answer."""
        code = (
            "import sys, numpy as np; from mexit import Runtime;"
            "r = Runtime.open(sys.argv[1], backend='ort', threads=1);"
            "r.answer_tensor(np.zeros((1, *r.bundle.manifest.input.shape), np.float32))"
        )
        begin = time.perf_counter()
        self._python("-c", code, bundle).wait()
        return time.perf_counter() - begin

    def training(self) -> float:
        """Processor seconds of an epoch."""
        return float(self._python(__file__, "--train").communicate()[0])

    def _python(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self.environment,
            cwd=self.folder,  # which `python -c` searches first
        )  # fmt: skip


def interval(ratios: np.ndarray) -> tuple[float, float, float]:
    """Return the median and its distribution-free 95 % interval (order statistics)."""
    ordered = np.sort(ratios)
    half = 0.98 * np.sqrt(len(ordered))
    low = max(0, int(np.floor(len(ordered) / 2 - half)))
    high = min(len(ordered) - 1, int(np.ceil(len(ordered) / 2 + half)))
    return float(np.median(ordered)), float(ordered[low]), float(ordered[high])


def row(name: str, pairs: list[tuple[float, float]]) -> list[object]:
    """Return a row of the table; `pairs` are seconds of this checkout and of the other one."""
    seconds = np.array(pairs)
    ratio, low, high = interval(seconds[:, 0] / seconds[:, 1])
    this, other = np.median(seconds, axis=0) * 1e3
    met = "yes" if ratio <= LIMIT else "within noise" if low <= LIMIT else "no"
    return [name, f"{other:.3f}", f"{this:.3f}", f"{ratio:.3f} ({low:.3f} to {high:.3f})", len(pairs), met]


def main() -> None:
    """Measure all cases and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path)
    parser.add_argument("bundles", nargs="+")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    bundles = [str(Path(bundle).resolve()) for bundle in arguments.bundles]
    here, other = Checkout(HERE, bundles), Checkout(arguments.other.resolve(), bundles)
    rows = []
    for name in here.names:
        here.measure(name), other.measure(name)
        rows.append(row(name, [(here.measure(name), other.measure(name)) for _ in range(arguments.rounds)]))
    here.start_up(bundles[0]), other.start_up(bundles[0])
    rows.append(
        row("start-up", [(here.start_up(bundles[0]), other.start_up(bundles[0])) for _ in range(arguments.rounds)])
    )
    pairs = [(here.training(), other.training()) for _ in range(max(5, arguments.rounds // 3))]
    rows.append(row("training, one epoch", pairs))
    from page import table, write_page

    commit = subprocess.run(
        ["git", "-C", str(arguments.other), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    write_page(
        "compare_versions",
        f"{len(os.sched_getaffinity(0))}-core-cpu",
        f"This version against commit {commit}",
        [
            f"Target: at most {LIMIT:g} of the other commit's time.",
            table(["case", "other ms", "this ms", "ratio (95 % interval)", "rounds", "met"], rows),
        ],
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2:])
    elif sys.argv[1:2] == ["--train"]:
        print(training_case())
    else:
        main()
