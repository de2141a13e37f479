"""The model repository of a server: several models, versions, load and unload, and versions that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import model_versions
import numpy as np
import pytest
import tritonclient.http as triton
from numpy.typing import NDArray
from servers import Server, infer_body, outputs_of, refused, start, wait_until

from mexit import Runtime

Images = NDArray[np.float32]


@pytest.fixture(scope="session")
def other_bundle(mixed_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`mixed_bundle` with other weights and other thresholds."""
    return model_versions.changed(mixed_bundle, tmp_path_factory.mktemp("other") / "digits")


@pytest.fixture
def folder(mixed_bundle: Path, other_bundle: Path, tmp_path: Path) -> Path:
    """Version 2 of `digits`, and the model `letters` without versions, which answers otherwise."""
    models = tmp_path / "models"
    model_versions.copy(mixed_bundle, models / "digits" / "2")
    model_versions.copy(other_bundle, models / "letters")
    return models


def answer(server: Server, path: str, images: Images, **headers: str) -> tuple[int, Any]:
    status, value = server.json("POST", f"/v2/models/{path}/infer", infer_body(images), headers)
    return status, value


def index(server: Server) -> list[tuple[str, str, str, str]]:
    entries = server.json("POST", "/v2/repository/index")[1]
    return [(entry["name"], entry["version"], entry["state"], entry["reason"]) for entry in entries]


def assert_answers(value: Any, bundle: Path, images: Images) -> None:
    expected = Runtime.open(bundle, "medium")(images)
    outputs = outputs_of(value)
    probabilities = np.array([one.probabilities for one in expected]).astype(np.float32)
    np.testing.assert_array_equal(np.array(outputs["probabilities"], np.float32), probabilities.ravel())
    assert outputs["exit"] == [one.exit for one in expected]
    assert outputs["macs"] == [one.macs for one in expected]


def test_two_models_in_one_folder(
    folder: Path, mixed_bundle: Path, other_bundle: Path, tmp_path: Path, images: Images
) -> None:
    """Each model answers as its own bundle, and has metadata, statistics and series of its own."""
    few = images[:8]
    with start(folder, tmp_path) as server:
        for name, bundle in (("digits", mixed_bundle), ("letters", other_bundle)):
            status, value = answer(server, name, few)
            assert (status, value["model_name"]) == (200, name)
            assert_answers(value, bundle, few)
            assert server.series("mexit_predictions_total", model=name) == len(few)
            assert server.series("mexit_request_duration_seconds_count", model=name, route="infer") == 1
        assert index(server) == [("digits", "2", "READY", ""), ("letters", "1", "READY", "")]
        assert server.json("GET", "/v2/models/digits")[1]["versions"] == ["2"]
        statistics = server.json("GET", "/v2/models/stats")[1]["model_stats"]
        assert [(one["name"], one["version"], one["inference_count"]) for one in statistics] == [
            ("digits", "2", 8),
            ("letters", "1", 8),
        ]
        assert server.json("GET", "/v2/models/numbers") == (
            404,
            {"error": "unknown model 'numbers': this server has 'digits', 'letters'"},
        )


def test_classify_names_its_model(folder: Path, tmp_path: Path, sample_png: bytes) -> None:
    with start(folder, tmp_path) as server:
        status, value = server.json("POST", "/v1/classify", sample_png)
        assert (status, "?model=digits" in value["error"]) == (400, True)
        assert server.json("POST", "/v1/classify?model=letters", sample_png)[0] == 200
        assert server.json("POST", "/v1/classify?model=numbers", sample_png)[0] == 404
        server.json("POST", "/v2/repository/models/digits/unload")
        assert server.json("POST", "/v1/classify", sample_png)[0] == 200, "one model is left"


def test_the_highest_number_is_the_version(
    mixed_bundle: Path, other_bundle: Path, tmp_path: Path, images: Images
) -> None:
    """10 is newer than 2. Folders that are no numbers, begin with 0 or hold no bundle are ignored."""
    models = tmp_path / "models"
    for name in ("2", "011", "latest", "12a"):
        model_versions.copy(mixed_bundle, models / "digits" / name)
    model_versions.copy(other_bundle, models / "digits" / "10")
    (models / "digits" / "99").mkdir()
    model_versions.copy(mixed_bundle, models / ".hidden" / "1")
    (models / "notes.txt").write_text("no model")
    with start(models, tmp_path) as server:
        assert index(server) == [("digits", "10", "READY", "")]
        status, value = answer(server, "digits/versions/10", images[:4])
        assert (status, value["model_version"]) == (200, "10")
        assert_answers(value, other_bundle, images[:4])
        for version in ("2", "011", "99", "-1"):
            message = f"model 'digits' has no version '{version}': it has version 10"
            assert answer(server, f"digits/versions/{version}", images[:1]) == (404, {"error": message})


