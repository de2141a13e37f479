"""The model repository: the loaded version of each model, and its replacement while the server answers.

A new version is opened beside the one in service. Once it is opened, checked and warmed up, it takes over at once:
requests that have begun end with the version that they began with, which closes after the last of them. A version that
fails is closed, the one in service stays, and `index` and the log have the reason.

With several worker processes, the supervisor takes the steps in every process: `prepare`, then `commit` if all have
prepared the same version, else `give_up`; or `remove`. A process that starts later takes over the versions of the
others by `restore`.
"""

from __future__ import annotations

import gc
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mexit.core.atomic_io import sha256_bytes
from mexit.errors import Damaged, LoadFailed, MexitError, NotFound, Overloaded
from mexit.runtime.runtime import Runtime
from mexit.serving.model_folder import ModelFolder, ModelVersion
from mexit.serving.model_state import ModelState, StateJson, entry
from mexit.serving.request_body import short_repr
from mexit.serving.server_state import ServerState
from mexit.serving.service import Service

LOAD, UNLOAD = "load", "unload"
OpenVersion = Callable[[Path], Runtime]
"""Opens a bundle, checks and warms it up; raises an error for a version that cannot be used."""
Coordinate = Callable[[str, str], None]
"""Does an action, `LOAD` or `UNLOAD`, for a model of the given name in every process of the server."""
_SHOWN_NAMES = 8  # in messages
_FREE_AFTER_S = 1.0
_BUG = "internal error: the server's log has the details"

_log = logging.getLogger("mexit.server")


