"""The supervisor of worker processes: accepts connections, passes them on, and replaces workers that die.

It runs no inference. A connection goes to the worker with the fewest open ones, so that it does not share a busy
worker while another one is idle. The cost is per connection, not per request.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mexit.core.progress import StopSignal, end_by_signal
from mexit.errors import MexitError
from mexit.serving.channel import Message
from mexit.serving.limits import Limits
from mexit.serving.model_changes import ModelChanges, error_of
from mexit.serving.systemd_notify import SystemdNotify
from mexit.serving.uvicorn_server import start_listening, url_of
from mexit.serving.worker_process import WorkerProcess

MAX_DEATHS, DEATHS_S = 5, 60.0  # this number of deaths within these seconds stops the server
PING_S, SILENCE_S, RETRY_S = 5.0, 30.0, 30.0
_TICK_S = 0.5

_log = logging.getLogger("mexit.server")


class Supervisor:
    """Runs worker processes until a stop signal."""

    def __init__(
        self,
        bound: Sequence[socket.socket],
        spawn: Callable[[int, int | None, Mapping[str, Any], bool], WorkerProcess],
        limits: Limits,
        *,
        workers: int | None,
        ready: Callable[[str], None] | None = None,
        note: Callable[[str], None] = lambda _: None,
        tls: bool = False,
        on_death: Callable[[int], None] = lambda _: None,
        watch: bool = False,
        signals: StopSignal | None = None,
        systemd: SystemdNotify | None = None,
    ) -> None:
        """Start nothing yet.

        Args:
            bound: the sockets of `uvicorn_server.bind`.
            spawn: starts a worker from its index, `workers` (None as long as it is not known), the states of the models
                (see `ModelChanges`; empty before the first worker), and whether it is alone and may load others.
            limits: `connections`, `drain_s` and `close_s` apply.
            workers: number of processes; None: as many as the first one proposes.
            ready: called with the URL once all workers are ready and connections are accepted.
            note: called with one line of the first worker about measured times.
            tls: whether the workers use TLS.
            on_death: called with the process id of a worker that has ended.
            watch: whether changes on disk are loaded without a request.
            signals: the stop signals, which interrupt until `run`; None: signals keep their effects.
            systemd: hears when the server is ready or stops, and its watchdog as long as the workers answer.
        """
        self._bound, self._spawn, self._limits = bound, spawn, limits
        self._count = workers
        self._ready, self._note, self._on_death, self._tls, self._reload = ready, note, on_death, tls, watch
        self._signals = signals
        self._systemd = systemd or SystemdNotify()
        # Several pings in the time within which the watchdog must hear that they were answered.
        watchdog_s = self._systemd.watchdog_s or float("inf")
        self._answer_s, self._tick_s = min(SILENCE_S, watchdog_s / 2), min(_TICK_S, watchdog_s / 8)
        self._ping_every_s = min(PING_S, watchdog_s / 4)
        self._workers: list[WorkerProcess] = []
        self._deaths: deque[float] = deque(maxlen=MAX_DEATHS)
        self._changes = ModelChanges(self._ready_workers, self._handle_join, self._retry)
        self._started = 0
        self._waiting: list[int] = []  # indexes of workers that could not load what the others serve
        self._retry_s = 0.0
        self._selector = selectors.DefaultSelector()
        self._listening = self._accepting = False
        self._stop_requested = False
        self._drain_end_s: float | None = None
        self._leaving = False
        self._ping_s = 0.0

    @property
    def processes(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.process.pid for worker in self._workers]

    def stop(self) -> None:
        """Let the workers refuse new requests and answer those in flight. Call in the thread of `run`.

        Not in a signal handler, which may have interrupted a message to a worker: the channel's lock is held then.
        """
        self._drain_end_s = time.monotonic() + self._limits.drain_s
        self._systemd.stopping()
        for worker in self._workers:
            if worker.ready:
                worker.channel.send({"do": "stop"})
            else:
                worker.process.kill()

    def run(self) -> None:
        """Serve until a stop signal, and until all requests in flight are answered.

        Raises:
            MexitError: a worker could not start, or workers died too often.
        """
        try:
            with self._woken_by_signals():
                if self._signals is not None:
                    self._signals.defer(self._request_stop, self._end)
                self._start(0)
                while self._workers:
                    self._turn()
        finally:
            for worker in self._workers:
                self._on_death(worker.process.pid)
                worker.end()
            self._selector.close()

    def _turn(self) -> None:
        events = self._selector.select(self._tick_s)
        if self._stop_requested and self._drain_end_s is None:
            self.stop()
        for key, _ in events:
            if isinstance(key.data, WorkerProcess):
                self._read(key.data)
            elif key.data == "signal":
                key.fileobj.recv(64)  # type: ignore[union-attr]
            else:
                self._accept(key.data)
        self._watch()

    def _ready_workers(self) -> list[WorkerProcess]:
        return [worker for worker in self._workers if worker.ready]

    def _start(self, index: int) -> None:
        worker = self._spawn(index, self._count, self._changes.states, not self._ready_workers())
        self._started = max(self._started, index + 1)
        self._workers.append(worker)
        self._selector.register(worker.channel, selectors.EVENT_READ, worker)

    def _read(self, worker: WorkerProcess) -> None:
        try:
            messages = worker.channel.receive()
        except EOFError:
            self._bury(worker)
            return
        worker.heard_s = time.monotonic()
        for message, _ in messages:
            if worker in self._workers:
                self._handle(worker, message)

    def _handle(self, worker: WorkerProcess, message: Message) -> None:
        kind = message["is"]
        if kind == "opened":
            worker.passed.popleft().close()
        elif kind == "closed":
            worker.open -= 1
        elif kind == "idle":
            worker.idle = message["idle"]
        elif kind == "note":
            self._note(message["text"])
        elif kind == "failed" and not self._listening:
            raise error_of(message)
        elif kind == "change":
            self._changes.ask(worker, message)
        elif kind == "step":
            self._changes.finish_step(worker, message)
        elif kind == "ready":
            self._count = self._count or int(message["workers"])
            self._changes.join(worker, message)

    def _handle_join(self, worker: WorkerProcess, lost: Sequence[str] | None) -> None:
        """Use a worker that serves what the others serve; one that cannot ends, and starts again later."""
        if worker not in self._workers:
            return
        if lost is None:
            worker.process.kill()
        elif lost:
            self._set_aside(worker, lost)
        else:
            self._make_ready(worker)

    def _make_ready(self, worker: WorkerProcess) -> None:
        worker.ready = True
        if self._drain_end_s is not None:  # it is killed, and its message came before
            return
        while self._started < (self._count or 0):  # the first one has measured times for the others
            self._start(self._started)
        self._open()

    def _open(self) -> None:
        """Accept connections, at the start once all workers are ready."""
        if self._listening:
            self._resume()
        elif all(worker.ready for worker in self._workers):
            self._listen()

    def _set_aside(self, worker: WorkerProcess, lost: Sequence[str]) -> None:
        _log.error(
            "worker process %d cannot load what the others serve (%s): it starts again after the next load",
            worker.process.pid,
            ", ".join(lost),
        )
        self._remove(worker)
        self._waiting.append(worker.index)
        self._retry_s = time.monotonic() + RETRY_S
        if self._reload:
            self._changes.load(lost)
        if self._ready_workers():
            self._open()
        else:
            self._retry()

    def _retry(self) -> None:
        """Start the workers that could not load what the others serve."""
        waiting, self._waiting = self._waiting, []
        for index in waiting if self._drain_end_s is None else ():
            self._start(index)

    def _listen(self) -> None:
        start_listening(self._bound)
        self._listening = True
        for one in self._bound:
            one.setblocking(False)
        self._resume()
        url = url_of(self._bound[0], tls=self._tls)
        self._systemd.ready(url)
        if self._ready is not None:
            self._ready(url)

    def _remove(self, worker: WorkerProcess) -> int:
        """End a worker; returns its exit code."""
        self._selector.unregister(worker.channel)
        self._workers.remove(worker)
        code = worker.end()
        self._on_death(worker.process.pid)
        self._changes.forget(worker)
        for connection in worker.passed:
            self._pass_on(connection)
        return code

    def _bury(self, worker: WorkerProcess) -> None:
        """Replace a worker that has ended, unless the server stops."""
        code = self._remove(worker)
        if self._drain_end_s is not None:
            return
        _log.error("worker process %d ended with code %d", worker.process.pid, code)
        if not self._listening:
            raise MexitError(f"the worker process ended with code {code} before it was ready: see the messages above")
        now_s = time.monotonic()
        self._deaths.append(now_s)
        if len(self._deaths) == MAX_DEATHS and now_s - self._deaths[0] < DEATHS_S:
            raise MexitError(f"{MAX_DEATHS} worker processes ended within {DEATHS_S:g} s, the last with code {code}")
        self._start(worker.index)
        if not self._ready_workers():
            self._pause()
            self._retry()

    def _accept(self, listening: socket.socket) -> None:
        """Pass new connections to workers."""
        while self._accepting:
            try:
                connection, _ = listening.accept()
            except OSError:  # none, or the client has gone, or no file descriptor is free
                return
            self._pass_on(connection)

    def _pass_on(self, connection: socket.socket) -> None:
        ready = sorted(self._ready_workers(), key=lambda worker: worker.open)
        refuse = sum(worker.open for worker in self._workers) >= self._limits.connections
        for worker in ready:
            if worker.channel.send({"do": "connect", "refuse": refuse}, connection.fileno()):
                worker.open += 1
                worker.passed.append(connection)
                return
        connection.close()

    def _watch(self) -> None:
        """Ping workers, kill those that are silent, report to the watchdog if all answer, and end the drain."""
        now_s = time.monotonic()
        if now_s - self._ping_s > self._ping_every_s:
            self._ping_s = now_s
            for worker in self._ready_workers():
                worker.channel.send({"do": "ping"})
        if self._waiting and now_s > self._retry_s:
            self._retry()
        for worker in self._ready_workers():
            if now_s - worker.heard_s > SILENCE_S:
                _log.error("worker process %d is silent for %g s and is killed", worker.process.pid, SILENCE_S)
                worker.process.kill()
        ready = self._ready_workers()
        if self._listening and ready and all(now_s - worker.heard_s < self._answer_s for worker in ready):
            self._systemd.alive()
        if self._drain_end_s is None:
            return
        if not self._leaving and (all(worker.idle for worker in self._workers) or now_s > self._drain_end_s):
            self._leaving = True
            self._drain_end_s = now_s + self._limits.close_s + 1
            self._pause()
            for worker in self._workers:
                worker.channel.send({"do": "exit"})
        elif self._leaving and now_s > self._drain_end_s:
            for worker in self._workers:
                worker.process.kill()

    def _pause(self) -> None:
        """Accept no connections; they wait in the kernel, or are refused once the server has ended."""
        if self._accepting:
            self._accepting = False
            for one in self._bound:
                self._selector.unregister(one)

    def _resume(self) -> None:
        if not self._accepting and not self._leaving:
            self._accepting = True
            for one in self._bound:
                self._selector.register(one, selectors.EVENT_READ, one)

    @contextlib.contextmanager
    def _woken_by_signals(self) -> Iterator[None]:
        """A signal ends the wait of the selector, so that a stop begins at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        wake, woken = socket.socketpair()
        wake.setblocking(False)
        woken.setblocking(False)
        self._selector.register(woken, selectors.EVENT_READ, "signal")
        before = signal.set_wakeup_fd(wake.fileno())
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            wake.close()
            woken.close()

    def _request_stop(self) -> None:
        self._stop_requested = True

    def _end(self, number: int) -> None:
        for worker in self._workers:
            worker.process.kill()
        end_by_signal(number)
