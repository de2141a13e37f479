"""The steps of a replacement in one process: requests that have begun, steps of several processes, and giving up."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import model_versions
import pytest
from servers import wait_until

from mexit import Runtime
from mexit.errors import LoadFailed, NotFound, Overloaded
from mexit.serving.limits import Limits
from mexit.serving.model_folder import ModelFolder
from mexit.serving.repository import ModelRepository
from mexit.serving.server_state import ServerState


class ClosedRuntime(Runtime):
    """A runtime that says whether it was closed."""

    closed = False

    def close(self) -> None:
        super().close()
        self.closed = True


def open_version(path: Path) -> Runtime:
    runtime = Runtime.open(path, "full")
    return ClosedRuntime(runtime.bundle, runtime.backend, "full")


@pytest.fixture
def models(digits_bundle: Path, tmp_path: Path) -> Path:
    model_versions.copy(digits_bundle, tmp_path / "models" / "digits" / "1")
    return tmp_path / "models"


@pytest.fixture
def repository(models: Path) -> Iterator[ModelRepository]:
    """A repository with version 1 of `digits` in service."""
    repository = ModelRepository(ServerState(Limits(short_s=0)), ModelFolder(models), open_version)
    repository.load_all()
    yield repository
    repository.close()
    repository.server.close()


def closed(runtime: Runtime) -> bool:
    assert isinstance(runtime, ClosedRuntime)
    return runtime.closed


@pytest.mark.parametrize("action", ["load", "unload"])
def test_the_old_version_closes_after_its_last_request(repository: ModelRepository, action: str) -> None:
    old = repository.service("digits").runtime
    with repository.use("digits") as first:
        with repository.use("digits", "1"):
            (repository.load if action == "load" else repository.unload)("digits")
            assert not closed(old)
        assert not closed(old)
        assert first.runtime is old, "a request keeps the version that it began with"
    assert closed(old)
    if action == "load":
        assert repository.service("digits").runtime is not old


def test_an_idle_version_closes_at_once(repository: ModelRepository) -> None:
    old = repository.service("digits").runtime
    repository.load("digits")
    assert closed(old)


def test_a_closed_version_leaves_memory(repository: ModelRepository) -> None:
    """Its objects refer to each other. The server collects them at once, not when Python happens to."""
    gc.disable()
    old = weakref.ref(repository.service("digits").runtime)
    repository.load("digits")
    try:
        wait_until(lambda: old() is None, within_s=10)
    finally:
        gc.enable()


def test_the_steps_of_several_processes(repository: ModelRepository, models: Path, digits_bundle: Path) -> None:
    """Processes compare what they have prepared. Until `commit`, the old version answers; `give_up` leaves it."""
    other = ModelRepository(ServerState(Limits(short_s=0)), ModelFolder(models), open_version)
    model_versions.copy(digits_bundle, models / "digits" / "2")
    prepared = repository.prepare("digits")
    assert prepared == other.prepare("digits")
    assert repository.service("digits").version == "1"
    repository.commit("digits")
    other.commit("digits")
    assert repository.service("digits").version == other.service("digits").version == "2"
    model_versions.copy(digits_bundle, models / "digits" / "3")
    assert repository.prepare("digits") != prepared
    repository.give_up("digits", "another process could not load it")
    assert repository.service("digits").version == "2"
    with pytest.raises(Overloaded, match="another process could not load it"):
        repository.service("digits", "3")
    assert [entry["version"] for entry in repository.index()] == ["2", "3"]
    other.close()
    other.server.close()


def test_an_action_goes_to_every_process(models: Path) -> None:
    """`load` and `unload` call the function that coordinates processes, and do nothing else."""
    calls: list[tuple[str, str]] = []
    state = ServerState(Limits(short_s=0))
    repository = ModelRepository(
        state, ModelFolder(models), open_version, lambda action, name: calls.append((action, name))
    )
    repository.load("digits")
    repository.unload("digits")
    assert calls == [("load", "digits"), ("unload", "digits")]
    assert repository.names == []
    state.stopping = True
    with pytest.raises(Overloaded, match="stopping"):
        repository.load("digits")
    state.close()


def test_files_that_change_while_they_are_read(models: Path) -> None:
    """Segments of one and thresholds of another version would pass every hash."""

    def changes(path: Path) -> Runtime:
        runtime = open_version(path)
        policies = path / "policies.json"
        policies.write_bytes(policies.read_bytes() + b" ")
        return runtime

    repository = ModelRepository(ServerState(Limits(short_s=0)), ModelFolder(models), changes)
    with pytest.raises(LoadFailed, match="its files changed while they were read"):
        repository.load("digits")
    repository.server.close()


def test_an_unexpected_error_is_no_reason_to_show(models: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fails(path: Path) -> Runtime:
        raise ValueError(f"secret of {path}")

    repository = ModelRepository(ServerState(Limits(short_s=0)), ModelFolder(models), fails)
    with pytest.raises(LoadFailed, match="internal error: the server's log has the details"):
        repository.load("digits")
    assert "secret" not in repository.index()[0]["reason"]
    assert "secret" in caplog.text
    repository.server.close()


def test_a_folder_that_cannot_be_read(repository: ModelRepository, models: Path, tmp_path: Path) -> None:
    """The loaded models stay, and can be unloaded."""
    models.rename(tmp_path / "away")
    with pytest.raises(LoadFailed, match="folder of the models cannot be read"):
        repository.load("digits")
    assert [entry["state"] for entry in repository.index()] == ["READY"]
    repository.unload("digits")
    with pytest.raises(NotFound, match="unknown model 'digits'"):
        repository.service("digits")
