"""Mutated requests: changes of bytes, runs over many seeds that go on where they were stopped, and what they found."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from mexit.core.atomic_io import write_bytes

ROOT = Path(__file__).parents[2]
EACH = 20_000  # requests of a seed
NUMBER = int(os.environ.get("MEXIT_FUZZ_REQUESTS", "1000000"))
FIRST_SEED = int(os.environ.get("MEXIT_FUZZ_SEED", "0"))
Fuzz = Callable[[int, int], Counter[str]]
"""Makes a number of requests from a seed, and returns how many had each outcome."""


def mutate(body: bytes, words: Sequence[bytes], rng: random.Random) -> bytes:
    """Change a few bytes, or insert one of `words`, or remove or repeat a part."""
    content = bytearray(body)
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        at = rng.randrange(len(content) + 1)
        kind = rng.randrange(5)
        if kind == 0 and at < len(content):
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[at:at] = rng.choice(words)
        elif kind == 2:
            del content[at : at + rng.randrange(1, 20)]
        elif kind == 3:
            content[at : at + 8] = rng.randbytes(8)
        else:
            content[at:at] = content[rng.randrange(len(content) + 1) :][:40]
    return bytes(content)


def fuzz_seeds(name: str, fuzz: Fuzz) -> Counter[str]:
    """Run `fuzz` for as many seeds as `MEXIT_FUZZ_REQUESTS` takes, from `MEXIT_FUZZ_SEED` (default a million, from 0).

    The outcomes of each seed are kept in `.long/fuzz_<name>.json`, so that a run that was stopped goes on on the same
    commit. A seed that fails is not kept.
    """
    store, commit = ROOT / ".long" / f"fuzz_{name}.json", _commit()
    kept = json.loads(store.read_text()) if store.exists() else {}
    seeds: dict[str, dict[str, int]] = kept["seeds"] if commit and kept.get("commit") == commit else {}
    wanted = [str(seed) for seed in range(FIRST_SEED, FIRST_SEED + -(-NUMBER // EACH))]
    for seed in wanted:
        if seed not in seeds:
            seeds[seed] = dict(fuzz(EACH, int(seed)))
            store.parent.mkdir(exist_ok=True)
            write_bytes(store, json.dumps({"commit": commit, "requests of a seed": EACH, "seeds": seeds}).encode())
    return sum((Counter(seeds[seed]) for seed in wanted), Counter())


def _commit() -> str:
    """The commit of the working tree; "" with changes."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return "" if git("status", "--porcelain", "mexit", "tests") else git("rev-parse", "HEAD")
