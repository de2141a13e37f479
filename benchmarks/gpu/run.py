"""Run the next items of the GPU run-book that fit into the given minutes.

    PYTHONPATH=. python benchmarks/gpu/run.py --minutes 9 --data DIR --state DIR --results DIR

README.md describes the run-book. Every item runs in a process of its own with its own log, so one that fails does not
end the program. The state file is replaced after every change: killed at any time, the program loses no finished item,
and the next call continues the one that was interrupted.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import data_parts
import results
from context import ROOT, ZOO
from items import QUEUE, Item, miniature
from miniature import write_data
from state import FAILED, FILE, UNFINISHED, Record, State

from mexit.core.atomic_io import new_directory, read_json, sha256_bytes, sha256_file, write_bytes
from mexit.data.cifar import LAYOUTS
from mexit.errors import MexitError

WORK = Path(__file__).with_name("work.py")
CONTINUE = 75
COLLECT_S = 20.0  # reserve at the end of a session, for the results
GRACE_S = 12.0  # an item that has not stopped by then is killed
POLL_S = 0.05
ERROR_LINES = 15
SHOWN = 10  # items that did not run, with the reason
NOTED_COMMIT = "commit.txt"
STORED_STATE = results.STORED / FILE


@dataclass
class Running:
    """An item that is being executed."""

    item: Item
    process: subprocess.Popen[bytes]
    began_s: float


@dataclass
class Session:
    """One call of the program.

    Attributes:
        items: the queue, or the named items.
        state: state file.
        folder: state folder.
        data_dir: folder of the data sets.
        deadline_s: value of `time.monotonic` at which all items must have stopped.
        jobs: items that run at once.
        miniature: whether this is the rehearsal.
        named: whether the items were named, so that one that failed before runs again.
        results: folder of the results, or None.
        tried: items that ran in this session; none runs twice.
    """

    items: Sequence[Item]
    state: State
    folder: Path
    data_dir: Path
    deadline_s: float
    jobs: int
    miniature: bool
    named: bool
    results: Path | None
    tried: set[str] = field(default_factory=set)
    running: list[Running] = field(default_factory=list)

    def run(self) -> None:
        """Run items until none fits any more."""
        try:
            while True:
                item = self._next() if len(self.running) < self.jobs else None
                if item is not None:
                    self._start(item)
                elif not self.running:
                    return
                else:
                    time.sleep(POLL_S)
                    self._reap()
        finally:
            for running in self.running:
                running.process.kill()

    def _next(self) -> Item | None:
        """The first item that is not done, can run and fits."""
        left = self.deadline_s - time.monotonic()
        for item in self.items:
            record = self.state.records.get(item.name)
            skip = self.state.is_done(item.name) or item.name in self.tried
            if skip or (record is not None and record.gave_up and not self.named):
                continue
            beside = self.running and (item.alone or any(running.item.alone for running in self.running))
            if not beside and item.fits(left) and self._missing(item) is None:
                return item
        return None

    def reason(self, item: Item) -> str:
        """Why an item did not run."""
        missing = self._missing(item)
        if missing is not None:
            return f"needs {missing}"
        record = self.state.records.get(item.name)
        return "failed twice, --items runs it" if record is not None and record.gave_up else "did not fit into the time"

    def _missing(self, item: Item) -> str | None:
        """What the item needs and is not here; None if it can run."""
        for name in item.needs:
            if not self.state.is_done(name):
                return name
            if not ((self.folder / "runs" / name / "weights.safetensors").exists() or (ZOO / name).exists()):
                return f"the weights of {name}"
        if item.data and not self._has(item.data):
            return f"all of {item.data}"
        if item.kind == "autoattack" and not _has_autoattack():
            return "pyautoattack"
        if item.kind == "tests" and importlib.util.find_spec("pytest") is None:
            return "pytest"
        return None

    def _has(self, name: str) -> bool:
        folder = self.data_dir / (LAYOUTS[name].folder if name in LAYOUTS else name)
        present = data_parts.read_present(folder)
        return folder.is_dir() and (present is None or present.complete)

    def _start(self, item: Item) -> None:
        for name in item.needs:
            if not (self.folder / "runs" / name).exists():
                _copy(ZOO / name, self.folder / "runs" / name)
        seconds = max(1.0, self.deadline_s - time.monotonic())
        command = ["benchmarks/gpu/work.py", item.name, *(["--miniature"] if self.miniature else [])]
        self.state.begin(item.name, Record(f"python {' '.join(command)}", item.minutes, item.inputs, item.outputs))
        self.tried.add(item.name)
        folder = self.folder / "items" / item.name
        folder.mkdir(parents=True, exist_ok=True)
        arguments = ["--state", str(self.folder), "--data", str(self.data_dir), "--seconds", f"{seconds:.1f}"]
        with (folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, str(WORK), *command[1:], *arguments],
                stdin=subprocess.PIPE,  # closes when this program is gone, which ends the item
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.running.append(Running(item, process, time.monotonic()))
        print(f"{item.name}: started, {seconds / 60:.1f} minutes left", flush=True)

    def _reap(self) -> None:
        """Record the items that ended; kill those that did not stop in time."""
        for running in list(self.running):
            if running.process.poll() is None:
                if time.monotonic() > self.deadline_s + GRACE_S:
                    running.process.kill()
                continue
            self.running.remove(running)
            self._record(running)
            if self.results is not None:
                results.collect(self.folder, self.data_dir, self.results)

    def _record(self, running: Running) -> None:
        item, code, seconds = running.item, running.process.returncode, time.monotonic() - running.began_s
        absent = [name for name in item.outputs if not (self.folder / name).exists()]
        if code == 0 and not absent:
            where = read_json(self.folder / "items" / item.name / "where.json", "card")
            self.state.finish(item.name, seconds, where["card"], where["torch"], commit(self.data_dir))
            outcome = "done"
        elif code == CONTINUE or (code < 0 and time.monotonic() > self.deadline_s):
            self.state.end(item.name, UNFINISHED, seconds)
            outcome = "to be continued"
        else:
            lines = (self.folder / "items" / item.name / "log.txt").read_text(errors="replace").splitlines()
            reason = f"no {', '.join(absent)}" if code == 0 else "\n".join(lines[-ERROR_LINES:])
            self.state.end(item.name, FAILED, seconds, reason)
            outcome = f"failed ({code}): {lines[-1] if lines else ''}"
        print(f"{item.name}: {outcome}, {seconds:.0f} s", flush=True)


def commit(data_dir: Path) -> str:
    """The commit of the project: of its repository, or as `pack.py` noted it beside the data."""
    try:
        head, changes = (
            subprocess.run(
                ["git", "-C", str(ROOT), *command], capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "mexit", "benchmarks/gpu"])
        )
        return head + (" with changes" if changes else "")
    except (OSError, subprocess.SubprocessError):
        noted = data_dir / NOTED_COMMIT
        name, _, sources = noted.read_text().strip().rpartition(" ") if noted.exists() else ("unknown", "", "")
        return name if sources == source_sha256() else f"{name} with changes"


def note_commit(folder: Path) -> Path:
    """Note the commit and the sources for a machine without git."""
    path = folder / NOTED_COMMIT
    write_bytes(path, f"{commit(folder)} {source_sha256()}\n".encode())
    return path


def source_sha256() -> str:
    """The sha256 of all Python files that a result depends on."""
    files = sorted(path for folder in ("mexit", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
    return sha256_bytes("".join(f"{path.relative_to(ROOT)} {sha256_file(path)}\n" for path in files).encode())


def prepare(source: Path, folder: Path) -> Path:
    """Unpack the parts in `source` into the state folder.

    Returns:
        The folder of the data sets: that below the state folder if parts are or were unpacked, else `source`.
    """
    unpacked = folder / "data"
    for part in sorted(source.glob(f"*{data_parts.SUFFIX}")):
        stamp = unpacked / f"{part.name}.done"
        if not stamp.exists():
            data_parts.unpack(part, unpacked)
            stamp.touch()
    if not unpacked.exists():
        return source.resolve()
    if (source / "mnist").exists():
        shutil.copytree(source / "mnist", unpacked / "mnist", dirs_exist_ok=True)
    if (source / NOTED_COMMIT).exists():
        shutil.copyfile(source / NOTED_COMMIT, unpacked / NOTED_COMMIT)
    return unpacked


def add_packages(source: Path, folder: Path) -> None:
    """Let this process and those of the items import from the zip archives that are copied with the data."""
    for archive in source.glob("*.zip"):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(archive, folder / archive.name)  # a later session on this machine may bring other data
    archives = [str(path) for path in sorted(folder.glob("*.zip"))]
    sys.path += archives
    os.environ["PYTHONPATH"] = os.pathsep.join([os.environ.get("PYTHONPATH", str(ROOT)), *archives])


def restore(folder: Path) -> State:
    """The state: of an earlier session here, else that of the repository, with what it holds of unfinished items."""
    state = State.read(folder / FILE)
    if state.records or not STORED_STATE.exists():
        return state
    stored = State.read(STORED_STATE)
    for name in (name for name in stored.records if not stored.is_done(name)):
        for source, target in (
            (results.UNFINISHED / name, folder / "runs" / name),
            (results.STORED / name, folder / "items" / name),
        ):
            if source.is_dir() and not target.exists():
                _copy(source, target)
        for answers in results.CLAIMS.glob(f"*-{name.rpartition('-')[2]}.npz") if name.startswith("claims-") else ():
            write_bytes(folder / "items" / name / "answers" / answers.name, answers.read_bytes())
    state.merge(stored)  # last: a state without records is restored again
    return state


def _copy(source: Path, target: Path) -> None:
    """Copy a folder; the copy is complete or absent."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with new_directory(target) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)


