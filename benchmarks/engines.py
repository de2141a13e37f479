"""Measure microseconds per image of static and adaptive networks, per engine and batch size.

    MEXIT_DATA=DIR python benchmarks/engines.py RUN|NETWORK... [--seconds N]

A run is a trained network on its own data set. A network (`resnet38`, `resnet50`) has random weights and images of
digits, so its accuracy has no meaning. One thread.

`static` is the network without early exits, as a user would deploy it: one graph that returns the last logits.
The adaptive rows run the segments with thresholds by MSDNet's geometric protocol, from that engine's own scores
on the calibration images. `low` to `full` have the mean cost nearest to the budget there; `equal` is the cheapest
policy that is at least as accurate there as the last exit. Accuracy is that on the test images, with the paired
difference to the static network of the speed-up.

Every path runs the same 64 test images (8 of them on `resnet50`) in batches of that size. A pass is one sample,
and passes alternate. Speed-up is against the fastest static engine of the same class: fp32, bf16 or int8. Processor
time (cpu us) remains comparable when other programs run at the same time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from engine_networks import BenchmarkNetwork, Opened, engines_of
from numpy.typing import NDArray
from page import table, write_page

from mexit.calibrate.geometric import Ranking, geometric
from mexit.core.budget import NAMED_FRACTIONS
from mexit.core.exit_policy import Policy, first_exit
from mexit.runtime.engine import answer
from mexit.runtime.reference import run_all_exits

BATCHES = (1, 8, 64)
CALIBRATION, UNTRAINED, TEST, CHUNK = 1000, 64, 2000, 100  # numbers of images
WARM_UP, MIN_ROUNDS, SECONDS = 1, 3, 20.0
QS = np.geomspace(1e-3, 1e3, 121)
STATIC, EQUAL = "static", "equal"
Logits = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Path:
    """A way to run a batch.

    Attributes:
        engine, precision, name: key of the path.
        run: runs a batch.
        macs: mean cost of an image, MACs.
        correct: whether each test image is classified correctly, (N,); None for a network without training.
    """

    engine: str
    precision: str
    name: str
    run: Callable[[NDArray[np.float32]], Any]
    macs: float
    correct: NDArray[np.bool_] | None


def paths_of(network: BenchmarkNetwork, opened: Opened, costs: tuple[int, NDArray[np.int64]]) -> list[Path]:
    """Return the paths of one engine; `costs` are the MACs of the static network and the cumulative MACs per exit."""
    images, labels = network.some("test", TEST)

    def correct(predicted: NDArray[np.int64]) -> NDArray[np.bool_] | None:
        return predicted == labels if network.trained else None

    static, adaptive = opened.static, opened.adaptive
    predicted = logits_of(static, images)[-1].argmax(axis=1) if network.trained else labels
    paths = [
        Path(opened.engine, static.precision, STATIC, lambda part: run_all_exits(static, part), costs[0],
              correct(predicted))
    ]  # fmt: skip
    if adaptive is None:
        return paths
    for name, policy, macs in policies_of(network, adaptive, costs[1]):
        if network.trained:
            predicted = predict(policy, logits_of(adaptive, images))
        paths.append(
            Path(opened.engine, adaptive.precision, name,
                  lambda part, policy=policy: answer(adaptive, part, policy, len(network.data.classes)), macs,
                  correct(predicted))
        )  # fmt: skip
    return paths


def policies_of(network: BenchmarkNetwork, backend: Any, costs: NDArray[np.int64]) -> list[tuple[str, Policy, float]]:
    """Select policies for the named budgets and the `equal` policy; returns name, policy and mean MACs of each."""
    images, labels = network.some("calibration", CALIBRATION if network.trained else UNTRAINED)
    logits = logits_of(backend, images)
    no_thresholds = Policy("max-probability", False, (1.0,) * len(costs), (None,) * (len(costs) - 1))
    scores, predicted = no_thresholds.scorer(logits.shape[-1]).answer(logits)
    candidates = [geometric(Ranking.of(scores), q) for q in QS]
    exits = [first_exit(scores, one) for one in candidates]
    means = np.array([costs[one - 1].mean() for one in exits])
    selected = {
        name: int(np.abs(means - (costs[0] + share * (costs[-1] - costs[0]))).argmin())
        for name, share in NAMED_FRACTIONS.items()
    }
    if network.trained:
        rows = np.arange(len(labels))
        accuracies = np.array([(predicted[one - 1, rows] == labels).mean() for one in exits])
        good = np.flatnonzero(accuracies >= (predicted[-1] == labels).mean())
        if len(good):
            selected[EQUAL] = int(good[means[good].argmin()])
    return [
        (name, Policy("max-probability", False, no_thresholds.temperatures, candidates[i]), float(means[i]))
        for name, i in selected.items()
    ]


def logits_of(backend: Any, images: NDArray[np.float32]) -> Logits:
    """Logits of every exit, (E, N, C)."""
    chunks = [run_all_exits(backend, images[first : first + CHUNK]) for first in range(0, len(images), CHUNK)]
    return np.concatenate(chunks, axis=1)


def predict(policy: Policy, logits: Logits) -> NDArray[np.int64]:
    """The class that a policy predicts for each sample, (N,)."""
    scores, predicted = policy.scorer(logits.shape[-1]).answer(logits)
    return predicted[first_exit(scores, policy.thresholds) - 1, np.arange(logits.shape[1])]


def time_paths(paths: Sequence[Path], images: NDArray[np.float32], batch: int, seconds: float) -> NDArray[np.float64]:
    """Microseconds per image of wall time and of processor time, (rounds, 2, paths)."""
    rounds: list[list[list[float]]] = []
    begin = time.perf_counter()
    while len(rounds) < WARM_UP + MIN_ROUNDS or time.perf_counter() - begin < seconds:
        spent = [[0.0] * len(paths), [0.0] * len(paths)]
        for i in np.roll(range(len(paths)), -len(rounds)):
            start, start_cpu = time.perf_counter(), time.process_time()
            for first in range(0, len(images), batch):
                paths[i].run(images[first : first + batch])
            spent[0][i] = (time.perf_counter() - start) / len(images) * 1e6
            spent[1][i] = (time.process_time() - start_cpu) / len(images) * 1e6
        rounds.append(spent)
    return np.array(rounds[WARM_UP:])


def rows_of(paths: Sequence[Path], times: NDArray[np.float64]) -> list[list[str]]:
    """The rows of one network and batch."""
    middle, processor = np.median(times, axis=0)
    quarters = np.quantile(times[:, 0], [0.25, 0.75], axis=0)
    rows = []
    for i, path in enumerate(paths):
        rivals = [one for one, other in enumerate(paths) if (other.precision, other.name) == (path.precision, STATIC)]
        best = min(rivals, key=lambda one: middle[one])
        spread = f"{quarters[0, i]:.0f} to {quarters[1, i]:.0f}"
        speed_up, fewer_macs = middle[best] / middle[i], paths[best].macs / path.macs
        rows.append([
            path.engine, path.name, f"{middle[i]:.0f}", spread, f"{processor[i]:.0f}",
            f"{speed_up:.2f}", f"{fewer_macs:.2f}", paths[best].engine, *accuracy(path, paths[best]),
        ])  # fmt: skip
    return rows


def accuracy(path: Path, static: Path) -> list[str]:
    """Accuracy, and its gain over the static network in points, with the standard error of the paired difference."""
    if path.correct is None or static.correct is None:
        return ["", ""]
    gain = 100 * (path.correct.astype(float) - static.correct)
    error = gain.std(ddof=1) / np.sqrt(len(gain))
    return [f"{path.correct.mean():.2%}", f"{gain.mean():+.2f} ({error:.2f})"]


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+", metavar="RUN|NETWORK")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="duration of each network and batch")
    parser.add_argument(
        "--compiled", action="store_true", help="also time torch.compile, which takes minutes on deep networks"
    )
    parser.add_argument("--page", default="engines", help="name of the page")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    parts, missing = [], []
    for one in arguments.networks:
        network = BenchmarkNetwork.of(one)
        opened, costs, failed = engines_of(network, arguments.compiled)
        missing += failed
        paths = [path for each in opened for path in paths_of(network, each, costs)]
        images, _ = network.some("test", network.timed)
        for batch in (one for one in BATCHES if one <= network.timed):
            times = time_paths(paths, images, batch, arguments.seconds)
            parts.append(f"## {network.name}, batch {batch}\n\n{len(times)} rounds.")
            columns = [
                "engine",
                "path",
                "us per image",
                "quartiles",
                "cpu us",
                "speed-up",
                "MAC ratio",
                "against static",
                "accuracy",
                "gain, points",
            ]
            parts.append(table(columns, rows_of(paths, times)))
            print(parts[-2], parts[-1], sep="\n", flush=True)
    notes = [str(__doc__).split("\n\n", 2)[2].strip()]
    if not arguments.compiled:
        notes.append("torch.compile was not measured.")
    write_page(arguments.page, "2-core-cpu", "Engines and early exit", [*notes, *missing, *parts])


if __name__ == "__main__":
    main()