class ModelRepository:
    """The models of a server. Thread-safe."""

    def __init__(
        self, server: ServerState, folder: ModelFolder, open_version: OpenVersion, coordinate: Coordinate | None = None
    ) -> None:
        """No model is loaded yet.

        Args:
            server: what the models share.
            folder: the models on disk.
            open_version: opens, checks and warms up a version.
            coordinate: loads or unloads a model in every process; by default this process is the only one.
        """
        self.server = server
        self.folder = folder
        self._open_version = open_version
        self._coordinate = coordinate or self._apply
        self._models: dict[str, ModelState] = {}
        self._users: Counter[Service] = Counter()
        self._retired: set[Service] = set()
        self._lock = threading.Lock()
        self._one_change = threading.Lock()

    @property
    def names(self) -> list[str]:
        """The models in service."""
        with self._lock:
            return sorted(name for name, model in self._models.items() if model.service is not None)

    @property
    def services(self) -> list[Service]:
        """The versions in service, by name."""
        with self._lock:
            return [model.service for _, model in sorted(self._models.items()) if model.service is not None]

    def service(self, name: str, version: str | None = None) -> Service:
        """The service of a model, for its metadata; `use` for a request.

        Args:
            name: of the model.
            version: number of the version; default the one in service.

        Raises:
            NotFound: no such model or version, or no version of the model is in service.
            Overloaded: this version was refused; the message has the reason.
        """
        with self._lock:
            return self._find(name, version)

    @contextmanager
    def use(self, name: str, version: str | None = None) -> Iterator[Service]:
        """The service of a model, which stays open during the `with` block. Arguments and errors as `service`."""
        with self._lock:
            service = self._find(name, version)
            self._users[service] += 1
        try:
            yield service
        finally:
            with self._lock:
                self._users[service] -= 1
                unused = not self._users[service] and service in self._retired
                if unused:
                    self._forget(service)
            if unused:
                _close(service)

    def index(self) -> list[dict[str, str]]:
        """The answer to `POST /v2/repository/index`: every known version with state and reason, by name."""
        on_disk = self._on_disk()
        entries: list[dict[str, str]] = []
        with self._lock:
            for name in sorted({*self._models, *on_disk}):
                known = list(self._models.get(name, ModelState()).entries(name))
                version = str(on_disk[name][0].number) if name in on_disk else ""
                entries += known or [entry(name, version, "UNAVAILABLE", self._why_not(name))]
        if self.server.stopping:
            return [{**one, "state": "UNAVAILABLE", "reason": "the server is stopping"} for one in entries]
        return entries

    def load_all(self, names: Iterable[str] | None = None) -> None:
        """Load models of the folder, by default every one, in this process.

        Raises:
            LoadFailed, NotFound: none can be used.
        """
        failed = None
        for name in sorted(self._on_disk() if names is None else names):
            try:
                self._apply(LOAD, name)
            except (LoadFailed, NotFound) as error:
                failed = failed or error
        if failed is not None and not self.names:
            raise failed

    def states(self) -> dict[str, StateJson]:
        """The state of each model, for `restore` in another process."""
        with self._lock:
            return {name: model.to_json() for name, model in self._models.items()}

    def restore(self, states: Mapping[str, StateJson]) -> list[str]:
        """Put the versions of another process into service, in this process, and no other ones.

        Args:
            states: what `states` returned there.

        Returns:
            The models whose version is no longer on disk, or fails. Their service here stays as it was.
        """
        with self._lock:
            unknown = [name for name in self._models if name not in states]
        for name in unknown:
            self.remove(name)
            self._models.pop(name, None)
        return [name for name, state in states.items() if not self._restore_one(name, state)]

    def behind(self) -> list[str]:
        """The models whose newest version on disk has neither been loaded nor refused, and is not unloaded."""
        newest = {name: str(versions[0].number) for name, versions in self._on_disk().items()}
        with self._lock:
            known = {name: list(model.entries(name)) for name, model in self._models.items()}
        return [
            name
            for name, version in newest.items()
            if name not in known or (known[name] and version not in [one["version"] for one in known[name]])
        ]

    def load(self, name: str) -> None:
        """Put the newest version on disk into service, in every process.

        Raises:
            NotFound: the folder has no such model.
            LoadFailed: the version cannot be used; the one in service stays.
            Overloaded: the server is stopping.
        """
        self.server.check_running()
        self._coordinate(LOAD, name)

    def unload(self, name: str) -> None:
        """Take a model out of service, in every process. Raises `NotFound`, `Overloaded`."""
        self.server.check_running()
        self._coordinate(UNLOAD, name)

    def prepare(self, name: str) -> str:
        """Open the newest version beside the one in service. Without one in service, an older version may do.

        Returns:
            Its identity, see `Service`.

        Raises:
            NotFound: the folder has no such model.
            LoadFailed: no version can be used.
        """
        try:
            on_disk = self.folder.versions()
        except OSError as error:
            raise LoadFailed(f"the folder of the models cannot be read: {error.strerror}") from None
        versions = on_disk.get(name, ())
        if not versions:
            raise NotFound(f"the folder has no model {short_repr(name)}{self._has(on_disk)}")
        with self._lock:
            model = self._models.setdefault(name, ModelState())
            candidates = versions if model.service is None else versions[:1]
        failed = None
        for version in candidates:
            service = self._open(version)
            if isinstance(service, Service):
                with self._lock:
                    abandoned, model.prepared = model.prepared, service
                    model.failed = failed
                if abandoned is not None:
                    abandoned.close()
                return service.identity
            failed = failed or (str(version.number), service)
        assert failed is not None
        with self._lock:
            model.failed = failed
        raise LoadFailed(f"version {failed[0]} of model '{name}' was refused: {failed[1]}")

    def commit(self, name: str) -> None:
        """Put the prepared version into service."""
        with self._lock:
            model = self._models[name]
            service, model.prepared = model.prepared, None
            assert service is not None
            self._log_change(name, model.service, service)
            replaced, model.service = model.service, service
            self.server.metrics.runtimes[name] = service.runtime
        self._retire(replaced)

    def give_up(self, name: str, reason: str) -> None:
        """Close the prepared version, if there is one; `reason` says why it was given up."""
        with self._lock:
            model = self._models.get(name, ModelState())
            service, model.prepared = model.prepared, None
            if service is not None:
                model.failed = (service.version, reason)
        if service is not None:
            service.close()

    def remove(self, name: str) -> None:
        """Take a model out of service. Raises `NotFound` if neither the server nor the folder has it."""
        on_disk = name in self._on_disk()
        with self._lock:
            model = self._models.get(name)
            if model is None and not on_disk:
                raise NotFound(f"unknown model {short_repr(name)}{self._has(self._models)}")
            service = None if model is None else model.service
            if on_disk:
                self._models[name] = ModelState()
            else:
                self._models.pop(name, None)
            self.server.metrics.runtimes.pop(name, None)
        if service is not None:
            _log.info("model '%s' version %s was unloaded", name, service.version)
        self._retire(service)

    def close(self) -> None:
        """Close all services; requests that wait in a batcher get `Overloaded`."""
        with self._lock:
            services = [*self._retired, *(model.service for model in self._models.values())]
            services += [model.prepared for model in self._models.values()]
        for service in services:
            if service is not None:
                service.close()

    def _apply(self, action: str, name: str) -> None:
        """Do an action in this process, one at a time."""
        with self._one_change:
            if action == UNLOAD:
                self.remove(name)
            else:
                self.prepare(name)
                self.commit(name)

    def _restore_one(self, name: str, state: StateJson) -> bool:
        with self._lock:
            model = self._models.setdefault(name, ModelState())
            present = model.to_json()["serves"]
        wanted, failed = state["serves"], state["failed"]
        if wanted is None and present is not None:
            self.remove(name)
        if wanted not in (None, present):
            service = self._open_identical(name, wanted)
            if service is None:
                return False
            with self._lock:
                model.prepared = service
            self.commit(name)
        with self._lock:
            self._models.setdefault(name, ModelState()).failed = None if failed is None else (failed[0], failed[1])
        return True

    def _open_identical(self, name: str, identity: str) -> Service | None:
        """The service of a version with this identity; None if there is none any more."""
        number = identity.partition(" ")[0]
        for version in self._on_disk().get(name, ()):
            service = self._open(version) if str(version.number) == number else number
            if isinstance(service, Service):
                if service.identity == identity:
                    return service
                service.close()
        return None

    def _open(self, version: ModelVersion) -> Service | str:
        """A service of a version, or the reason why the version cannot be used."""
        try:
            before = version.fingerprint()
            runtime = self._open_version(version.path)
            if version.fingerprint() != before:
                raise Damaged("its files changed while they were read: load it again once they are complete")
            identity = f"{version.number} {runtime.bundle.id} {sha256_bytes(repr(before).encode())}"
            return Service(self.server, runtime, version.model, str(version.number), identity)
        except OSError as error:
            reason = f"its files cannot be read: {error.strerror}"
        except MexitError as error:
            reason = str(error).replace(f"{self.folder.path}/", "")
        except Exception:
            _log.exception("version %s of model '%s' failed", version.number, version.model)
            reason = _BUG
        _log.error("version %s of model '%s' was refused: %s", version.number, version.model, reason)
        return reason

    def _find(self, name: str, version: str | None) -> Service:
        model = self._models.get(name)
        if model is None:
            raise NotFound(f"unknown model {short_repr(name)}{self._has(self._models)}")
        service = model.service
        if model.failed is not None and version == model.failed[0] and (service is None or service.version != version):
            raise Overloaded(f"version {version} of model '{name}' was refused: {model.failed[1]}")
        if service is None:
            why = f"version {model.failed[0]} was refused" if model.failed else self._why_not(name)
            raise NotFound(f"model '{name}' has no version in service: {why}")
        if version not in (None, service.version):
            known = f"it has version {service.version}"
            raise NotFound(f"model '{name}' has no version {short_repr(version)}: {known}")
        return service

    def _why_not(self, name: str) -> str:
        return "unloaded" if name in self._models else "not loaded"

    def _retire(self, service: Service | None) -> None:
        """Close a service once its last request ends."""
        if service is None:
            return
        with self._lock:
            in_use = self._users[service] > 0
            if in_use:
                self._retired.add(service)
            else:
                self._forget(service)
        if not in_use:
            _close(service)

    def _forget(self, service: Service) -> None:
        self._retired.discard(service)
        del self._users[service]

    def _on_disk(self) -> Mapping[str, tuple[ModelVersion, ...]]:
        """The models of the folder; none if it cannot be read."""
        try:
            return self.folder.versions()
        except OSError:
            return {}

    @staticmethod
    def _has(names: Mapping[str, Any]) -> str:
        shown = [f"'{name}'" for name in sorted(names)]
        more = f" and {len(shown) - _SHOWN_NAMES} more" if len(shown) > _SHOWN_NAMES else ""
        return f": this server has {', '.join(shown[:_SHOWN_NAMES])}{more}" if shown else ""

    @staticmethod
    def _log_change(name: str, old: Service | None, new: Service) -> None:
        before = "" if old is None else f", in place of version {old.version}"
        _log.info("model '%s' version %s is in service%s", name, new.version, before)


def _close(service: Service) -> None:
    """Close a version, and free it a little later, when its last request has left the stack."""
    service.close()
    timer = threading.Timer(_FREE_AFTER_S, gc.collect)  # its objects refer to each other, so its engine would stay
    timer.daemon = True
    timer.start()
