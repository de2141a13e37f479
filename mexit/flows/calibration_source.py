"""The samples that a bundle is calibrated on, and the attack that is made on them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mexit.core.bundle import Bundle
from mexit.core.progress import Progress
from mexit.core.trace import UNKNOWN
from mexit.data import registry
from mexit.data.dataset import DataSet
from mexit.data.groups import default_group, find_groups
from mexit.data.splits import Splits, split
from mexit.errors import BadInput, MexitError, MissingExtra, NotFound, StalePolicy, UsageError, requires_extra
from mexit.flows.sample_sources import Attack, BundleSource, DatasetSource, SampleSource, UnlabelledSource

if TYPE_CHECKING:
    from mexit.evaluate.target import GradientSource

IN_BUNDLE = "bundle"
NO_ATTACK = "no attack was asked for"


def default_attack(settings: Any) -> str:
    """The attack to measure under, by the settings of a run: "none" if it was trained on clean images."""
    trained_clean = isinstance(settings, Mapping) and settings.get("attack") == "none"
    return "none" if trained_clean else "average"


def choose_source(
    bundle: Bundle, data: str | None, data_dir: str | Path | None, attack: str, device: str, progress: Progress
) -> tuple[SampleSource, str]:
    """The samples to calibrate a bundle on: the named data; by default its own data set, else the images in it.

    Args:
        bundle: the bundle.
        data: name of the data; None = default, "bundle" = the images in the bundle.
        data_dir: directory of data sets.
        attack: attack to measure under, or "none".
        device: device of the torch network that crafts the attack: "auto", "cpu" or "cuda".
        progress: receives notes.

    Returns:
        The samples, and the reason why none are attacked (empty if some are).

    Raises:
        UsageError: the bundle has no images but they were named, or the device does not exist.
        NotFound, Damaged, BadInput: the data cannot be used.
    """
    in_bundle = BundleSource.of(bundle)
    if data == IN_BUNDLE or (
        data is None and in_bundle is not None and not registry.bundle_data_is_readable(bundle, data_dir)
    ):
        if in_bundle is None:
            raise UsageError(f"{bundle.path} carries no images: mexit export --with-calibration-images puts them in")
        progress.note(f"using the images in {bundle.path}")
        why_not = "" if in_bundle.attacked("certification") else "the bundle carries no attacked images"
        return in_bundle, NO_ATTACK if attack == "none" else why_not
    pictures = None if data is None else registry.load_unlabelled(data)
    if pictures is not None:
        progress.note(f"{data} has no labels: of its {len(pictures)} pictures half calibrate and half certify")
        why_not = NO_ATTACK if attack == "none" else f"{data} has no labels to attack"
        return UnlabelledSource.of(pictures, bundle.manifest.input, progress=progress), why_not
    data_set, splits = _load_data(bundle, data, data_dir, progress)
    crafted, why_not = None, NO_ATTACK
    if attack != "none" and data is None:
        crafted, why_not = _attack(bundle, attack, device)
    elif attack != "none":
        why_not = f"{data} is not the data that the run was trained on"
    return DatasetSource(data_set, splits, bundle.manifest.input, crafted), why_not


def _attack(bundle: Bundle, objective: str, device: str) -> tuple[Attack | None, str]:
    """The test attack of the run behind a bundle, or None and the reason. Raises `UsageError` for a missing device."""
    try:
        with requires_extra("train", "Attacking a network"):
            from mexit.evaluate.target import GradientSource  # torch is optional for calibration
        source = GradientSource.of_bundle(bundle)
    except (MissingExtra, NotFound, StalePolicy) as error:
        return None, str(error)
    except MexitError as error:
        return None, f"the run behind {bundle.path} cannot be used: {error}"
    return network_attack(source.to(device), objective), ""


def network_attack(source: GradientSource, objective: str) -> Attack:
    """The test attack of a run with the gradients of its network."""
    from mexit.train.validation import attack_images  # torch is optional for calibration

    attack = source.settings.test_attack(objective)
    return Attack(attack.describe(), partial(attack_images, source.model, attack=attack))


def _load_data(
    bundle: Bundle, data: str | None, data_dir: str | Path | None, progress: Progress
) -> tuple[DataSet, Splits]:
    """The named data set, or the bundle's own, with the stored splits or new ones."""
    if data is None:
        return registry.load_bundle_data(bundle, data_dir)
    data_set = registry.load(data, data_dir).with_classes(bundle.manifest.classes, str(bundle.path))
    stored = bundle.manifest.splits
    own = stored is not None and data_set.sha256 == stored.sha256
    if own:
        return data_set, Splits.of_bundle(bundle)
    splits = split(data_set, find_groups(data_set, default_group(data), progress))
    if splits.grouping:
        progress.note(splits.grouping)
    return data_set, splits


def unknown_source(
    bundle: Bundle, name: str | None, data_dir: str | Path | None, progress: Progress
) -> UnlabelledSource | None:
    """Pictures of other things for the reject option, or None without a name.

    Raises:
        NotFound, Damaged: the pictures cannot be read.
        BadInput: there are fewer than two pictures or groups; one half selects, the other one tests.
    """
    if name is None:
        return None
    source = UnlabelledSource.of(registry.load_any(name, data_dir), bundle.manifest.input, UNKNOWN, progress)
    if source.count < 2:
        raise BadInput(f"--reject-from {name} has {source.count} picture or group of pictures, at least 2 are needed")
    return source
