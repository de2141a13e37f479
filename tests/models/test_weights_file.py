"""Files of pretrained weights."""

from __future__ import annotations

import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mexit import Damaged, NotFound, UsageError
from mexit.models.weights_file import load_weights


def module() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 6))


@pytest.mark.parametrize("file", ["w.safetensors", "w.pth"])
def test_weights_are_loaded_and_a_classifier_of_other_classes_is_left_out(tmp_path: Path, file: str) -> None:
    path, source, target = tmp_path / file, module(), module()
    state = source.state_dict() | {"3.weight": torch.rand(9, 4), "3.bias": torch.rand(9)}
    save_file(state, path) if file.endswith("safetensors") else torch.save({"state_dict": state}, path)
    classifier = target[3].weight.detach().clone()
    load_weights(target, path)
    assert torch.equal(target[0].weight, source[0].weight)
    assert torch.equal(target[3].weight, classifier)


def test_weights_of_another_network_name_the_first_tensors(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"0.weight": torch.rand(4, 3, 5, 5), "stem.weight": torch.rand(2)}, path)
    with pytest.raises(UsageError, match=r"missing \(0.bias, .*unexpected \(stem.weight\).*another shape \(0.weight\)"):
        load_weights(module(), path)


def test_a_file_with_objects_is_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(module(), path)
    with pytest.raises(Damaged, match="no plain state dict"):
        load_weights(module(), path)
    path.write_bytes(b"no weights")
    with pytest.raises(Damaged):
        load_weights(module(), path)
    with pytest.raises(NotFound, match="does not exist"):
        load_weights(module(), tmp_path / "gone.pth")


class _Code:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_executed_and_nothing_advises_to_execute_it(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "w.pth"
    content = {"0.weight": _Code(tmp_path / "executed")}
    torch.save(content, path) if zipped else path.write_bytes(pickle.dumps(content))
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with pytest.raises(Damaged, match="holds code or classes, which are not loaded") as found:
            load_weights(module(), path)
    assert not shown
    assert not (tmp_path / "executed").exists()
    assert "weights_only" not in str(found.value)


@pytest.mark.parametrize("file", ["w.safetensors", "w.pth"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_an_incomplete_file_is_damaged(tmp_path: Path, file: str, share: float) -> None:
    path = tmp_path / file
    save_file(module().state_dict(), path) if file.endswith("safetensors") else torch.save(module().state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(Damaged, match=r"is it complete\? \w"):
        load_weights(module(), path)


def test_a_folder_is_not_a_file_of_weights(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="is not a file"):
        load_weights(module(), tmp_path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_the_prefix_of_a_wrapper_is_removed_unless_it_is_the_networks_own(tmp_path: Path, prefix: str) -> None:
    path, source = tmp_path / "w.safetensors", module()
    save_file({f"{prefix}{name}": value for name, value in source.state_dict().items()}, path)
    plain, own = module(), nn.ModuleDict({prefix.removesuffix("."): module()})
    for target in (plain, own):
        load_weights(target, path)
        assert torch.equal(next(target.parameters()), source[0].weight)


def test_a_last_layer_that_reads_other_features_belongs_to_another_network(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(module().state_dict() | {"3.weight": torch.rand(6, 5)}, path)
    with pytest.raises(UsageError, match=r"1 of another shape \(3.weight\)"):
        load_weights(module(), path)


def test_weights_that_are_not_finite_are_damaged(tmp_path: Path) -> None:
    path, state = tmp_path / "w.pth", module().state_dict()
    state["0.weight"][0, 0, 0, 0] = torch.nan
    torch.save(state, path)
    with pytest.raises(Damaged, match=r"not finite, in 0\.weight"):
        load_weights(module(), path)
