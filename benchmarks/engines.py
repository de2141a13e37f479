"""Engines and early exit together: microseconds an image, static and adaptive, per engine and batch.

    MEXIT_DATA=DIR python benchmarks/engines.py RUN|NETWORK... [--seconds N]

A run is a trained network on its own data set. A network (`resnet38`, `resnet50`) has random weights, sees digits
images and says nothing about accuracy. One thread.

`static` is the network without its other exits, as its users would deploy it: one graph, the last logits alone.
The adaptive rows run the segments with thresholds by MSDNet's geometric protocol, from that engine's own scores
on the calibration images: `low` to `full` are those whose mean cost there is nearest to the budget, `equal` the
cheapest ones that are right as often there as the last exit. Accuracy is that on the test images, with the paired
difference to the static network that the speed-up is against.

Every path answers the same 64 test images (8 of them on `resnet50`) in batches of that size; a pass is one sample,
passes take turns. Speed-up is against the fastest static engine of the same class: fp32, bf16 or int8. Processor
time (cpu us) is what remains comparable where other programs run beside it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from engine_subjects import BenchmarkNetwork, Opened, engines_of
from numpy.typing import NDArray
from page import table, write_page

from mexit.calibrate.geometric import Ranking, geometric
from mexit.core.budget import NAMED_FRACTIONS
from mexit.core.policy import Policy, first_exit
from mexit.runtime.engine import answer
from mexit.runtime.reference import run_all_exits

BATCHES = (1, 8, 64)
CALIBRATION, UNTRAINED, JUDGED, CHUNK = 1000, 64, 2000, 100  # images
WARM_UP, MIN_ROUNDS, SECONDS = 1, 3, 20.0
QS = np.geomspace(1e-3, 1e3, 121)
STATIC, EQUAL = "static", "equal"
Logits = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Route:
    """One way to answer images.

    Attributes:
        engine, precision, name: the path.
        run: answers a batch.
        macs: the mean cost of an image.
        right: which of the judged test images it answers rightly; None where that says nothing.
    """

    engine: str
    precision: str
    name: str
    run: Callable[[NDArray[np.float32]], Any]
    macs: float
    right: NDArray[np.bool_] | None


def routes_of(subject: BenchmarkNetwork, opened: Opened, costs: tuple[int, NDArray[np.int64]]) -> list[Route]:
    """Every path in one engine; `costs` are the static network's, and the cumulative ones of the exits."""
    judged, labels = subject.some("test", JUDGED)

    def right(predicted: NDArray[np.int64]) -> NDArray[np.bool_] | None:
        return predicted == labels if subject.trained else None

    static, cut = opened.static, opened.adaptive
    predicted = logits_of(static, judged)[-1].argmax(axis=1) if subject.trained else labels
    found = [
        Route(opened.engine, static.precision, STATIC, lambda part: run_all_exits(static, part), costs[0],
              right(predicted))
    ]  # fmt: skip
    if cut is None:
        return found
    for name, policy, macs in policies_of(subject, cut, costs[1]):
        if subject.trained:
            predicted = predict(policy, logits_of(cut, judged))
        found.append(
            Route(opened.engine, cut.precision, name,
                  lambda part, policy=policy: answer(cut, part, policy, len(subject.data.classes)), macs,
                  right(predicted))
        )  # fmt: skip
    return found


def policies_of(subject: BenchmarkNetwork, cut: Any, costs: NDArray[np.int64]) -> list[tuple[str, Policy, float]]:
    """By name: thresholds for the named budgets, and the cheapest that are right as often as the last exit."""
    images, labels = subject.some("calibration", CALIBRATION if subject.trained else UNTRAINED)
    logits = logits_of(cut, images)
    bare = Policy("max-probability", False, (1.0,) * len(costs), (None,) * (len(costs) - 1))
    scores, predicted = bare.scorer(logits.shape[-1]).answer(logits)
    candidates = [geometric(Ranking.of(scores), q) for q in QS]
    exits = [first_exit(scores, one) for one in candidates]
    means = np.array([costs[one - 1].mean() for one in exits])
    chosen = {
        name: int(np.abs(means - (costs[0] + share * (costs[-1] - costs[0]))).argmin())
        for name, share in NAMED_FRACTIONS.items()
    }
    if subject.trained:
        rows = np.arange(len(labels))
        right = np.array([(predicted[one - 1, rows] == labels).mean() for one in exits])
        good = np.flatnonzero(right >= (predicted[-1] == labels).mean())
        if len(good):
            chosen[EQUAL] = int(good[means[good].argmin()])
    return [
        (name, Policy("max-probability", False, bare.temperatures, candidates[place]), float(means[place]))
        for name, place in chosen.items()
    ]


