"""The parts of the protocol without a server: limits to the exact number, and random bytes."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
import zlib
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import Request

from mexit.core.manifest import InputSpec, PrepareSpec
from mexit.errors import BadInput, MexitError, Overloaded, TooLarge, UsageError
from mexit.serving import oip, request_options, strict_json
from mexit.serving.limits import Limits
from mexit.serving.middleware import client_of, tokens_of
from mexit.serving.request_body import inflate
from mexit.serving.worker_pool import ClientGone, Job, MemoryQuota, Ready, WorkerPool

SPEC = InputSpec("input", "float32", "NCHW", 3, (2, 4), (0.0, 1.0), PrepareSpec())
LIMITS = Limits(rows=2, json_values=40, json_depth=4)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text('ab"\\\u20ac\U0001f600', max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=6,
)
ENTRY = st.fixed_dictionaries({"name": st.just("input") | JSON, "shape": JSON, "data": JSON})


@pytest.mark.parametrize("opened", ["[", '{"a":'])
def test_depth_to_the_level(opened: str) -> None:
    closed = "]" if opened == "[" else "}"
    strict_json.parse((opened * 4 + "1" + closed * 4).encode(), LIMITS)
    with pytest.raises(BadInput, match="deeper than 4 levels"):
        strict_json.parse((opened * 5 + "1" + closed * 5).encode(), LIMITS)


def test_depth_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The count goes on where one block of the text ends and the next begins."""
    monkeypatch.setattr(strict_json, "_BLOCK_BYTES", 3)
    strict_json.parse(b"[[[[1]]], [1], [[2]]]", LIMITS)
    with pytest.raises(BadInput, match="deeper"):
        strict_json.parse(b"[ [ [ [ [1]]]]]", LIMITS)


def test_values_to_the_number() -> None:
    strict_json.parse(json.dumps([0] * 40).encode(), LIMITS)
    with pytest.raises(TooLarge, match="more than 40 values"):
        strict_json.parse(json.dumps([0] * 41).encode(), LIMITS)


@given(JSON)
@settings(max_examples=60, deadline=None)
def test_good_json_is_read_as_python_reads_it(value: object) -> None:
    content = json.dumps(value).encode()
    assert strict_json.parse(content, Limits(json_depth=500)) == json.loads(content)


