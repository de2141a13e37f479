"""A worker process of the server: answers requests on the connections that the supervisor passes to it."""

from __future__ import annotations

import asyncio
import copy
import os
import socket
import ssl
from typing import Any

from mexit.serving.asgi import App
from mexit.serving.channel import Channel, Message
from mexit.serving.model_changes import WorkerChanges
from mexit.serving.repository import ModelRepository
from mexit.serving.uvicorn_server import Beside, Connection, Server, uvicorn_config


class WorkerServer(Server):
    """uvicorn's server without a listening socket.

    Attributes:
        orphaned: whether the supervisor ended without a word, as if killed.
    """

    def __init__(
        self,
        app: App,
        models: ModelRepository,
        channel: Channel,
        changes: WorkerChanges,
        ready: Message,
        beside: Beside | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Start nothing yet; `run` sends the message `ready` once connections are taken."""
        super().__init__(uvicorn_config(app, models.server.limits), models.server, None, None, tls)
        self._loop: asyncio.AbstractEventLoop | None = None
        self.orphaned = False
        self._channel, self._message = channel, ready
        self._refusing = self.config
        self._models, self._changes = models, changes
        self._beside_later = beside  # its port is shared, so it waits until the models are those of the others
        changes.on_joined = self._start_beside
        self._idle: bool | None = None
        self._leaving = False
        self._tasks: set[asyncio.Task[Any]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._refusing = copy.copy(self.config)
        self._refusing.limit_concurrency = 0
        self.config.limit_concurrency = None  # the supervisor counts connections
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._channel.fileno(), self._read)
        self._channel.send({"is": "ready", "states": self._models.states(), **self._message})

    async def on_tick(self, counter: int) -> bool:
        """Return whether to shut down: not before the supervisor says so, so that health checks are answered."""
        await super().on_tick(counter)
        if self._state.stopping:
            self._report_idle()
        return self._leaving

    def closed(self) -> None:
        """Report that a connection is closed."""
        self._channel.send({"is": "closed"})

    def _start_beside(self) -> None:
        """Start the other server; called in another thread than the event loop's."""
        if self._beside_later is not None and self._loop is not None:
            asyncio.run_coroutine_threadsafe(self._beside_later.start(), self._loop).result()
            self._beside = self._beside_later

    def _report_idle(self) -> None:
        idle = not self._state.active
        if idle != self._idle:
            self._idle = idle
            self._channel.send({"is": "idle", "idle": idle})

    def _read(self) -> None:
        try:
            messages = self._channel.receive()
        except EOFError:  # the supervisor is gone
            asyncio.get_running_loop().remove_reader(self._channel.fileno())
            self._state.stopping = self._leaving = self.orphaned = True
            return
        for message, fd in messages:
            self._handle(message, fd)

    def _handle(self, message: Message, fd: int) -> None:
        kind = message["do"]
        if kind == "connect":
            self._channel.send({"is": "opened"})
            task = asyncio.get_running_loop().create_task(self._connect(fd, message["refuse"]))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif kind == "step":
            self._changes.begin_step(self._models, message)
        elif kind == "answer":
            self._changes.answer(message)
        elif kind == "ping":
            self._channel.send({"is": "pong"})
        elif kind == "stop":
            self._state.stopping = True
            self._report_idle()
        elif kind == "exit":
            self._leaving = True

    async def _connect(self, fd: int, refuse: bool) -> None:
        config = self._refusing if refuse else self.config
        connection = socket.socket(fileno=fd)

        def protocol() -> Connection:
            made = PassedConnection(config=config, server_state=self.server_state, app_state={}, limits=self._limits)
            made.server_of_worker = self
            return made

        try:
            await asyncio.get_running_loop().connect_accepted_socket(protocol, connection, **self.tls_options)
        except OSError:
            connection.close()
            self.closed()


class PassedConnection(Connection):
    """A connection that the supervisor has accepted, and whose end it must know."""

    server_of_worker: WorkerServer

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.server_of_worker.closed()


def channel_of(argument: str) -> Channel:
    """The channel of this worker, from the number of the file descriptor on its command line."""
    fd = int(argument)
    os.set_inheritable(fd, False)
    return Channel(socket.socket(fileno=fd))
