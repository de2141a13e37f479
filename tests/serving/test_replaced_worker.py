"""A worker that replaces a dead one serves what the others serve, whatever is on disk by then."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import model_versions
import pytest
from servers import Server, serving_workers, start, wait_until, workers_of

from mexit import Runtime
from mexit.serving.limits import Limits
from mexit.serving.model_folder import ModelFolder
from mexit.serving.repository import ModelRepository
from mexit.serving.repository_watch import RepositoryWatch
from mexit.serving.server_state import ServerState

LOAD, INDEX = "/v2/repository/models/{}/load", "/v2/repository/index"


@pytest.fixture
def models(digits_bundle: Path, tmp_path: Path) -> Path:
    """The models `digits` and `other`, each with version 1."""
    for name in ("digits", "other"):
        model_versions.copy(digits_bundle, tmp_path / "models" / name / "1")
    return tmp_path / "models"


def indexes(server: Server) -> list[list[tuple[str, ...]]]:
    """The indexes of four connections, two for each worker."""
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(contextlib.closing(server.connect())) for _ in range(4)]
        answers = []
        for connection in connections:
            connection.request("POST", INDEX)
            answers.append(json.loads(connection.getresponse().read()))
    return [[tuple(entry.values()) for entry in answer] for answer in answers]


def entries(server: Server) -> list[tuple[str, ...]]:
    """The index of both workers, which must be the same."""
    found = indexes(server)
    assert all(index == found[0] for index in found), found
    return found[0]


def replace_a_worker(server: Server) -> None:
    """Kill a worker and wait until two answer."""
    killed = workers_of(server)[0]
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: killed not in workers_of(server))
    wait_until(lambda: len(serving_workers(server)) == 2)


def test_versions_that_the_others_do_not_serve(models: Path, digits_bundle: Path, tmp_path: Path) -> None:
    """Newer versions and models that were not loaded, refused ones, and unloaded models."""
    with start(models, tmp_path, workers=2) as server:
        model_versions.damaged(digits_bundle, models / "digits" / "3")
        assert server.json("POST", LOAD.format("digits"))[0] == 500
        assert server.json("POST", "/v2/repository/models/other/unload")[0] == 200
        model_versions.copy(digits_bundle, models / "digits" / "10")
        model_versions.copy(digits_bundle, models / "new" / "1")
        before = entries(server)
        assert [entry[:3] for entry in before] == [
            ("digits", "1", "READY"),
            ("digits", "3", "UNAVAILABLE"),
            ("new", "1", "UNAVAILABLE"),
            ("other", "1", "UNAVAILABLE"),
        ]
        replace_a_worker(server)
        assert entries(server) == before
        assert server.json("POST", LOAD.format("digits")) == (200, {})
        assert entries(server)[0] == ("digits", "10", "READY", "")


def test_a_version_that_is_no_longer_on_disk(models: Path, digits_bundle: Path, tmp_path: Path) -> None:
    """The other worker goes on with it alone until the next load, and the log says so."""
    model_versions.copy(digits_bundle, models / "digits" / "2")
    with start(models, tmp_path, workers=2) as server:
        shutil.rmtree(models / "digits" / "2")
        killed, kept = workers_of(server)
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: "cannot load what the others serve (digits)" in server.errors)
        wait_until(lambda: workers_of(server) == [kept])
        assert entries(server)[0] == ("digits", "2", "READY", "")
        assert server.json("POST", LOAD.format("digits")) == (200, {})
        wait_until(lambda: len(serving_workers(server)) == 2)
        assert entries(server)[0] == ("digits", "1", "READY", "")
        assert server.stop() == 0


def test_without_another_worker_the_newest_version_is_loaded(models: Path, digits_bundle: Path, tmp_path: Path) -> None:
    model_versions.copy(digits_bundle, models / "digits" / "2")
    with start(models, tmp_path, workers=1) as server:
        shutil.rmtree(models / "digits" / "2")
        model_versions.copy(digits_bundle, models / "new" / "1")
        os.kill(workers_of(server)[0], signal.SIGKILL)
        wait_until(lambda: server.errors != "")
        assert [entry[:3] for entry in entries(server)] == [
            ("digits", "1", "READY"),
            ("new", "1", "UNAVAILABLE"),
            ("other", "1", "READY"),
        ]
        assert server.stop() == 0


def test_the_watch_of_a_replaced_worker(models: Path, digits_bundle: Path, tmp_path: Path) -> None:
    """Worker 0 watches the folder. What comes while it is dead is loaded as well."""
    with start(models, tmp_path, workers=2, watch=True) as server:
        assert server.json("POST", "/v2/repository/models/other/unload")[0] == 200
        os.kill(workers_of(server)[0], signal.SIGKILL)
        model_versions.copy(digits_bundle, models / "digits" / "2")
        wait_until(lambda: all(index[0] == ("digits", "2", "READY", "") for index in indexes(server)))
        wait_until(lambda: len(serving_workers(server)) == 2)
        assert entries(server)[-1] == ("other", "1", "UNAVAILABLE", "unloaded")


@pytest.fixture
def repositories(models: Path) -> Iterator[tuple[ModelRepository, ModelRepository]]:
    """Those of two processes; the first one has loaded all models."""
    folder = ModelFolder(models)
    both = [
        ModelRepository(ServerState(Limits(short_s=0)), folder, lambda path: Runtime.open(path, "full"))
        for _ in range(2)
    ]
    both[0].load_all()
    yield both[0], both[1]
    for repository in both:
        repository.close()
        repository.server.close()


def test_states_are_taken_over(
    repositories: tuple[ModelRepository, ModelRepository], models: Path, digits_bundle: Path
) -> None:
    one, other = repositories
    model_versions.copy(digits_bundle, models / "digits" / "2")
    model_versions.copy(digits_bundle, models / "extra" / "1")
    assert other.restore(json.loads(json.dumps(one.states()))) == []
    assert other.index() == one.index()
    assert other.behind() == one.behind() == ["digits", "extra"]
    kept = other.service("other")
    one.load("digits")
    one.unload("other")
    one.load("extra")
    assert other.restore(one.states()) == []
    assert other.index() == one.index()
    assert other.states() == one.states()
    assert kept.runtime is not one.service("digits").runtime
    one.unload("extra")
    shutil.rmtree(models / "extra")
    one.unload("extra")
    assert other.restore(one.states()) == []
    assert other.index() == one.index()
    assert other.names == ["digits"]


def test_files_that_have_changed_are_another_version(
    repositories: tuple[ModelRepository, ModelRepository], models: Path
) -> None:
    """Calibration replaces the thresholds in place: the number of the version does not tell them apart."""
    one, other = repositories
    policies = models / "digits" / "1" / "policies.json"
    policies.write_bytes(policies.read_bytes())
    assert other.restore(one.states()) == ["digits"]
    assert other.names == ["other"]
    one.load("digits")
    assert other.restore(one.states()) == []
    assert other.names == ["digits", "other"]


def test_a_load_of_an_unknown_model_leaves_nothing(repositories: tuple[ModelRepository, ModelRepository]) -> None:
    """The supervisor lets every process give up a load that failed."""
    one, _ = repositories
    before = one.index()
    one.give_up("none", "there is no such model")
    assert one.index() == before


def test_the_watch_reports_forgotten_models(models: Path) -> None:
    watch = RepositoryWatch(ModelFolder(models))
    watch.forget(["other", "unknown"])
    assert watch.changes() == (["other"], [])
    assert watch.changes() == ([], [])