def list_queue(state: State) -> None:
    """Print the queue."""
    for item in QUEUE:
        record = state.records.get(item.name)
        status = "-" if record is None else record.attempts[-1].result if record.attempts else "-"
        done = f"done on {record.done.card}, {record.done.date}" if record is not None and record.done else status
        print(f"{item.group}  {item.name:36} {item.minutes:4.1f} min  {item.data or 'any data':9} {item.about}: {done}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="time of this session, all included")
    parser.add_argument("--data", type=Path, default=Path("gpu-data"), help="parts, or complete data sets")
    parser.add_argument(
        "--state", type=Path, help="state file, runs and logs; default gpu-state, in a rehearsal gpu-miniature"
    )
    parser.add_argument("--results", type=Path, help="write the results there after every item")
    parser.add_argument("--items", nargs="+", metavar="NAME", help="only these items, in this order")
    parser.add_argument("--jobs", type=int, default=1, help="items to run at once")
    parser.add_argument("--miniature", action="store_true", help="rehearse the queue on tiny data")
    parser.add_argument("--list", action="store_true", help="only print the queue")
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes - COLLECT_S * (arguments.results is not None)
    folder = (arguments.state or Path("gpu-miniature" if arguments.miniature else "gpu-state")).resolve()
    if arguments.list:
        list_queue(State.read(folder / FILE))
        return
    known = {item.name: item for item in QUEUE}
    unknown = [name for name in arguments.items or () if name not in known]
    if unknown:
        parser.error(f"no item {', '.join(unknown)}: --list prints the queue")
    chosen = [known[name] for name in arguments.items] if arguments.items else list(QUEUE)
    lock = _lock(folder)
    add_packages(arguments.data, folder)
    try:
        if arguments.miniature:
            chosen = [miniature(item) for item in chosen]
            state, data_dir = State.read(folder / FILE), write_data(folder / "data")
        else:
            state, data_dir = restore(folder), prepare(arguments.data, folder)
        session = Session(
            chosen, state, folder, data_dir, deadline, arguments.jobs, arguments.miniature, bool(arguments.items),
            arguments.results,
        )  # fmt: skip
        session.run()
        if arguments.results is not None:
            results.collect(folder, data_dir, arguments.results)
    except MexitError as error:
        sys.exit(f"error: {error}")
    failed = [name for name in session.tried if state.records[name].attempts[-1].result == FAILED]
    undone = [item for item in chosen if not state.is_done(item.name)]
    for item in [item for item in undone if item.name not in session.tried][:SHOWN]:
        print(f"{item.name}: {session.reason(item)}")
    print(
        f"{len(chosen) - len(undone)} of {len(chosen)} items done" + (f"; failed: {', '.join(failed)}" * bool(failed))
    )
    lock.close()
    sys.exit(bool(failed))


def _lock(folder: Path) -> TextIO:
    """Lock the state folder as long as the returned file is open: two programs would overwrite each other's state."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"error: another run.py uses {folder}: wait for it, or choose another --state")
    return lock


def _has_autoattack() -> bool:
    return importlib.util.find_spec("pyautoattack") is not None


if __name__ == "__main__":
    main()
