"""Network, size and augmentation of `mexit train --data folder:PATH`, each at the same number of multiply-adds.

Every candidate trains for as many epochs as the MACs of its steps allow. It is judged on the selection, calibration and
certification splits of the training part, whose groups it was not trained on. The test part is not read.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from page import table, write_page
from training_runs import hardware_name, machine_name, train_or_resume

from mexit.calibrate.clusters import mean_with_error
from mexit.data import registry
from mexit.flows.train import TrainOptions
from mexit.models.exit_costs import exit_costs
from mexit.train import checkpoint
from mexit.train.config import resolve
from mexit.train.picture_defaults import training_macs
from mexit.train.validation import attacked_batches, correct_predictions, exit_logits

HELD_OUT = ("selection", "calibration", "certification")
CANDIDATES = {
    f"{model} {side} {augment}": {"model": model, "size": (side, side), "channels": 3, "augment": augment}
    for model, side, augment in (
        ("wide-cnn-20m", 32, "photo"),
        ("wide-cnn-20m", 48, "photo"),
        ("wide-cnn-40m", 32, "photo"),
        ("wide-cnn-40m", 48, "photo"),
        ("wide-cnn", 32, "photo"),
        ("wide-cnn-20m", 48, "shift"),
        ("wide-cnn-20m", 48, "none"),
    )
}


def main() -> None:
    """Train the candidates that are not finished, and write the page of those that are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder:PATH, colour pictures")
    parser.add_argument("--macs", type=float, default=12e12, help="MACs of the steps of each candidate")
    parser.add_argument("--images", type=int, required=True, help="training images of the data set")
    parser.add_argument("--only", nargs="*", type=int, help="numbers of the candidates, from 0; default all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs/folder_defaults"))
    arguments = parser.parse_args()
    rows = []
    for number, (name, given) in enumerate(CANDIDATES.items()):
        run = arguments.runs / f"{name.replace(' ', '-')}-{arguments.macs:.0e}"
        settings = resolve(arguments.data, None, given)
        epochs = max(1, round(arguments.macs / training_macs(settings, 10) / arguments.images))
        if arguments.only is None or number in arguments.only:
            start_s = time.process_time()
            options = TrainOptions(threads=arguments.threads)
            train_or_resume(run, arguments.data, "pictures", {**given, "epochs": epochs}, options)
            print(f"{name}: {time.process_time() - start_s:.0f} s of processor time in this call", flush=True)
        if (run / checkpoint.WEIGHTS).exists():
            rows.append(_row(name, run, arguments.data))
    if rows:
        columns = ["network, pixels, augmentation", "M MACs", "epochs", "exit 1", "exit 2", "exit 3", "pictures"]
        parts = [
            f"Each candidate trains for {arguments.macs / 1e12:g} T multiply-adds of its steps on {arguments.data}, by "
            "the preset `pictures`. Percent correct of each exit on pictures of the training part whose groups it was "
            "not trained on, with the standard error over groups.",
            table(columns, rows),
        ]
        write_page("folder_defaults", hardware_name([machine_name("cpu")]), "Defaults for folders of pictures", parts)


def _row(name: str, run: Path, data_name: str) -> list[str]:
    """Accuracy of every exit on the held-out splits of a finished run."""
    model, settings, splits = checkpoint.load_model(run)
    data = registry.load(data_name)
    index = np.concatenate([splits.part(part) for part in HELD_OUT])
    batches = attacked_batches(model, data, index, settings.model_spec().input, None)
    correct = correct_predictions(exit_logits(model, batches), data.labels[index])
    groups = None if splits.groups is None else splits.groups[index]
    accuracies = []
    for exit_correct in correct:
        found = mean_with_error(exit_correct.astype(np.float64), groups)
        accuracies.append(f"{100 * found.value:.1f} ({100 * found.stderr:.1f})")
    return [name, f"{exit_costs(model)[-1].macs / 1e6:.1f}", str(settings.epochs), *accuracies, str(len(index))]


if __name__ == "__main__":
    main()
