"""What the batcher's tests share: a runtime of recited logits, and threads that a test moves."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from mexit.core.budget import Budget
from mexit.core.cost import Costs
from mexit.core.policy import Policy
from mexit.runtime.backends.fake import FakeBackend, images_for
from mexit.runtime.batch_costs import BatchCosts, table
from mexit.runtime.batcher import Batcher
from mexit.runtime.policy_selection import PolicyChoice
from mexit.runtime.rate_limiter import RateLimit, RateLimiter, RateLimits
from mexit.runtime.reference import answer_slowly
from mexit.runtime.request import BATCH, Desk, RequestOptions
from mexit.runtime.stats import RuntimeStats
from mexit.runtime.ticket import Ticket

SAMPLES, CLASSES, SHAPE = 50, 4, (1, 2, 2)
COSTS = (10, 30, 60)
CHEAP = table((1, BATCH), [[1e-4] * 3, [1.01e-4] * 3])  # a batch costs little more than a row: everybody joins
LINEAR = table((1,), [[1e-4] * 3])  # nothing is saved: nobody joins
CHEAP_THEN_LINEAR = table((1, BATCH), [[1e-4] * 3, [1.01e-4, BATCH * 1e-4, BATCH * 1e-4]])
GROUPS_OF_4 = table((1, 4), [[4e-4] * 3, [4.001e-4] * 3])
POLICIES = (
    Policy("max-probability", False, (1.0,) * 3, (1.0, 1.0)),
    Policy("max-probability", False, (1.0,) * 3, (0.0, 2.0)),
    Policy("margin", True, (1.0, 2.0, 0.5), (0.4, None)),
    Policy("max-probability", False, (1.0,) * 3, (None, None)),
)
NEVER_LEAVE = POLICIES[3]
REQUESTS = st.lists(
    st.tuples(
        st.lists(st.integers(0, SAMPLES - 1), min_size=1, max_size=9),
        st.integers(0, len(POLICIES) - 1),
        st.sampled_from("xyz"),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=8,
)


class Hands:
    """Threads that a test moves: functions wait here until it calls them, in any order."""

    def __init__(self, seed: int = 0) -> None:
        self.waiting: list[Any] = []
        self._random = random.Random(seed)

    def start(self, work: Any) -> None:
        self.waiting.append(work)

    def move(self) -> None:
        self.waiting.pop(self._random.randrange(len(self.waiting)))()

    def finish(self) -> None:
        while self.waiting:
            self.move()


@dataclass
class House:
    """A runtime of recited logits, and what its batcher told.

    Unless it `learns` how long its batches really take, they take what the table says.
    """

    seed: int = 0
    costs: BatchCosts = CHEAP
    rate_limiter: RateLimiter | None = None
    workers: int = 1
    learns: bool = False
    hands: Hands = field(default_factory=Hands)
    watched: list[tuple[int, tuple[str, ...], str]] = field(default_factory=list)
    heard: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.backend = FakeBackend((2 * rng.normal(size=(3, SAMPLES, CLASSES))).astype(np.float32))
        manifest = SimpleNamespace(cumulative_macs=COSTS, classes=tuple("abcd"))
        bundle: Any = SimpleNamespace(manifest=manifest, id="m")
        self.stats = RuntimeStats(len(COSTS), COSTS[-1])
        self.desk = Desk(
            bundle, self.backend, Costs(COSTS).under, self.stats, self.rate_limiter, lambda _: ("c",), self._watch
        )
        runtime: Any = SimpleNamespace(
            backend=self.backend, rate_limiter=self.rate_limiter, bundle=bundle, stats=self.stats
        )
        self.batcher = Batcher(runtime, self.hands.start, self.workers, costs=self.costs, heard=self.heard.extend)
        if not self.learns:
            outlook: Any = self.batcher._outlook
            outlook.learn = outlook.keep_pace = outlook.arrived = lambda *_: None

    def _watch(self, images: Any, answers: Any, plan: Any, client: str) -> None:
        assert len(images) == len(answers.reasons)
        self.watched.append((len(images), answers.reasons, client))

    def ticket(self, rows: list[int], policy: Policy = POLICIES[0], **wishes: Any) -> Ticket:
        plan = PolicyChoice(policy, None)
        return Ticket(
            self.desk, images_for(np.asarray(rows), SHAPE), RequestOptions(Budget.parse("full"), plan, **wishes)
        )

    def send(self, rows: list[int], policy: Policy = POLICIES[0], **wishes: Any) -> Ticket:
        ticket = self.ticket(rows, policy, **wishes)
        assert ticket.pay() == 0.0
        self.batcher.submit(ticket)
        return ticket

    def rows_run(self) -> list[int]:
        return [segment.rows_run for segment in self.backend.segments]

    def sizes(self, k: int) -> list[int]:
        """Rows of each batch of segment `k` from now on, as a list that grows."""
        sizes = list[int]()
        self.before(k, lambda carried: sizes.append(carried.rows))
        return sizes

    def before(self, k: int, happens: Any) -> None:
        """Have something happen, which is given the features, each time before segment `k` runs."""
        segment: Any = self.backend.segments[k - 1]
        segment.run = lambda carried, run=segment.run: (happens(carried), run(carried))[1]


def assert_equals_reference(house: House, rows: list[int], policy: Policy, found: Any) -> None:
    exits, probabilities = answer_slowly(house.backend, images_for(np.asarray(rows), SHAPE), policy, CLASSES)
    assert [one.exit for one in found] == exits.tolist()
    assert np.array([one.probabilities for one in found]).tolist() == probabilities.tolist()


def frozen(overall: int | None, client: int | None = None) -> RateLimiter:
    """Buckets that never refill."""
    allowed = RateLimits(*(None if burst is None else RateLimit(1, burst) for burst in (overall, client)))
    return RateLimiter(COSTS, allowed, clock_ns=lambda: 0)
