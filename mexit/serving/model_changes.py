"""Loads and unloads of models in all worker processes: the supervisor's part and the worker's part.

A load has two steps. Every worker prepares the newest version. If all have prepared the same one, every worker puts it
into service; else every worker gives it up. A worker that starts later joins by a change as well: it takes over the
versions of the others. Changes take place one after the other.
"""

from __future__ import annotations

import logging
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

LOAD, UNLOAD, JOIN = "load", "unload", "join"
_FIRST_STEPS = {LOAD: "prepare", UNLOAD: "remove", JOIN: "restore"}
_BUG = "internal error: the server's log has the details"

_log = logging.getLogger("mexit.server")


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
        action: `LOAD`, `UNLOAD` or `JOIN`.
        name: of the model; "" for `JOIN`.
        worker: the worker that asked for it or that joins; None: the supervisor asked.
        number: the worker's number of the request.
        step: what the workers do now: "prepare", "commit", "give_up", "remove" or "restore".
        waiting: workers that have not finished the step.
        results, errors: what the others have answered.
        state: of the model after the step, by `ModelState.to_json`.
    """

    action: str
    name: str = ""
    worker: WorkerProcess | None = None
    number: int = 0
    step: str = ""
    waiting: list[WorkerProcess] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)
    errors: list[Message] = field(default_factory=list)
    state: Any = None


class ModelChanges:
    """The changes of all workers, in the supervisor.

    Attributes:
        states: the state of each model in all workers, see `ModelRepository.states`.
    """

    def __init__(
        self,
        workers: Callable[[], Sequence[WorkerProcess]],
        joined: Callable[[WorkerProcess, Sequence[str] | None], None],
        changed: Callable[[], None],
    ) -> None:
        """No model is known yet.

        Args:
            workers: returns the workers that are ready.
            joined: called when a worker has taken over the versions of the others, with the names of models for which
                this was not possible; None if it failed or has ended.
            changed: called after a change of a model.
        """
        self._workers, self._joined, self._changed = workers, joined, changed
        self._queue: deque[_Change] = deque()
        self._now: _Change | None = None
        self.states: dict[str, Any] = {}

    def join(self, worker: WorkerProcess, message: Message) -> None:
        """A worker has started. If it started alone and no other one is ready, what it has loaded counts."""
        self._add(_Change(JOIN, worker=worker, state=message["states"] if message["alone"] else None))

    def ask(self, worker: WorkerProcess, message: Message) -> None:
        """A worker asks for a change."""
        self._add(_Change(message["action"], message["name"], worker, message["number"]))

    def load(self, names: Sequence[str]) -> None:
        """The supervisor asks for loads."""
        for name in names:
            self._add(_Change(LOAD, name))

    def finish_step(self, worker: WorkerProcess, message: Message) -> None:
        """A worker has finished a step."""
        change = self._now
        if change is None or worker not in change.waiting or message["step"] != change.step:
            return
        change.state = message["state"]
        if message["error"] is None:
            change.results.append(message["result"])
        else:
            change.errors.append(message["error"])
        self.forget(worker)

    def forget(self, worker: WorkerProcess) -> None:
        """Do not wait for a worker any more: it has finished the step, or it has ended."""
        if self._now is not None and worker in self._now.waiting:
            self._now.waiting.remove(worker)
            if not self._now.waiting:
                self._next_step(self._now)

    def _add(self, change: _Change) -> None:
        self._queue.append(change)
        self._begin_next()

    def _begin_next(self) -> None:
        if self._now is None and self._queue:
            self._now = self._queue.popleft()
            if self._now.action == JOIN and self._now.state is not None and not self._workers():
                self.states = self._now.state
            self._do(self._now, _FIRST_STEPS[self._now.action])

    def _do(self, change: _Change, step: str, reason: str = "") -> None:
        change.step, change.waiting, change.results = step, list(self._workers()), []
        message: Message = {"do": "step", "step": step, "name": change.name, "reason": reason}
        if change.action == JOIN and change.worker is not None:
            change.waiting, message["states"] = [change.worker], self.states
        if not change.waiting:
            self._next_step(change)
        for worker in tuple(change.waiting):
            if not worker.channel.send(message):
                self.forget(worker)

    def _next_step(self, change: _Change) -> None:
        if change.step == "prepare":
            if len(set(change.results)) != 1 and not change.errors:
                text = "the files changed while they were read: load it again once they are complete"
                change.errors.append(error_message(LoadFailed(text if change.results else "no worker is ready")))
            if change.errors:
                self._do(change, "give_up", change.errors[0]["text"])
            else:
                self._do(change, "commit")
            return
        self._now = None
        self._finish(change)
        self._begin_next()

    def _finish(self, change: _Change) -> None:
        if change.action == JOIN and change.worker is not None:
            self._joined(change.worker, change.results[0] if change.results else None)
            return
        if change.state is not None:
            self.states[change.name] = change.state
        elif change.step == "remove" and not change.errors:
            self.states.pop(change.name, None)
        if change.worker is not None:
            error = change.errors[0] if change.errors else None
            change.worker.channel.send({"do": "answer", "number": change.number, "error": error})
        if not change.errors:
            self._changed()


class WorkerChanges:
    """The changes of one worker: asks the supervisor for them, and does the steps that it commands.

    Attributes:
        on_joined: called, in another thread, once the worker has taken over the versions of the others.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._numbers = count()
        self._asked: dict[int, Future[None]] = {}
        self.on_joined: Callable[[], None] = lambda: None

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
            "restore": lambda: self._restore(repository, message["states"]),
        }
        try:
            result, error = steps[step](), None
        except Exception as raised:
            if not isinstance(raised, MexitError):
                _log.exception("the step %s of model '%s' failed", step, name)
            result, error = None, error_message(raised)
        state = repository.states().get(name)
        self._channel.send({"is": "step", "step": step, "result": result, "error": error, "state": state})

    def _restore(self, repository: ModelRepository, states: dict[str, Any]) -> list[str]:
        lost = repository.restore(states)
        if not lost:
            self.on_joined()
        return lost
