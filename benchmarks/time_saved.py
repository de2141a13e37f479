"""Measure on one machine whether early exit saves time: every budget against the static network and its rivals.

    python benchmarks/time_saved.py [NETWORK...] [--prepare] [--data DIR] [--folder runs/time-saved]
    python benchmarks/time_saved.py --overhead

For each network: trains it (`time_saved_networks.RECIPES`), exports the bundle with the exits that save time here,
calibrates every engine, and compares. A stopped run goes on: trainings resume, and each measurement is made once and
stored in `results/time_saved/`. `--prepare` stops before the export: everything after it needs a quiet machine.
`--overhead` measures and prints one row only: what `Runtime` adds to a bare session. It needs no trained network.

*static*: the network with its last exit only, in one graph, which the budget `full` runs. The other budgets have the
thresholds that `mexit serve` uses on this machine. All ways of a comparison run the same prepared test images, in turns
of 20 calls in random order; budgets and static network go through the same call of `Runtime`. A share of the static
network's time is the mean over rounds, with half its 95 % interval. Budgets with one policy share a row.
*points*: change of the accuracy against the static network in the same engine, paired, with its standard error, on
test images, which chose nothing; *expected points* are those on certification images.
*from pictures to a calibrated bundle*, *logistic regression*: see `frozen_network.py`.
*cut at an exit*: the same weights, ending at that exit, without the other heads, as a static network.
*the fastest of each kind*: the static network, the budget and the cut network, each in its fastest engine, in one
comparison; the budget is expected to lose at most half a point, and the cut network to be at least as accurate as it.
earlyon, if it is installed, has the same weights and places; it trains its own heads and thresholds for a loss of at
most half a point, and runs in torch. It imports torchvision, whose compiled operators are left out where the installed
torch is of another release; no network here uses them.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from earlyon_network import INSTALLED, open_network
from page import ROOT, write_page
from time_saved_cases import ROUNDS, Part, measure, overhead_alone
from time_saved_networks import MINIATURE, RECIPES, PageNetwork
from time_saved_tables import overhead_verdict, sections, verdicts
from training_runs import hardware_name, machine_name

from mexit.errors import MexitError

RESULTS = ROOT / "benchmarks" / "results" / "time_saved"
PROTOCOL_S, OTHER_S = 40.0, 6.0
OVERHEAD_NETWORKS = ("small-cnn", "digits-cnn")


def main(typed: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(RECIPES)}; default all")
    parser.add_argument("--prepare", action="store_true", help="train, and record what needs no quiet machine")
    parser.add_argument("--overhead", action="store_true", help="only the overhead of `Runtime`, of random weights")
    parser.add_argument("--data", type=Path, default=os.environ.get("MEXIT_DATA"), help="folder of the data sets")
    parser.add_argument("--folder", type=Path, default=Path("runs/time-saved"), help="of runs and bundles")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the measured values")
    parser.add_argument("--seconds", type=float, default=PROTOCOL_S, help="a comparison with one image and one thread")
    parser.add_argument("--other-seconds", type=float, default=OTHER_S, help="every other comparison")
    parser.add_argument("--threads", type=int, help="of training; default all cores")
    parser.add_argument("--miniature", action="store_true", help="rehearse with tiny networks, and write no page")
    arguments = parser.parse_args(typed)
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    if arguments.overhead:
        rows = {name: overhead_alone(name, arguments.seconds) for name in OVERHEAD_NETWORKS}
        print(overhead_verdict(rows))
        return
    recipes = MINIATURE if arguments.miniature else RECIPES
    names = arguments.networks or list(recipes)
    if unknown := set(names) - set(recipes):
        parser.error(f"unknown network '{min(unknown)}': choose from {', '.join(recipes)}")
    os.environ.setdefault("MEXIT_CACHE", str(arguments.folder.absolute() / "device-cache"))
    load, parts, missing = os.getloadavg()[0], {}, []
    hardware = hardware_name({machine_name("cpu")})
    for name in names:
        network = PageNetwork(name, recipes[name], arguments.folder, arguments.data, arguments.threads)
        part = Part(arguments.results / f"{name}_{hardware}.json")
        try:
            network.prepare()
            if arguments.prepare and network.bundle.exists() and INSTALLED:
                open_network(network)
            if not arguments.prepare:
                network.export()
                measure(network, part, arguments.seconds, arguments.other_seconds)
                parts[name] = part.values
        except MexitError as error:
            missing.append(f"{name}: {error}")
            print(missing[-1], flush=True)
    if parts:
        page(hardware, parts, missing, load, write=not arguments.miniature)


def page(hardware: str, parts: dict[str, Any], missing: Sequence[str], load: float, *, write: bool) -> None:
    """Write the page, or print it."""
    texts = [
        (__doc__ or "").split("\n\n", 3)[3].strip(),
        f"{ROUNDS} rounds of up to 1,000 calls of each way. Load average of the machine before: {load:.1f}.",
        *(f"Not measured: {one}" for one in missing),
        *verdicts(parts),
        *(text for name, values in parts.items() for text in sections(name, values)),
    ]
    if write:
        write_page("time_saved", hardware, "Time saved by early exit", texts)
    else:
        print("\n\n".join(texts))


if __name__ == "__main__":
    main()
