"""Run one item of the run-book in a process of its own.

    python benchmarks/gpu/work.py ITEM --state DIR --data DIR --seconds S [--miniature]

`run.py` starts this program. It exits with 0 when the item is done, with 75 when it must be continued, and else with
an error whose reason is at the end of its output. It ends when its standard input closes: then `run.py` is gone.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: two items may share the processor
sys.path.insert(0, str(Path(__file__).parents[1]))  # the other benchmark programs

import checks
import claims
import torch
import training
from context import Context
from items import Item, find, miniature

from mexit.core.progress import StopSignal

CONTINUE = 75  # EX_TEMPFAIL
KINDS: dict[str, Callable[[Item, Context], bool]] = {
    "tests": checks.gpu_tests,
    "equality": checks.graphs_equal,
    "timing": checks.timing,
    "train": training.train,
    "autoattack": training.autoattack,
    "claims": claims.claims,
}  # each returns whether the item is done


def main() -> None:
    """Run the item."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("item")
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--miniature", action="store_true")
    arguments = parser.parse_args()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    item = find(arguments.item)
    item = miniature(item) if arguments.miniature else item
    deadline = time.monotonic() + arguments.seconds
    data_dir = arguments.data.resolve()
    os.environ["MEXIT_DATA"] = str(data_dir)
    arguments.state.mkdir(parents=True, exist_ok=True)
    os.chdir(arguments.state)
    with StopSignal() as stop:
        context = Context(data_dir, arguments.miniature, deadline, lambda: stop.requested)
        with (context.folder(item.name) / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the process of a killed `run.py` may not have ended yet
            context.write(item.name, "where.json", _where())
            done = KINDS[item.kind](item, context)
    sys.exit(0 if done else CONTINUE)


def _where() -> dict[str, str]:
    """The card and the versions."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"card": card, "torch": torch.__version__, "python": platform.python_version()}


def _end_with_parent() -> None:
    while os.read(0, 1):  # not sys.stdin, whose lock would stop the interpreter from ending
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
