"""The state file of the run-book: which items are done, on which card, and every attempt.

One program writes the file, and each change replaces it atomically, so SIGKILL at any time leaves the last complete
state. An attempt is stored when it begins and completed when it ends; one that never ended was killed.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mexit.core.atomic_io import read_json, to_json, write_bytes
from mexit.core.schema import check_format, decode

FORMAT, VERSION = "mexit-gpu-state", 1
FILE = "state.json"
RUNNING, DONE, UNFINISHED, FAILED = "running", "done", "unfinished", "failed"
MAX_FAILURES = 2


@dataclass(frozen=True)
class Attempt:
    """One start of an item.

    Attributes:
        started: date and time, UTC.
        result: "running" (it was killed, if nothing runs now), "done", "unfinished" (to be continued) or "failed".
        seconds: duration.
        error: last lines of the log of a failed attempt.
    """

    started: str
    result: str = RUNNING
    seconds: float = 0.0
    error: str = ""


@dataclass(frozen=True)
class Done:
    """Where and when an item was finished.

    Attributes:
        card: name of the GPU, or "cpu".
        torch: version of torch.
        seconds: duration of all attempts.
        date: UTC.
        commit: commit of the project, or "unknown".
    """

    card: str
    torch: str
    seconds: float
    date: str
    commit: str


@dataclass(frozen=True)
class Record:
    """The state of one item.

    Attributes:
        command: the command that runs it.
        expected_minutes: of one piece.
        inputs: data set and earlier items that it reads.
        outputs: files below the state folder.
        attempts: every start.
        done: None while the item is not finished.
    """

    command: str
    expected_minutes: float
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attempts: tuple[Attempt, ...] = ()
    done: Done | None = None

    @property
    def gave_up(self) -> bool:
        """Whether the last attempts all failed, so the item only runs again when it is named."""
        last = self.attempts[-MAX_FAILURES:]
        return len(last) == MAX_FAILURES and all(attempt.result == FAILED for attempt in last)


@dataclass
class State:
    """All records, by item.

    Attributes:
        path: the file; None keeps the state in memory.
        records: by name of the item.
    """

    path: Path | None
    records: dict[str, Record] = field(default_factory=dict)

    @staticmethod
    def read(path: Path) -> State:
        """Read the file; an empty state if there is none. Raises `Damaged`, `SchemaTooNew`."""
        if not path.exists():
            return State(path)
        value = read_json(path, "state")
        check_format(value, FORMAT, VERSION, str(path))
        return State(path, dict(decode(value["items"], Mapping[str, Record], f"{path}.items")))

    def to_json(self) -> dict[str, Any]:
        """The content of the file."""
        return {"format": FORMAT, "version": VERSION, "items": {k: asdict(one) for k, one in self.records.items()}}

    def is_done(self, name: str) -> bool:
        """Whether an item is finished."""
        return name in self.records and self.records[name].done is not None

    def begin(self, name: str, record: Record) -> None:
        """Store a new attempt; `record` describes the item, its attempts so far are kept."""
        attempts = self.records[name].attempts if name in self.records else ()
        self._put(name, replace(record, attempts=(*attempts, Attempt(now()))))

    def end(self, name: str, result: str, seconds: float, error: str = "") -> None:
        """Complete the last attempt."""
        record = self.records[name]
        last = replace(record.attempts[-1], result=result, seconds=round(seconds, 1), error=error)
        self._put(name, replace(record, attempts=(*record.attempts[:-1], last)))

    def finish(self, name: str, seconds: float, card: str, torch: str, commit: str) -> None:
        """Complete the last attempt and mark the item done. Its outputs must be complete on disk."""
        record = self.records[name]
        last = replace(record.attempts[-1], result=DONE, seconds=round(seconds, 1))
        attempts = (*record.attempts[:-1], last)
        total = round(sum(attempt.seconds for attempt in attempts), 1)
        self._put(name, replace(record, attempts=attempts, done=Done(card, torch, total, now(), commit)))

    def merge(self, other: State) -> None:
        """Take over the records of a later state; a finished item stays finished."""
        for name, record in other.records.items():
            if not self.is_done(name) or record.done is not None:
                self.records[name] = record
        self._write()

    def _put(self, name: str, record: Record) -> None:
        self.records[name] = record
        self._write()

    def _write(self) -> None:
        if self.path is not None:
            write_bytes(self.path, to_json(self.to_json()))


def now() -> str:
    """Date and time, UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
