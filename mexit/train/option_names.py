"""The options of `mexit train` that set the fields of `TrainSettings`, for messages."""

from __future__ import annotations

# Settings whose option of `mexit train` has another name, and those that have no option.
_OPTION_NAMES = {"options": "--set", "teachers": "--teacher"} | {
    name: name
    for name in (
        "decay_at",
        "decay_factor",
        "momentum",
        "selection_steps",
        "test_steps",
        "steps_done",
        "mean",
        "std",
        "grey_bits",
        "code_sha256",
    )
}


def option_name(setting: str) -> str:
    """The option of `mexit train` that sets a field, such as `--lr-schedule`; the field's name without an option."""
    return _OPTION_NAMES.get(setting, f"--{setting.replace('_', '-')}")
