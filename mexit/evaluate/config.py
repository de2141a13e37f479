"""Which attacks an evaluation runs, and how strong they are.

The groups of attacks, as typed after `--attacks`:

pgd         the attacks of RDI-Nets and NEO-KD on every image
policy      attacks on the thresholds of each budget: routes, the softened policy, Square on the network, Square and
            RayS on the served bundle
autoattack  the standard version of AutoAttack, on single exits and on each budget
slowdown    images on which a budget exits late
sanity      accuracy against the radius, and whether the attacks can be trusted
corruptions the 15 common corruptions at 5 severities, on every image; not an attack, and not part of the worst case

No group (`--attacks none` or `clean`) evaluates clean images alone, the default for a run trained on clean images.

This module imports no torch, so wrong flags are rejected before anything is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from mexit.core.resource_limits import check_threads
from mexit.errors import UsageError

GROUPS = ("pgd", "policy", "autoattack", "slowdown", "sanity", "corruptions")


@dataclass(frozen=True)
class EvaluateOptions:
    """The attacks of an evaluation.

    Attributes:
        groups: which of `GROUPS` to run; "pgd" runs with every other attack. () = clean images alone. None = () for a
            run that was trained on clean images, else "pgd".
        exits: exits that AutoAttack attacks, from 1; None = all.
        strong_samples: number of images for every group but "pgd" and "corruptions"; None = as many as for these.
        restarts: random starts of PGD, and restarts of Square.
        targets: wrong classes that the route attack tries at each exit.
        queries: queries of Square per image and restart, and of RayS per image.
        autoattack_steps: steps of APGD and FAB. 5,000 queries and 100 steps make the standard version.
        transfer: another run; images crafted on it are tried on this one, whatever the groups.
        budgets: names of the budgets to evaluate. None = all of a bundle, none of a run. The thresholds of a run are
            selected from the logits of its torch network on the calibration split, and are not stored.
        device: device of the torch network, which crafts the attacks: "cpu", "cuda", or "auto" = "cuda" where torch
            finds a CUDA device, else "cpu".
        batch: images per pass of the torch network; None = 128 on the CPU, 512 on CUDA, and at least 250 in
            AutoAttack, whose random numbers depend on it. Other results change by rounding alone.
        threads: threads of torch and of the engine of a bundle on the CPU; None = those that torch takes, and the
            fastest number measured for the engine, else 1.
        report: whether to write the details: confusion, accuracy per class, pictures and the HTML page.

    Raises:
        UsageError: unknown groups, a number below 1, or more threads than can be meant.
    """

    groups: tuple[str, ...] | None = None
    exits: tuple[int, ...] | None = None
    strong_samples: int | None = 200
    restarts: int = 1
    targets: int = 3
    queries: int = 5000
    autoattack_steps: int = 100
    transfer: Path | None = None
    budgets: tuple[str, ...] | None = None
    device: str = "auto"
    batch: int | None = None
    threads: int | None = None
    report: bool = True

    def __post_init__(self) -> None:
        unknown = [name for name in self.groups or () if name not in GROUPS]
        if unknown:
            raise UsageError(
                f"unknown attacks '{', '.join(unknown)}': choose from {', '.join(GROUPS)}, all, or clean alone; "
                "separate several by commas"
            )
        counts = {"--restarts": self.restarts, "--targets": self.targets, "--queries": self.queries}
        optional = {"--strong-samples": self.strong_samples, "--batch": self.batch}
        counts |= {flag: value for flag, value in optional.items() if value is not None}
        low = [f"{flag} {value}" for flag, value in counts.items() if value < 1]
        if low:
            raise UsageError(f"found {', '.join(low)}: each must be at least 1")
        if self.threads is not None:
            check_threads(self.threads)

    @property
    def chosen(self) -> tuple[str, ...]:
        """The groups; none until `for_run` has filled in the default."""
        return self.groups or ()

    @property
    def attacked(self) -> bool:
        """Whether the images are attacked, which every group but corruptions does, and `transfer`."""
        return bool(set(self.chosen) - {"corruptions"}) or self.transfer is not None

    @property
    def strong_groups(self) -> bool:
        """Whether an attack runs on the strong subset of the images alone."""
        return bool(set(self.chosen) - {"pgd", "corruptions"}) or self.transfer is not None

    def for_run(self, attack: str) -> EvaluateOptions:
        """The options with their default groups filled in, for a run with this training attack."""
        if self.groups is not None:
            return self
        return replace(self, groups=() if attack == "none" else ("pgd",))

    def autoattack_exits(self, numbers: tuple[int, ...]) -> tuple[int, ...]:
        """The exits that AutoAttack attacks in a network whose exits have these numbers, (E,).

        Raises:
            UsageError: the network does not have them all.
        """
        exits = self.exits or numbers
        if not set(exits) <= set(numbers):
            has = f"1 to {numbers[-1]}" if len(numbers) == numbers[-1] else ", ".join(map(str, numbers))
            raise UsageError(f"--exits {','.join(map(str, exits))}: this network has exits {has}")
        return exits


def read_groups(text: str | None) -> tuple[str, ...] | None:
    """Parse `policy,slowdown`, `all`, or `clean` or `none`, which give (), in the order of `GROUPS`.

    Every attack adds `pgd`. None gives None. `EvaluateOptions` rejects unknown names.
    """
    if text is None:
        return None
    words = [word.strip() for word in text.split(",") if word.strip()]
    if "all" in words:
        return GROUPS
    if words in (["clean"], ["none"]):
        return ()
    if set(words) != {"corruptions"}:
        words.append("pgd")
    known = tuple(name for name in GROUPS if name in words)
    return known + tuple(word for word in words if word not in GROUPS)


def read_budgets(text: str | None) -> tuple[str, ...] | None:
    """Parse `low,medium`; None gives None."""
    return None if text is None else tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def read_exits(text: str | None) -> tuple[int, ...] | None:
    """Parse `1,3` or `all`, which gives None. Raises `UsageError` if it is neither."""
    if text is None or text == "all":
        return None
    try:
        return tuple(sorted({int(word) for word in text.split(",")}))
    except ValueError:
        raise UsageError(f"--exits takes numbers such as 1,3, or all; found '{text}'") from None
