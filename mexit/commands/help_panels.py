"""Groups and order of the options in `--help`, for commands with many options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from typer.core import TyperOption

P = TypeVar("P")
BASIC = "Options"  # the panel that typer prints first, --help included
_LIMITS = {"Limits": "deadline rate burst"}
_MACHINE = "Machine"

# Command to panels, the first one first; panel to names of parameters, in order.
PANELS: Mapping[str, Mapping[str, str]] = {
    "train": {
        BASIC: "data data_dir model minutes epochs robust freeze finetune out resume json",
        "Data": "size channels augment flip group split_seed train_fraction omit_class",
        "Method": "preset method option weights teacher exit_weights label_smoothing trades awp ema",
        "Attack": "attack eps step steps norm rule loss restarts short_attack_until average_attack_until",
        "Optimiser": "batch lr lr_schedule warmup weight_decay recompute_norms keep validate_every seed",
        _MACHINE: "device threads workers precision tensorboard",
        "Switches": "nesterov decay_norms craft_train_mode cache graphs",
    },
    "evaluate": {
        BASIC: "data_dir samples budgets attacks report json",
        "Attacks": "eps steps restarts strong_samples targets queries exits transfer",
        _MACHINE: "backend threads device batch",
    },
    "export": {
        BASIC: "out data_dir replace attack json",
        "Content": "exits profile precision single_file triton with_images no_calibrate",
        _MACHINE: "device trt trust_engines",
    },
    "calibrate": {
        BASIC: "data data_dir budget attack json",
        "Thresholds": "measure ensemble policy",
        "Certificates": "max_risk confidence loss risk_method max_cost target_drop",
        "Unsure answers": "max_error reject_from max_unknown",
        _MACHINE: "backend threads device cost",
    },
    "run": {BASIC: "budget json", **_LIMITS, _MACHINE: "backend threads cost profile"},
    "serve": {
        BASIC: "budget host port grpc_port token name watch cameras",
        "Access": "token_file tls_cert tls_key",
        **_LIMITS,
        "Limits of each client": "client_rate client_burst",
        "Limits of the server": "max_body max_connections max_requests keep_alive drain",
        "Changed data": "watch_drift on_drift",
        _MACHINE: "backend threads workers batching cost profile",
        "Several machines": "ray min_replicas max_replicas",
    },
    "camera": {
        BASIC: "source config budget out jsonl mqtt webhook limit insecure json",
        "Steady answers": "region run interval motion reuse votes hold",
        "Outputs": "events jsonl_mb jsonl_keep segment out_mb save_unsure save_unsure_mb mqtt_topic",
        **_LIMITS,
        _MACHINE: "backend threads cost profile",
    },
}


def arrange(command: str | None, parameters: Sequence[P]) -> list[P]:
    """Put the options of a command into their panels.

    Args:
        command: its name; one without panels stays as it is.
        parameters: of the command, parameters of click or typer; `rich_help_panel` of the options is set.

    Returns:
        Arguments first, then the options in the order of the panels.
    """
    places = {
        name: (place, panel) for place, (panel, name) in enumerate(_names(PANELS.get(command or "", {})), start=1)
    }
    found = [(*places.get(getattr(parameter, "name", ""), (0, BASIC)), parameter) for parameter in parameters]
    for _, panel, parameter in found:
        if panel != BASIC and isinstance(parameter, TyperOption):
            parameter.rich_help_panel = panel
    return [parameter for _, _, parameter in sorted(found, key=lambda entry: entry[0])]


def _names(panels: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(panel, name) for panel, names in panels.items() for name in names.split()]
