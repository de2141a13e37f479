"""The environment variables that mexit reads, and how misspelt ones are found."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

PREFIX = "MEXIT_"
SECRETS = ("MEXIT_MQTT", "MEXIT_SOURCE", "MEXIT_TOKEN", "MEXIT_WEBHOOK")  # an address may hold a password
VARIABLES = (
    "MEXIT_BACKEND",
    "MEXIT_BATCHING",
    "MEXIT_BUDGET",
    "MEXIT_CACHE",
    "MEXIT_CAMERAS",
    "MEXIT_CONFIG",
    "MEXIT_COST",
    "MEXIT_DATA",
    "MEXIT_DEVICE",
    "MEXIT_DRAIN",
    "MEXIT_GRPC_PORT",
    "MEXIT_HOST",
    "MEXIT_KEEP_ALIVE",
    "MEXIT_MAX_BODY",
    "MEXIT_MAX_CONNECTIONS",
    "MEXIT_MAX_REQUESTS",
    "MEXIT_NAME",
    "MEXIT_PORT",
    "MEXIT_PROFILE",
    "MEXIT_THREADS",
    "MEXIT_TLS_CERT",
    "MEXIT_TLS_KEY",
    "MEXIT_TOKEN_FILE",
    "MEXIT_WORKERS",
    *SECRETS,
)
_SIMILARITY = 0.75


def unknown_variables(environment: Mapping[str, str]) -> dict[str, str | None]:
    """The `MEXIT_*` variables that mexit does not read, each with the name that is probably meant, or None."""
    given = sorted(name for name in environment if name.upper().startswith(PREFIX) and name not in VARIABLES)
    return {name: _nearest(name) for name in given}


def _nearest(name: str) -> str | None:
    """The variable whose name after `MEXIT_` is most similar, such as MEXIT_DATA for MEXIT_DATA_DIR."""
    word = name.upper()[len(PREFIX) :]
    words = [variable[len(PREFIX) :] for variable in VARIABLES]
    longer = [known for known in words if word.startswith(f"{known}_")]
    near = longer or difflib.get_close_matches(word, words, 1, cutoff=_SIMILARITY)
    return PREFIX + near[0] if near else None
