"""What a replaced calibration had and the new one has not, with the command that restores it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mexit.calibrate.certificates import CertificateRequest
from mexit.core.budget import CERTIFIED, TARGET, exact_macs
from mexit.core.policies_file import PARITY, Policies, PolicyEntry
from mexit.core.printable import shell_path

_DEFAULT = CertificateRequest(0.5)  # the defaults of options


@dataclass(frozen=True)
class LostSettings:
    """What the new calibration of one engine lacks.

    Attributes:
        text: one sentence.
        command: calibrates the engine with the settings of both calibrations.
    """

    text: str
    command: str


@dataclass(frozen=True)
class _Setting:
    """A setting in words, and the options of `mexit calibrate` that make it."""

    words: str
    options: tuple[str, ...]


def lost_settings(before: Policies, after: Policies, bundle: Path) -> tuple[LostSettings, ...]:
    """Compare the settings of two calibrations: reject option, certificates and the user's own budgets.

    Args:
        before: the replaced policies.
        after: the new ones, perhaps of other engines or of another model.
        bundle: for the commands.

    Returns:
        One item for each engine that had something which `after` has not.
    """
    new = {_engine(entry): entry for entry in after.entries}
    lost = [_lost_by(entry, new.get(_engine(entry)), bundle) for entry in before.entries]
    return tuple(one for one in lost if one is not None)


def _engine(entry: PolicyEntry) -> str:
    """The engine as typed after `--backend`."""
    return entry.engine if entry.precision == PARITY else f"{entry.engine}:{entry.precision}"


def _lost_by(old: PolicyEntry, new: PolicyEntry | None, bundle: Path) -> LostSettings | None:
    """What the new calibration of an engine lacks, None without one; None if it lacks nothing."""
    had, has = _settings(old), {} if new is None else _settings(new)
    words = [setting.words for name, setting in had.items() if name not in has]
    if new is None:
        words.insert(0, "thresholds")
    if not words:
        return None
    options = [option for setting in (had | has).values() for option in setting.options]
    confidence = _confidence(new) or _confidence(old) or _DEFAULT.confidence
    if confidence != _DEFAULT.confidence:
        options += ["--confidence", f"{confidence:g}"]
    typed = [option if option.startswith("--") else shell_path(option) for option in options]
    command = ["mexit calibrate", shell_path(bundle), "--backend", _engine(old), *typed]
    listed = " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
    return LostSettings(
        f"removed: {listed}, which the replaced calibration for {_engine(old)} had; this command restores it:",
        " ".join(command),
    )


def _settings(entry: PolicyEntry) -> dict[str, _Setting]:
    """The settings of a calibration by name."""
    found = {}
    if (terms := entry.reject) is not None:
        bound = ("--max-error", f"{terms.max_error:g}")
        found["reject"] = _Setting(f"the reject option (at most {terms.max_error:.2%} wrong answers)", bound)
        if terms.max_unknown is not None:
            others = ("--reject-from", terms.reject_from or "folder:PATH", "--max-unknown", f"{terms.max_unknown:g}")
            found["unknown"] = _Setting("its bound for pictures of other things", others)
    for one in entry.certificates:
        name, risk = one.get("name") or CERTIFIED, f"{one['max_risk']:g}"
        options: tuple[str, ...] = ("--target-drop", risk) if name == TARGET else ("--max-risk", risk)
        if name != TARGET and one["loss"] != _DEFAULT.loss:
            options = (*options, "--loss", one["loss"])
        if one.get("max_macs") is not None:
            options = (*options, "--max-cost", exact_macs(one["max_macs"]))
        found[name] = _Setting(f"the budget {name} with its certificate", options)
    for name, text in (entry.budgets or {}).items():
        found[f"budget {name}"] = _Setting(f"the budget {name}", ("--budget", f"{name}={text}"))
    return found


def _confidence(entry: PolicyEntry | None) -> float | None:
    """The confidence of the reject option and the certificates, which have the same; None without them."""
    if entry is None:
        return None
    stated = [*([entry.reject.confidence] if entry.reject else []), *(one["confidence"] for one in entry.certificates)]
    return stated[0] if stated else None
