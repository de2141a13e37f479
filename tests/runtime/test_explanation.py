"""The explanation of an image agrees with its answer, and each exit's answer with `max_exit`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mexit import Runtime
from mexit.errors import BadInput, BudgetInfeasible
from mexit.runtime.explanation import explain

Digits = tuple[NDArray[np.uint8], NDArray[np.int64]]


@pytest.mark.parametrize("bundle", ["digits_bundle", "mixed_bundle", "reject_bundle"])
def test_it_agrees_with_the_answers(bundle: str, request: pytest.FixtureRequest, test_digits: Digits) -> None:
    """For each budget and image: exit, reason, class and cost; and more than one exit and reason occurs."""
    runtime = Runtime.open(request.getfixturevalue(bundle))
    tensor = runtime.prepare(list(test_digits[0][:40]))
    seen = set()
    for budget in ("low", "medium", "full"):
        for row, answer in enumerate(runtime.answer_tensor(tensor, budget=budget)):
            found = explain(runtime, tensor[row : row + 1], budget)
            assert (found.exit, found.reason, found.index, found.macs) == (
                answer.exit, answer.reason, answer.index, answer.macs,
            )  # fmt: skip
            assert found.static == (answer.macs == runtime.costs.static)
            assert found.exits[found.exit - 1].probabilities.argmax() == answer.probabilities.argmax()
            seen.add((answer.exit, answer.reason))
    assert len(seen) >= 2
    assert bundle != "reject_bundle" or "unsure" in {reason for _, reason in seen}


def test_each_exit_answers_as_with_max_exit(mixed_bundle: Path, test_digits: Digits) -> None:
    runtime = Runtime.open(mixed_bundle)
    tensor = runtime.prepare([test_digits[0][0]])
    found = explain(runtime, tensor, "medium")
    assert [one.macs for one in found.exits] == list(runtime.bundle.manifest.cumulative_macs)
    assert [one.us for one in found.exits] == [None] * 3
    thresholds = runtime.policy("medium").thresholds
    assert [one.threshold for one in found.exits] == [*thresholds, None]
    for one in found.exits:
        [answer] = runtime.answer_tensor(tensor, budget="medium", max_exit=one.exit)
        if answer.exit == one.exit:
            np.testing.assert_allclose(one.probabilities, answer.probabilities, rtol=1e-6)


def test_it_is_not_counted(mixed_bundle: Path, test_digits: Digits) -> None:
    runtime = Runtime.open(mixed_bundle)
    explain(runtime, runtime.prepare([test_digits[0][0]]))
    assert runtime.stats.snapshot().predictions == 0


def test_errors(mixed_bundle: Path, test_digits: Digits) -> None:
    runtime = Runtime.open(mixed_bundle)
    with pytest.raises(BadInput, match="one image is explained at a time, found 2"):
        explain(runtime, runtime.prepare(list(test_digits[0][:2])))
    with pytest.raises(BudgetInfeasible, match="nearest feasible budget"):
        explain(runtime, runtime.prepare([test_digits[0][0]]), "1%")