@pytest.mark.parametrize(("encoding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_inflated_size_to_the_byte(encoding: str, compress: object) -> None:
    assert callable(compress)
    assert inflate(compress(b"x" * 1000), f" {encoding.upper()} ", 1000) == b"x" * 1000
    with pytest.raises(TooLarge, match="at most 999 bytes"):
        inflate(compress(b"x" * 1000), encoding, 999)


@given(st.binary(max_size=400), st.none() | st.integers(0, 400))
@settings(max_examples=300, deadline=None)
def test_random_bytes_are_refused_in_words(body: bytes, length: int | None) -> None:
    if length is not None and length > len(body):
        length = len(body)
    with pytest.raises(BadInput):
        oip.parse_request(body, length, SPEC, LIMITS)


@given(
    st.fixed_dictionaries(
        {"inputs": st.lists(ENTRY, max_size=2)},
        optional={"parameters": JSON, "outputs": JSON, "id": JSON},
    )
)
@settings(max_examples=60, deadline=None)
def test_random_requests_are_refused_in_words(request: dict[str, object]) -> None:
    with pytest.raises(BadInput):
        oip.parse_request(json.dumps(request).encode(), None, SPEC, Limits(json_depth=500))


@given(st.dictionaries(st.sampled_from([*request_options.PARAMETERS, "timeout", "priority"]), JSON))
@settings(max_examples=60, deadline=None)
def test_options_are_read_or_refused_in_words(parameters: dict[str, object]) -> None:
    try:
        found = request_options.from_parameters(parameters)
    except MexitError as error:
        refusal = error
    else:
        assert found.deadline_ms is None or 0 < found.deadline_ms < 1e12
        return
    assert refusal.http_status == 400
    assert len(str(refusal)) < 300


def test_the_earlier_deadline_counts() -> None:
    assert request_options.from_parameters({"timeout": 5000, "mexit_deadline_us": 3000}).deadline_ms == 3.0
    assert request_options.from_parameters({"timeout": 0, "mexit_deadline_us": 3000}).deadline_ms == 3.0
    assert request_options.from_parameters({"timeout": 2000}).deadline_ms == 2.0
    assert request_options.from_parameters({"timeout": 0}).deadline_ms is None


def test_a_misaligned_tensor() -> None:
    """The JSON before the tensor has any length, so its floats start anywhere."""
    pixels = np.random.default_rng(0).random((2, 3, 2, 4), np.float32)
    entry = {"name": "input", "shape": [2, 3, 2, 4], "datatype": "FP32", "parameters": {"binary_data_size": 192}}
    for padding in range(4):
        head = json.dumps({"inputs": [entry]}).encode() + b" " * padding
        request = oip.parse_request(head + pixels.tobytes(), len(head), SPEC, LIMITS)
        np.testing.assert_array_equal(request.tensor, pixels)
        assert request.tensor.flags.aligned


async def never() -> None:
    await asyncio.Event().wait()


async def at_once() -> None:
    return None


def job(work: Callable[[], object], *waits: Ready) -> Job[object]:
    """Waits for the given functions, one after the other, then works."""
    yield from waits
    return work()


def test_the_workshop_refuses_what_does_not_fit() -> None:
    async def run() -> None:
        worker_pool, gate = WorkerPool(threads=1, jobs=2), threading.Event()
        first, second = (asyncio.ensure_future(worker_pool.run(job(gate.wait), never)) for _ in range(2))
        await asyncio.sleep(0.01)
        with pytest.raises(Overloaded) as caught:
            await worker_pool.run(job(gate.wait), never)
        assert caught.value.retry_after_s == 1.0
        gate.set()
        assert await asyncio.gather(first, second) == [True, True]
        assert await worker_pool.run(job(lambda: 7), never) == 7

    asyncio.run(run())


def test_the_workshop_drops_what_nobody_waits_for() -> None:
    async def run() -> None:
        worker_pool, gate, done = WorkerPool(threads=1, jobs=2), threading.Event(), list[str]()
        first = job(lambda: (gate.wait(), done.append("first")))
        working = asyncio.ensure_future(worker_pool.run(first, at_once))
        await asyncio.sleep(0.01)
        with pytest.raises(ClientGone):
            await worker_pool.run(job(lambda: done.append("second")), at_once)
        third = asyncio.ensure_future(worker_pool.run(job(lambda: done.append("third")), never))
        await asyncio.sleep(0.01)
        with pytest.raises(Overloaded):
            await worker_pool.run(job(lambda: None), never)
        gate.set()
        await asyncio.gather(working, third)
        assert done == ["first", "third"]

    asyncio.run(run())


def test_one_client_has_its_share_of_the_workshop() -> None:
    async def run() -> None:
        worker_pool, gate = WorkerPool(threads=1, jobs=8, share=4), threading.Event()
        theirs = [asyncio.ensure_future(worker_pool.run(job(gate.wait), never, "a")) for _ in range(2)]
        await asyncio.sleep(0.01)
        with pytest.raises(Overloaded, match="2 requests are waiting already, all of them yours"):
            await worker_pool.run(job(gate.wait), never, "a")
        other = asyncio.ensure_future(worker_pool.run(job(gate.wait), never, "b"))
        gate.set()
        assert await asyncio.gather(*theirs, other) == [True] * 3

    asyncio.run(run())


def test_clients_take_turns() -> None:
    """Nine jobs of one client are waiting when another client's two come: those are second and fourth."""

    async def run() -> None:
        worker_pool, gate, done = WorkerPool(threads=1, jobs=20), threading.Event(), list[str]()
        names = ["attacker"] * 9 + ["clean"] * 2
        first = asyncio.ensure_future(worker_pool.run(job(gate.wait), never, "attacker"))
        await asyncio.sleep(0.01)
        others = [
            asyncio.ensure_future(worker_pool.run(job(partial(done.append, name)), never, name)) for name in names
        ]
        await asyncio.sleep(0.01)
        gate.set()
        await asyncio.gather(first, *others)
        assert [place for place, name in enumerate(done) if name == "clean"] == [1, 3]

    asyncio.run(run())


def test_a_job_that_waits_leaves_its_worker_to_others() -> None:
    async def run() -> None:
        worker_pool, done = WorkerPool(threads=1, jobs=4), list[str]()
        first = job(lambda: done.append("first"), lambda: 0.0 if done else 0.01)
        waiting = asyncio.ensure_future(worker_pool.run(first, never))
        while not worker_pool.waiting:
            await asyncio.sleep(0.001)
        await asyncio.wait_for(worker_pool.run(job(lambda: done.append("second")), never), 10)
        await waiting
        assert (done, worker_pool.waiting) == (["second", "first"], 0)

    asyncio.run(run())


def test_a_job_that_waits_is_dropped_when_its_client_leaves() -> None:
    async def run() -> None:
        worker_pool, done, left = WorkerPool(threads=1, jobs=1), list[str](), asyncio.Event()
        waiting = asyncio.ensure_future(
            worker_pool.run(job(lambda: done.append("first"), lambda: 60.0), left.wait)
        )
        await asyncio.sleep(0.01)
        left.set()
        with pytest.raises(ClientGone):
            await waiting
        assert (done, worker_pool.waiting) == ([], 0)
        assert await worker_pool.run(job(lambda: 7), never) == 7  # the place is free again

    asyncio.run(run())


def test_storage_gives_back_what_was_taken() -> None:
    storage = MemoryQuota(100)
    with storage.reserve() as take:
        take(60)
        with storage.reserve() as other:
            other(40)
            with pytest.raises(Overloaded, match="100 bytes are waiting"):
                other(1)
        take(40)
    with storage.reserve() as take:
        take(100)


def test_storage_leaves_room_to_other_clients() -> None:
    storage = MemoryQuota(100, share=4)
    with storage.reserve("a") as take:
        take(25)
        with pytest.raises(Overloaded, match="of 25 bytes are waiting already, all of them yours"):
            take(1)
        with storage.reserve("b") as other:
            other(25)
    with storage.reserve("a") as take:
        take(25)


def request_from(host: str, **scope: object) -> Request:
    return Request({"type": "http", "headers": [], "client": (host, 1), **scope})


def test_a_client_is_its_token_or_its_peer() -> None:
    assert client_of(request_from("203.0.113.7")) == "203.0.113.7"
    assert client_of(request_from("::ffff:203.0.113.7")) == "203.0.113.7"
    assert client_of(request_from("2001:db8::1")) == client_of(request_from("2001:db8::ffff:1"))
    assert client_of(request_from("2001:db8::1")) != client_of(request_from("2001:db8:0:1::1"))
    assert client_of(request_from("fe80::1%eth0")) == "fe80::/64"
    assert client_of(request_from("203.0.113.7", mexit_token=2)) == "token 2"
    lies = [(b"x-forwarded-for", b"198.51.100.1"), (b"forwarded", b"for=198.51.100.1")]
    assert client_of(request_from("203.0.113.7", headers=lies)) == "203.0.113.7"


def test_tokens_are_separated_by_commas() -> None:
    assert tokens_of(None) == ()
    assert tokens_of(" one two, three ") == ("one two", "three")
    for empty in ("", " ", "one,", ","):
        with pytest.raises(UsageError, match="the token is empty"):
            tokens_of(empty)
    with pytest.raises(UsageError, match="given twice"):
        tokens_of("one, one")