def test_tritonclient_loads_and_unloads(folder: Path, mixed_bundle: Path, tmp_path: Path, images: Images) -> None:
    """After unload: 404, as Triton answers; the index says why. Load puts the newest version on disk into service."""
    with start(folder, tmp_path) as server, triton.InferenceServerClient(server.address) as client:
        assert "model_repository" in client.get_server_metadata()["extensions"]
        client.unload_model("digits")
        assert not client.is_model_ready("digits")
        status, value = answer(server, "digits", images[:1])
        assert (status, value) == (404, {"error": "model 'digits' has no version in service: unloaded"})
        assert index(server)[0] == ("digits", "2", "UNAVAILABLE", "unloaded")
        ready = server.json("POST", "/v2/repository/index", {"ready": True})[1]
        assert [entry["name"] for entry in ready] == ["letters"]
        client.unload_model("digits")  # has no effect
        model_versions.copy(mixed_bundle, folder / "digits" / "3")
        client.load_model("digits")
        assert client.is_model_ready("digits", "3")
        assert not client.is_model_ready("digits", "2")
        assert answer(server, "digits", images[:1])[0] == 200
        with pytest.raises(triton.InferenceServerException, match="no model 'numbers'"):
            client.load_model("numbers")
        with pytest.raises(triton.InferenceServerException, match="unknown model 'numbers'"):
            client.unload_model("numbers")
        with pytest.raises(triton.InferenceServerException, match="'config' is not supported"):
            client.load_model("digits", config="{}")
        assert server.stop() == 0


def test_load_reads_no_other_folders(folder: Path, tmp_path: Path, mixed_bundle: Path) -> None:
    """Only names of models in the folder can be loaded, however they are written."""
    model_versions.copy(mixed_bundle, folder / ".hidden" / "1")
    with start(folder, tmp_path) as server:
        for name in ("..", "%2e%2e%2fdigits", ".hidden", "digits%2f2", "digits%00", "a" * 300):
            assert server.ask("POST", f"/v2/repository/models/{name}/load", b"")[0] == 404, name


def test_a_damaged_version_is_refused(folder: Path, mixed_bundle: Path, tmp_path: Path, images: Images) -> None:
    """The version in service continues; answer, index and log have the reason, without the path of the folder."""
    model_versions.damaged(mixed_bundle, folder / "digits" / "3")
    reason = "bundle file digits/3/segments/fp32/2.onnx was changed: its sha256 is not the recorded one"
    with start(folder, tmp_path) as server:  # as at a restart: version 2 answers, because 3 cannot
        for _ in range(2):
            versions = [entry for entry in index(server) if entry[0] == "digits"]
            assert [entry[:3] for entry in versions] == [("digits", "2", "READY"), ("digits", "3", "UNAVAILABLE")]
            assert reason in versions[1][3]
            assert reason in server.errors
            status, value = answer(server, "digits", images[:4])
            assert (status, value["model_version"]) == (200, "2")
            assert_answers(value, mixed_bundle, images[:4])
            status, value = answer(server, "digits/versions/3", images[:4])
            assert (status, reason in value["error"]) == (503, True)
            status, value = server.json("POST", "/v2/repository/models/digits/load")
            assert (status, reason in value["error"], str(tmp_path) in value["error"]) == (500, True, False)
        model_versions.copy(mixed_bundle, folder / "digits" / "4")
        assert server.json("POST", "/v2/repository/models/digits/load") == (200, {})
        assert index(server)[0] == ("digits", "4", "READY", "")


