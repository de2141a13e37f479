"""Watches the folder of the models: loads new and changed versions, and unloads models whose folder is gone."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable

from mexit.errors import MexitError
from mexit.serving.model_folder import FileState, ModelFolder, ModelVersion

INTERVAL_S = 1.0

_log = logging.getLogger("mexit.server")


class RepositoryWatch:
    """Compares the folder with its state at the last look. A version that fails is tried again once it has changed."""

    def __init__(self, folder: ModelFolder) -> None:
        """Note the present state; create the watch before the models are opened, so that no change is missed."""
        self._folder = folder
        self._seen = {name: _state(versions) for name, versions in folder.versions().items()}
        self._missing: set[str] = set()
        self._stop = threading.Event()

    def start(self, load: Callable[[str], object], unload: Callable[[str], object]) -> threading.Thread:
        """Look every `INTERVAL_S` seconds, in a thread, until `stop`.

        Args:
            load, unload: load and unload a model of the given name; `MexitError`s are theirs to log.
        """
        thread = threading.Thread(target=self._run, args=(load, unload), name="mexit-watch", daemon=True)
        thread.start()
        return thread

    def stop(self) -> None:
        """End the thread after its present look."""
        self._stop.set()

    def forget(self, names: Iterable[str]) -> None:
        """Report these models at the next look, also if they do not change."""
        for name in names:
            self._seen.pop(name, None)

    def changes(self) -> tuple[list[str], list[str]]:
        """The models to load and those to unload since the last look. Raises `OSError` if the folder is not readable.

        A model must be missing in two looks in a row: a replacement may remove the old folder first.
        """
        present = self._folder.versions()
        states = {name: _state(versions) for name, versions in present.items()}
        changed = [name for name, state in states.items() if state is not None and state != self._seen.get(name)]
        gone = [name for name in self._seen if name not in present]
        unload = [name for name in gone if name in self._missing]
        self._missing = set(gone)
        self._seen |= {name: states[name] for name in changed}
        for name in unload:
            del self._seen[name]
        return changed, unload

    def _run(self, load: Callable[[str], object], unload: Callable[[str], object]) -> None:
        while not self._stop.wait(INTERVAL_S):
            try:
                changed, gone = self.changes()
            except OSError as error:
                _log.warning("the folder of the models cannot be read: %s", error.strerror)
                continue
            for action, names in ((load, changed), (unload, gone)):
                for name in names:
                    _try(action, name)


def _try(action: Callable[[str], object], name: str) -> None:
    try:
        action(name)
    except MexitError:
        pass  # the repository has logged it
    except Exception:
        _log.exception("the watch of model '%s' failed", name)


def _state(versions: tuple[ModelVersion, ...]) -> tuple[int, tuple[FileState, ...]] | None:
    """The newest version and its files; None while they come or go."""
    try:
        return versions[0].number, versions[0].fingerprint()
    except OSError:
        return None
