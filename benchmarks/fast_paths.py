"""Measure what each fast path saves: the same work with the path and without it, alternating.

    python benchmarks/fast_paths.py BUNDLE... [--networks small-cnn resnet38 msdnet-cifar10] [--rounds 8]

One image: `Runtime.answer_tensor` answers one test image per call, by the path for one image (bound buffers, scores in
plain floats) and by the path for batches. Training: one step of `adversarial` (PGD-7 average, 128 images, bfloat16
on the CPU, one thread) with all fast paths, without the fused copy for attacks, and without contiguous gradients
behind concatenations. mexit keeps a path only if it saves at least 10 % in some row. Times are processor times of
the thread or process.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mexit import Runtime

NETWORKS = ("small-cnn", "resnet38", "msdnet-cifar10")
KINDS = ("all fast paths", "without the fused copy", "without contiguous gradients")
BUDGETS = ("low", "medium", "full")
IMAGES = 60


def one_image_rows(path: str, rounds: int) -> list[list[object]]:
    """Return one row per budget, with the microseconds of both paths."""
    from mexit import Runtime
    from mexit.data import registry
    from mexit.data.splits import Splits
    from mexit.runtime import engine

    runtime = Runtime.open(path, "full", backend="ort", threads=1)
    splits = Splits.of_bundle(runtime.bundle)
    images = registry.load(splits.data_set).batch(splits.part("test")[:IMAGES], runtime.bundle.manifest.input)
    paths = {"one": engine._answer_one, "rows": engine._answer_rows}
    rows = []
    for budget in BUDGETS:
        times: dict[str, list[list[int]]] = {name: [] for name in paths}
        for _ in range(rounds + 1):
            for name, path_for_one in paths.items():
                engine._answer_one = path_for_one
                times[name].append(_times(runtime, images, budget))
        engine._answer_one = paths["one"]
        one, batch = (np.median(np.array(times[name][1:]), axis=1) / 1e3 for name in paths)
        ratios = batch / one
        rows.append(
            [
                Path(path).name, budget, f"{np.median(one):.0f} us", f"{np.median(batch):.0f} us",
                f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})",
            ]
        )  # fmt: skip
    return rows


def _times(runtime: Runtime, images: np.ndarray, budget: str) -> list[int]:
    """Nanoseconds of the call for each image."""
    times = []
    for row in range(len(images)):
        begin = time.thread_time_ns()
        runtime.answer_tensor(images[row : row + 1], budget=budget)
        times.append(time.thread_time_ns() - begin)
    return times


def serve_training(kind: str, network: str) -> None:
    """Run one training step per line of standard input, and print its processor seconds. Runs in its own process."""
    import torch
    from training_speed import mexit_step

    from mexit.train import fused_eval_copy, precision

    torch.set_num_threads(1)
    if kind == "without the fused copy":
        precision.Precision.attack_copy = lambda *_: None
    if kind == "without contiguous gradients":
        precision.make_gradients_contiguous = fused_eval_copy.make_gradients_contiguous = lambda *_: None
    step = mexit_step(network, "average")
    for _ in sys.stdin:
        begin = time.process_time()
        step()
        print(time.process_time() - begin, flush=True)


def training_rows(network: str, rounds: int) -> list[list[object]]:
    """Return one row per kind of step."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    kinds = KINDS if network.startswith("msdnet") else KINDS[:2]
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, "--serve", kind, network],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )
        for kind in kinds
    ]  # fmt: skip
    seconds = []
    for _ in range(rounds + 1):  # the first round warms up
        for worker in workers:
            worker.stdin.write("\n")
            worker.stdin.flush()
            seconds.append(float(worker.stdout.readline()))
    for worker in workers:
        worker.communicate()
    table = np.array(seconds).reshape(rounds + 1, len(kinds))[1:]
    ratios = table / table[:, :1]
    return [
        [
            network, kind, f"{np.median(table[:, k]):.3f} s",
            f"{np.median(ratios[:, k]):.2f} ({ratios[:, k].min():.2f} to {ratios[:, k].max():.2f})",
        ]
        for k, kind in enumerate(kinds)
    ]  # fmt: skip


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="*")
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--serve", nargs=2, metavar=("KIND", "NETWORK"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve_training(*arguments.serve)
        return
    from page import table, write_page

    one = [row for path in arguments.bundles for row in one_image_rows(path, arguments.rounds)]
    training = [row for network in arguments.networks for row in training_rows(network, arguments.rounds)]
    write_page(
        "fast_paths",
        f"{len(os.sched_getaffinity(0))}-core-cpu",
        "What the fast paths save",
        [
            f"Median of {arguments.rounds} rounds; a ratio is that of one round, with the extremes.",
            table(["bundle", "budget", "one-image path", "batch path", "batch path / one-image path"], one),
            table(["network", "training step", "time", "time / all fast paths"], training),
        ],
    )


if __name__ == "__main__":
    main()