def test_a_changed_bundle_without_versions_is_replaced_or_refused(
    bundle_copy: Path, other_bundle: Path, tmp_path: Path, images: Images
) -> None:
    """A single bundle is loaded again from its path. If it is damaged by then, the loaded content still answers."""
    with start(bundle_copy, tmp_path, name="numbers") as server:
        policies = bundle_copy / "policies.json"
        policies.write_bytes(policies.read_bytes()[:-40])
        assert server.json("POST", "/v2/repository/models/numbers/load")[0] == 500
        [(name, version, state, reason)] = index(server)
        assert (name, version, state) == ("numbers", "1", "READY")
        assert reason.startswith("not replaced: ")
        assert answer(server, "numbers", images[:1])[0] == 200
        bundle_copy.rename(tmp_path / "before")
        model_versions.copy(other_bundle, bundle_copy)
        assert server.json("POST", "/v2/repository/models/numbers/load") == (200, {})
        assert index(server) == [("numbers", "1", "READY", "")]
        assert_answers(answer(server, "numbers", images[:4])[1], other_bundle, images[:4])


def test_only_the_first_token_loads(folder: Path, tmp_path: Path, images: Images) -> None:
    with start(folder, tmp_path, token="one,two") as server:
        for action in ("load", "unload"):
            path = f"/v2/repository/models/digits/{action}"
            assert server.ask("POST", path, b"")[0] == 401
            assert server.ask("POST", path, b"", {"Authorization": "Bearer two"})[0] == 403
        assert answer(server, "digits", images[:1], Authorization="Bearer two")[0] == 200
        assert server.ask("POST", path, b"", {"Authorization": "Bearer one"})[0] == 200
        assert answer(server, "digits", images[:1], Authorization="Bearer two")[0] == 404


def test_models_share_the_rate_limit(folder: Path, tmp_path: Path, images: Images) -> None:
    """What one model spends, the other lacks."""
    cost = max(prediction.macs for prediction in Runtime.open(folder / "letters")(images[:1], budget="full"))
    with start(folder, tmp_path, rate="1", burst=str(2 * cost), deadline_ms=50.0) as server:
        assert answer(server, "digits", images[:1])[0] == 200
        statuses = [answer(server, name, images[:1])[0] for name in ("letters", "digits") * 4]
        assert statuses[-2:] == [503, 503]
        assert server.series("mexit_macs_total") <= 2 * cost


@pytest.mark.slow
def test_watch(folder: Path, mixed_bundle: Path, other_bundle: Path, tmp_path: Path, images: Images) -> None:
    """New versions and models are loaded, damaged ones refused, removed models unloaded, without a request."""
    with start(folder, tmp_path, watch=True) as server:
        model_versions.copy(other_bundle, folder / "digits" / "3")
        wait_until(lambda: ("digits", "3", "READY", "") in index(server))
        assert_answers(answer(server, "digits", images[:4])[1], other_bundle, images[:4])
        model_versions.damaged(mixed_bundle, folder / "digits" / "4")
        wait_until(lambda: ("digits", "4", "UNAVAILABLE") in [entry[:3] for entry in index(server)])
        assert answer(server, "digits", images[:1])[1]["model_version"] == "3"
        model_versions.copy(mixed_bundle, folder / "numbers")
        wait_until(lambda: ("numbers", "1", "READY", "") in index(server))
        (folder / "letters").rename(tmp_path / "letters")
        wait_until(lambda: answer(server, "letters", images[:1])[0] == 404)
        assert "letters" not in [entry[0] for entry in index(server)]
        assert server.stop() == 0


def test_a_folder_without_a_usable_model(mixed_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty holds no model: expected bundle.json in it" in refused(tmp_path / "empty", tmp_path)
    model_versions.copy(mixed_bundle, tmp_path / "models" / "digits")
    assert "--name is for a single bundle" in refused(tmp_path / "models", tmp_path, name="numbers")
    (tmp_path / "bad" / "digits").mkdir(parents=True)
    model_versions.damaged(mixed_bundle, tmp_path / "bad" / "digits" / "1")
    assert "version 1 of model 'digits' was refused" in refused(tmp_path / "bad", tmp_path)


@pytest.mark.parametrize("body", [b"[]", b'{"parameters": 1}', b'{"parameters": {"file:1/model.onnx": "AA=="}}'])
def test_bad_load_bodies(server: Server, body: bytes) -> None:
    status, value = server.json("POST", "/v2/repository/models/digits/load", body)
    assert (status, list(value)) == (400, ["error"])
    assert server.json("POST", "/v2/repository/index", b'{"ready": 1}')[0] == 400
