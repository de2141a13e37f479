"""Loads and unloads of models in all worker processes: the supervisor's part and the worker's part.

A load has two steps. Every worker prepares the newest version. If all have prepared the same one, every worker puts it
into service; else every worker gives it up. Changes take place one after the other.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

from mexit import errors
from mexit.errors import LoadFailed, MexitError
from mexit.serving.channel import Channel, Message
from mexit.serving.worker_process import WorkerProcess

if TYPE_CHECKING:
    from mexit.serving.repository import ModelRepository

LOAD, UNLOAD = "load", "unload"
_BUG = "internal error: the server's log has the details"


def error_message(error: BaseException) -> Message:
    """An error as a part of a message."""
    if isinstance(error, MexitError):
        return {"type": type(error).__name__, "text": str(error)}
    return {"type": "LoadFailed", "text": _BUG}


def error_of(message: Message) -> MexitError:
    """The error that `error_message` wrote."""
    kind = getattr(errors, message["type"], MexitError)
    error: MexitError = kind.__new__(kind)
    Exception.__init__(error, message["text"])
    return error


@dataclass
class _Change:
    """A change in progress.

    Attributes:
        worker: the worker that asked for it.
        number: the worker's number of the request.
        action: `LOAD` or `UNLOAD`.
        name: of the model.
        step: what the workers do now: "prepare", "commit", "give_up" or "remove".
        waiting: workers that have not finished the step.
        texts, errors: their results.
    """

    worker: WorkerProcess
    number: int
    action: str
    name: str
    step: str = ""
    waiting: list[WorkerProcess] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    errors: list[Message] = field(default_factory=list)


class ModelChanges:
    """The changes of all workers, in the supervisor.

    Attributes:
        unloaded: models that a new worker must not put into service.
        generation: number of finished changes.
    """

    def __init__(self, workers: Callable[[], Sequence[WorkerProcess]]) -> None:
        """`workers` returns the workers that are ready."""
        self._workers = workers
        self._queue: deque[_Change] = deque()
        self._now: _Change | None = None
        self.unloaded: set[str] = set()
        self.generation = 0

    def missed_by(self, worker: WorkerProcess) -> bool:
        """Whether a worker that becomes ready may have loaded what the others have not."""
        return self._now is not None or worker.generation != self.generation

    def ask(self, worker: WorkerProcess, message: Message) -> None:
        """A worker asks for a change."""
        self._queue.append(_Change(worker, message["number"], message["action"], message["name"]))
        self._begin_next()

    def finish_step(self, worker: WorkerProcess, message: Message) -> None:
        """A worker has finished a step."""
        change = self._now
        if change is None or worker not in change.waiting or message["step"] != change.step:
            return
        if message["error"] is None:
            change.texts.append(message["text"])
        else:
            change.errors.append(message["error"])
        self.forget(worker)

    def forget(self, worker: WorkerProcess) -> None:
        """Do not wait for a worker any more: it has finished the step, or it has ended."""
        if self._now is not None and worker in self._now.waiting:
            self._now.waiting.remove(worker)
            if not self._now.waiting:
                self._next_step(self._now)

    def _begin_next(self) -> None:
        if self._now is None and self._queue:
            self._now = self._queue.popleft()
            self._do(self._now, "prepare" if self._now.action == LOAD else "remove")

    def _do(self, change: _Change, step: str, reason: str = "") -> None:
        change.step, change.waiting, change.texts = step, list(self._workers()), []
        message = {"do": "step", "step": step, "name": change.name, "reason": reason}
        if not change.waiting:
            self._next_step(change)
        for worker in tuple(change.waiting):
            if not worker.channel.send(message):
                self.forget(worker)

    def _next_step(self, change: _Change) -> None:
        if change.step == "prepare":
            if len(set(change.texts)) > 1 and not change.errors:
                text = "the files changed while they were read: load it again once they are complete"
                change.errors.append(error_message(LoadFailed(text)))
            if change.errors:
                self._do(change, "give_up", change.errors[0]["text"])
            else:
                self._do(change, "commit")
            return
        if change.step == "commit":
            self.unloaded.discard(change.name)
        elif change.step == "remove" and not change.errors:
            self.unloaded.add(change.name)
        self.generation += change.step in ("commit", "remove")
        error = change.errors[0] if change.errors else None
        change.worker.channel.send({"do": "answer", "number": change.number, "error": error})
        self._now = None
        self._begin_next()


class WorkerChanges:
    """The changes of one worker: asks the supervisor for them, and does the steps that it commands."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._numbers = count()
        self._asked: dict[int, Future[None]] = {}

    def ask(self, action: str, name: str) -> None:
        """Do a change in all workers, see `repository.Coordinate`; raises the error of a worker."""
        number, answer = next(self._numbers), Future[None]()
        self._asked[number] = answer
        self._channel.send({"is": "change", "number": number, "action": action, "name": name})
        answer.result()

    def answer(self, message: Message) -> None:
        """The supervisor's answer to `ask`."""
        answer = self._asked.pop(message["number"])
        if message["error"] is None:
            answer.set_result(None)
        else:
            answer.set_exception(error_of(message["error"]))

    def begin_step(self, repository: ModelRepository, message: Message) -> None:
        """Do a step in a thread of its own, and report its end."""
        threading.Thread(target=self._step, args=(repository, message), name="mexit-load", daemon=True).start()

    def _step(self, repository: ModelRepository, message: Message) -> None:
        step, name = message["step"], message["name"]
        steps: dict[str, Callable[[], Any]] = {
            "prepare": lambda: repository.prepare(name),
            "commit": lambda: repository.commit(name),
            "give_up": lambda: repository.give_up(name, message["reason"]),
            "remove": lambda: repository.remove(name),
        }
        try:
            text, error = steps[step](), None
        except Exception as raised:
            text, error = None, error_message(raised)
        self._channel.send({"is": "step", "step": step, "text": text, "error": error})