def logits_of(backend: Any, images: NDArray[np.float32]) -> Logits:
    """(E, N, C), a chunk at a time."""
    chunks = [run_all_exits(backend, images[first : first + CHUNK]) for first in range(0, len(images), CHUNK)]
    return np.concatenate(chunks, axis=1)


def predict(policy: Policy, logits: Logits) -> NDArray[np.int64]:
    """What a policy answers, (N,)."""
    scores, predicted = policy.scorer(logits.shape[-1]).answer(logits)
    return predicted[first_exit(scores, policy.thresholds) - 1, np.arange(logits.shape[1])]


def take_turns(
    paths: Sequence[Route], images: NDArray[np.float32], batch: int, seconds: float
) -> NDArray[np.float64]:
    """Microseconds an image by the clock and of this process's processor time, (rounds, 2, paths)."""
    rounds: list[list[list[float]]] = []
    begin = time.perf_counter()
    while len(rounds) < WARM_UP + MIN_ROUNDS or time.perf_counter() - begin < seconds:
        spent = [[0.0] * len(paths), [0.0] * len(paths)]
        for place in np.roll(range(len(paths)), -len(rounds)):
            start, start_cpu = time.perf_counter(), time.process_time()
            for first in range(0, len(images), batch):
                paths[place].run(images[first : first + batch])
            spent[0][place] = (time.perf_counter() - start) / len(images) * 1e6
            spent[1][place] = (time.process_time() - start_cpu) / len(images) * 1e6
        rounds.append(spent)
    return np.array(rounds[WARM_UP:])


def rows_of(paths: Sequence[Route], times: NDArray[np.float64]) -> list[list[str]]:
    """The rows of one network and batch."""
    middle, processor = np.median(times, axis=0)
    quarters = np.quantile(times[:, 0], [0.25, 0.75], axis=0)
    rows = []
    for place, path in enumerate(paths):
        rivals = [
            one for one, other in enumerate(paths) if (other.precision, other.name) == (path.precision, STATIC)
        ]
        best = min(rivals, key=lambda one: middle[one])
        spread = f"{quarters[0, place]:.0f} to {quarters[1, place]:.0f}"
        speed_up, fewer_macs = middle[best] / middle[place], paths[best].macs / path.macs
        rows.append([
            path.engine, path.name, f"{middle[place]:.0f}", spread, f"{processor[place]:.0f}",
            f"{speed_up:.2f}", f"{fewer_macs:.2f}", paths[best].engine, *accuracy(path, paths[best]),
        ])  # fmt: skip
    return rows


def accuracy(path: Route, static: Route) -> list[str]:
    """Percent right, and points more than the static network, with the standard error of the paired difference."""
    if path.right is None or static.right is None:
        return ["", ""]
    gain = 100 * (path.right.astype(float) - static.right)
    error = gain.std(ddof=1) / np.sqrt(len(gain))
    return [f"{path.right.mean():.2%}", f"{gain.mean():+.2f} ({error:.2f})"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("subjects", nargs="+", metavar="RUN|NETWORK")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each subject and batch")
    parser.add_argument(
        "--compiled", action="store_true", help="torch.compile too; takes minutes on deep networks"
    )
    parser.add_argument("--page", default="engines", help="its name")
    given = parser.parse_args()
    torch.set_num_threads(1)
    parts, missing = [], []
    for one in given.subjects:
        subject = BenchmarkNetwork.of(one)
        opened, costs, failed = engines_of(subject, given.compiled)
        missing += failed
        paths = [route for each in opened for route in routes_of(subject, each, costs)]
        images, _ = subject.some("test", subject.timed)
        for batch in (one for one in BATCHES if one <= subject.timed):
            times = take_turns(paths, images, batch, given.seconds)
            parts.append(f"## {subject.name}, batch {batch}\n\n{len(times)} rounds.")
            columns = [
                "engine",
                "path",
                "us an image",
                "quartiles",
                "cpu us",
                "speed-up",
                "MAC ratio",
                "against static",
                "right",
                "points more",
            ]
            parts.append(table(columns, rows_of(paths, times)))
            print(parts[-2], parts[-1], sep="\n", flush=True)
    said = [str(__doc__).split("\n\n", 2)[2].strip()]
    if not given.compiled:
        said.append("torch.compile is left out.")
    write_page(given.page, "2-core-cpu", "Engines and early exit", [*said, *missing, *parts])


if __name__ == "__main__":
    main()
