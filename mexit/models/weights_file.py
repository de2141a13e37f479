"""Loads a file of pretrained weights into a torch module, without executing what the file holds."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mexit.errors import Damaged, NotFound, UsageError

_SHOWN = 4
_WRAPPERS = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before each name


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a file of weights into a module: safetensors, or a state dict that `torch.save` wrote.

    A last linear layer of another number of classes keeps its own weights.

    Raises:
        NotFound: the file does not exist.
        Damaged: it cannot be read, or holds other objects than tensors, or values that are not finite.
        UsageError: its tensors are those of another network.
    """
    own = module.state_dict()
    found = _without_wrappers(_read(path), own)
    _keep_classifier(module, found, own)
    if wrong := _differences(found, own):
        raise UsageError(
            f"--weights {path} holds tensors of another network: {'; '.join(wrong)}. Give the weights of the network "
            "named by --model, with the names of its own state_dict()"
        )
    not_finite = sorted(name for name, value in found.items() if not bool(torch.isfinite(value).all()))
    if not_finite:
        raise Damaged(f"--weights {path} holds values that are not finite, in {_first(not_finite)}")
    module.load_state_dict(found, strict=False)


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name."""
    if not path.is_file():
        problem = "is not a file" if path.exists() else "does not exist"
        raise NotFound(f"--weights {path} {problem}: give a file of safetensors or a state dict of torch.save")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _load_state_dict(path)
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise Damaged(f"--weights {path} cannot be read, is it complete? {reason}") from None
    except Exception:  # UnpicklingError and others, whose text advises to execute the file
        raise Damaged(
            f"--weights {path} is no plain state dict but holds code or classes, which are not loaded: save the "
            "tensors alone with torch.save(model.state_dict(), FILE)"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise Damaged(f"--weights {path} holds no state dict: save it with torch.save(model.state_dict(), FILE)")
    return {str(name): value for name, value in content.items()}


def _load_state_dict(path: Path) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the pickle protocol of files that are refused
        return torch.load(path, map_location="cpu", weights_only=True)


def _without_wrappers(found: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the prefix that a wrapper put before every name, if the module's own names have none."""
    for prefix in _WRAPPERS:
        is_own = any(name.startswith(prefix) for name in own)
        if found and not is_own and all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


def _keep_classifier(module: nn.Module, found: dict[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Put the module's own last linear layer into `found` where that differs in the number of classes alone."""
    last = next((name for name, layer in reversed(list(module.named_modules())) if isinstance(layer, nn.Linear)), None)
    names = [name for name in (f"{last}.weight", f"{last}.bias") if name in own and name in found]
    if all(own[name].shape[1:] == found[name].shape[1:] for name in names):
        found |= {name: own[name] for name in names if own[name].shape != found[name].shape}


def _differences(found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """How the names and shapes differ from the module's own, in words; empty if they fit."""
    missing = sorted(name for name in own.keys() - found.keys() if not name.endswith("num_batches_tracked"))
    shapes = sorted(name for name in own.keys() & found.keys() if own[name].shape != found[name].shape)
    wrong = {"missing": missing, "unexpected": sorted(found.keys() - own.keys()), "of another shape": shapes}
    return [f"{len(names)} {what} ({_first(names)})" for what, names in wrong.items() if names]


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
