"""The bundle of the tests of batching."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hand_run_batcher import REJECT, THRESHOLDS

from mexit import Bundle


@pytest.fixture(scope="module", params=["margin", "ensemble"])
def recited_bundle(digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory, request) -> Bundle:
    """The digits bundle with policies of the fake engine."""
    path = Path(shutil.copytree(digits_bundle, tmp_path_factory.mktemp("fake") / "digits"))
    bundle = Bundle.open(path)
    policies = bundle.policies()
    [entry] = policies.entries
    point = entry.frontier[0]
    frontier = tuple(
        replace(point, budget_macs=place, thresholds=thresholds, reject=REJECT[name])
        for place, (name, thresholds) in enumerate(THRESHOLDS.items(), start=1)
    )
    fake = replace(
        entry,
        engine="fake",
        measure="margin",
        ensemble=request.param == "ensemble",
        temperatures=(1.0, 2.0, 0.5),
        frontier=frontier,
        named={name: place for place, name in enumerate(THRESHOLDS)},
        certificates=(),
        drift={"alpha": 0.01, "rates": [0.9] * len(frontier)},
    )
    bundle.save_policies(policies.with_entry(fake))
    return bundle
