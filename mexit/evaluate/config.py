"""What `mexit evaluate` is asked to attack, and how hard. No torch: a wrong flag is refused before anything loads.

pgd         the attacks of the papers on every image, and what each budget makes of them
policy      on the thresholds of each budget: routes, the softened policy, Square on the network, Square and RayS
            on the bundle as served, and images made against another run
autoattack  AutoAttack's standard version, on single exits and on each budget
slowdown    images on which a budget leaves late
sanity      accuracy against the radius, and whether the attacks can be believed
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mexit.errors import UsageError

GROUPS = ("pgd", "policy", "autoattack", "slowdown", "sanity")


@dataclass(frozen=True)
class EvaluationConfig:
    """Which attacks, and how hard.

    Attributes:
        groups: of `GROUPS`; "pgd" is always among them.
        exits: those that AutoAttack attacks, from 1; None = all.
        strong_samples: images for every group but "pgd"; None = as many as for "pgd".
        restarts: random starts of PGD and restarts of Square.
        targets: wrong classes that a route tries at each exit.
        queries: of Square, for each image and restart, and of RayS, for each image; `autoattack_steps` of APGD and
            FAB. 5,000 and 100 make the standard version.
        transfer: another run, whose attacks are tried on this one.
    """

    groups: tuple[str, ...] = ("pgd",)
    exits: tuple[int, ...] | None = None
    strong_samples: int | None = 200
    restarts: int = 1
    targets: int = 3
    queries: int = 5000
    autoattack_steps: int = 100
    transfer: Path | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.groups if name not in GROUPS]
        if unknown or not self.groups:
            raise UsageError(
                f"unknown attacks '{', '.join(unknown)}': choose from {', '.join(GROUPS)}, or all; several go "
                "with commas"
            )
        counts = {"--restarts": self.restarts, "--targets": self.targets, "--queries": self.queries}
        counts["--strong-samples"] = 1 if self.strong_samples is None else self.strong_samples
        low = [f"{flag} {value}" for flag, value in counts.items() if value < 1]
        if low:
            raise UsageError(f"found {', '.join(low)}: each must be at least 1")

    def wants(self, group: str) -> bool:
        """Whether a group was asked for."""
        return group in self.groups

    def chosen_exits(self, count: int) -> tuple[int, ...]:
        """The exits for AutoAttack of a network with `count`. Raises `UsageError`."""
        exits = self.exits or tuple(range(1, count + 1))
        if not all(1 <= k <= count for k in exits):
            raise UsageError(f"--exits {','.join(map(str, exits))}: this network has exits 1 to {count}")
        return exits


def read_groups(text: str) -> tuple[str, ...]:
    """`policy,slowdown` or `all`, in the order of `GROUPS`; `EvaluationConfig` rejects unknown names."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if "all" in words:
        return GROUPS
    known = tuple(name for name in GROUPS if name in words or name == "pgd")
    return known + tuple(word for word in words if word not in GROUPS)


def read_exits(text: str | None) -> tuple[int, ...] | None:
    """`1,3` or `all`."""
    if text is None or text == "all":
        return None
    try:
        return tuple(sorted({int(word) for word in text.split(",")}))
    except ValueError:
        raise UsageError(f"--exits takes numbers such as 1,3, or all; found '{text}'") from None
