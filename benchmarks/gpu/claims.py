"""The claims of the methods' papers: train and evaluate the runs of `method_claims.py` for one seed."""

from __future__ import annotations

from dataclasses import replace

import method_claims
from context import Context
from items import Item
from stored_answers import Answers

from mexit.data import registry

TINY = {"epochs": 1, "fraction": 0.2, "batch": 16, "steps": 1}
FILES = "answers"


def claims(item: Item, context: Context) -> bool:
    """Train and evaluate both sides of every claim; what is stored already is left out."""
    if context.miniature:
        for name, variant in method_claims.VARIANTS.items():
            steps = TINY if "steps" in variant.settings else {k: v for k, v in TINY.items() if k != "steps"}
            method_claims.VARIANTS[name] = replace(variant, settings={**variant.settings, **steps})
    data, seed = registry.load("mnist", context.data_dir), item.settings["seed"]
    folder = context.folder(item.name) / FILES
    stored: list[str] = []
    for claim in method_claims.CLAIMS.values():
        for variant in (claim.baseline, claim.ours):
            if context.should_stop():
                return False
            answers = Answers(folder / f"{variant}-{seed}.npz")
            if not answers.has(claim.condition):
                method_claims.evaluate(method_claims.run_of(variant, seed), answers, data)
            stored.append(variant)
    context.write(item.name, "claims.json", {"seed": seed, "variants": sorted(set(stored))})
    return True
