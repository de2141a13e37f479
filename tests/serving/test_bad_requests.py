"""Bad requests: each gets its status and one JSON error that names the mistake and nothing of the server."""

from __future__ import annotations

import base64
import gzip
import json
import re
import socket
import zlib
from typing import Any

import numpy as np
import pytest
from servers import INFER, Server

ZEROS = [0.0] * 64
Request = dict[str, Any]


def request(**changes: Any) -> Request:
    """A good request with changes to its input; a value of `...` removes the entry."""
    entry = {"name": "input", "shape": [1, 1, 8, 8], "datatype": "FP32", "data": ZEROS, **changes}
    return {"inputs": [{name: value for name, value in entry.items() if value is not ...}]}


def with_parameters(**parameters: Any) -> Request:
    return {**request(), "parameters": parameters}


def with_outputs(*outputs: Any) -> Request:
    return {**request(), "outputs": list(outputs)}


def binary(size: Any, **changes: Any) -> Request:
    return request(data=..., parameters={"binary_data_size": size}, **changes)


BAD_REQUESTS: dict[str, tuple[Any, str]] = {
    "no object": ([], "must be a JSON object"),
    "no inputs": ({}, "inputs must be a JSON list"),
    "inputs no list": ({"inputs": {}}, "inputs must be a JSON list"),
    "input no object": ({"inputs": [1]}, "an input must be a JSON object"),
    "missing input": ({"inputs": []}, "takes its input 'input' once, found it 0 times"),
    "input twice": ({"inputs": request()["inputs"] * 2}, "found it 2 times"),
    "unknown input": (request(name="x"), "unknown input 'x'"),
    "unnamed input": (request(name=...), "unknown input None"),
    "datatype missing": (request(datatype=...), "expected datatype FP32, found None"),
    "datatype other": (request(datatype="UINT8"), "expected datatype FP32, found 'UINT8'"),
    "datatype nested": (request(datatype=[["FP32"]]), "expected datatype FP32, found a JSON list"),
    "shape missing": (request(shape=...), r"expected shape \[-1, 1, 8, 8\]"),
    "shape of another model": (request(shape=[1, 3, 8, 8]), r"expected .* found \[1, 3, 8, 8\]"),
    "shape short": (request(shape=[1, 64]), r"found \[1, 64\]"),
    "shape long": (request(shape=[1] * 100_000), "expected shape"),
    "shape of text": (request(shape=["1", 1, 8, 8]), "expected shape"),
    "shape of truth": (request(shape=[True, 1, 8, 8]), "expected shape"),
    "shape of floats": (request(shape=[1.0, 1, 8, 8]), "expected shape"),
    "no rows": (request(shape=[0, 1, 8, 8], data=[]), "at least 1 row"),
    "negative rows": (request(shape=[-1, 1, 8, 8]), r"found \[-1, 1, 8, 8\]"),
    "negative sides": (request(shape=[1, 1, -8, -8]), r"found \[1, 1, -8, -8\]"),
    "rows overflow": (request(shape=[2**60 + 2, 1, 8, 8]), "at most 1024 rows .* found 1152921504606846978"),
    "sides overflow": (request(shape=[2**4, 2**60 + 2, 8, 8]), "expected shape"),
    "rows of a thousand digits": (request(shape=[10**1000, 1, 8, 8]), r"at most 1024 rows .*\.\.\."),
    "rows over the limit": (request(shape=[1025, 1, 8, 8], data=ZEROS * 1025), "at most 1024 rows"),
    "data missing": (request(data=...), "either data or the parameter binary_data_size"),
    "data no list": (request(data="0"), "data must be a list, found '0'"),
    "data short": (request(data=ZEROS[1:]), r"shape \[1, 1, 8, 8\] does not fit data of shape \[63\]"),
    "data long": (request(data=[*ZEROS, 0]), r"does not fit data of shape \[65\]"),
    "data nested otherwise": (request(data=[[[ZEROS]]]), r"data of shape \[1, 1, 1, 64\]"),
    "data ragged": (request(data=[[0.0] * 63, 0.0]), "flat, or nested as its shape says"),
    "data half nested": (request(data=[*ZEROS[1:], [0.0]]), "must be numbers, found list"),
    "data text": (request(data=["0.5", *ZEROS[1:]]), "must be numbers, found str"),
    "data truth": (request(data=[True, *ZEROS[1:]]), "must be numbers, found bool"),
    "data null": (request(data=[None, *ZEROS[1:]]), "must be numbers, found NoneType"),
    "data below": (request(data=[-0.1, *ZEROS[1:]]), r"in \[0, 1\], found values from -0.1"),
    "data above": (request(data=[255, *ZEROS[1:]]), r"to 255 \(this looks like 0..255"),
    "data beyond float32": (request(data=[1e300, *ZEROS[1:]]), "not finite"),
    "data beyond floats": (request(data=[10**400, *ZEROS[1:]]), "that no float holds"),
    "binary without bytes": (binary(256), "binary_data_size is 256, the body has 0 bytes"),
    "binary size of text": (binary("256"), "binary_data_size is '256'"),
    "binary size true": (binary(True), "binary_data_size is True"),
    "binary size negative": (binary(-256), "binary_data_size is -256"),
    "binary and data": (request(parameters={"binary_data_size": 256}), "either data or"),
    "shared memory": (request(parameters={"shared_memory_region": "x"}), "does not offer"),
    "parameters no object": ({**request(), "parameters": []}, "parameters of the request must be a JSON object"),
    "parameters nested": (with_parameters(deep={"a": 1}), "must be a string, number or boolean"),
    "budget unknown": (with_parameters(mexit_budget="cheap"), "'cheap' is not a budget: write low"),
    "budget too low": (with_parameters(mexit_budget="1"), "the (nearest feasible|smallest calibrated) "),
    "budget of numbers": (with_parameters(mexit_budget=5), "mexit_budget must be a string"),
    "budget of a megabyte": (with_parameters(mexit_budget="9" * 2**20), "at most 64 characters"),
    "deadline zero": (with_parameters(mexit_deadline_us=0), "mexit_deadline_us must be a number above zero"),
    "deadline negative": (with_parameters(timeout=-1), "timeout must be a number above zero"),
    "deadline text": (with_parameters(mexit_deadline_us="5"), "above zero, found '5'"),
    "deadline too large": (with_parameters(mexit_deadline_us=10**400), "must be a number above zero"),
    "max exit zero": (with_parameters(mexit_max_exit=0), r"max_exit must lie in 1\.\.3, found 0"),
    "max exit beyond": (with_parameters(mexit_max_exit=4), r"max_exit must lie in 1\.\.3, found 4"),
    "max exit huge": (with_parameters(mexit_max_exit=10**1000), "must be a whole number"),
    "max exit fraction": (with_parameters(mexit_max_exit=1.5), "must be a whole number, found 1.5"),
    "parameter misspelt": (with_parameters(mexit_budgett="low"), "unknown parameter 'mexit_budgett': known are"),
    "binary output of text": (with_parameters(binary_data_output="yes"), "must be true or false, found 'yes'"),
    "outputs no list": ({**request(), "outputs": "label"}, "outputs must be a JSON list"),
    "output unknown": (with_outputs({"name": "logits"}), "unknown output 'logits': the model has probabilities"),
    "output twice": (with_outputs({"name": "exit"}, {"name": "exit"}), "output 'exit' is asked for twice"),
    "output unnamed": (with_outputs({}), "unknown output None"),
    "output of classes": (with_outputs({"name": "label", "parameters": {"classification": 3}}), "does not offer"),
    "id no text": ({**request(), "id": 7}, "id must be a string, found 7"),
}  # fmt: skip

GOOD = json.dumps(request()).encode()
BAD_TEXTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not valid JSON"),
    "cut": (GOOD[:-1], "not valid JSON"),
    "two objects": (GOOD + GOOD, "not valid JSON"),
    "no text": (b"\xff\xfe\x00", "not UTF-8"),
    "another encoding": (GOOD.decode().encode("utf-16"), "not UTF-8"),
    "NaN": (GOOD.replace(b"0.0", b"NaN", 1), "not valid JSON: NaN"),
    "infinity": (GOOD.replace(b"0.0", b"-Infinity", 1), "not valid JSON: -Infinity"),
    "overflowing number": (GOOD.replace(b"0.0", b"1e999", 1), "not finite"),
    "number of 5000 digits": (GOOD.replace(b"0.0", b"1" * 5000, 1), "not valid JSON"),
    "a key twice": (GOOD.replace(b'"shape"', b'"name": "y", "shape"'), "the key 'name' twice"),
    "deep lists": (b"[" * 100_000, "nested deeper than 32 levels"),
    "deep objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested deeper than 32 levels"),
    "deep data": (GOOD.replace(b"[0.0", b"[" * 120 + b"0.0", 1), "nested deeper than 32 levels"),
}


def assert_refused(answer: tuple[int, dict[str, str], bytes], status: int, text: str) -> None:
    """The response is an error in the documented form, without a detail of the server."""
    assert answer[0] == status, answer
    body = json.loads(answer[2])
    assert list(body) == ["error"]
    assert re.search(text, body["error"]), body["error"]
    assert len(body["error"]) < 400
    assert not re.search(r"Traceback|File \"|/site-packages/|\.py|/tmp/|0x[0-9a-f]{6}|mexit\.", body["error"])


@pytest.mark.parametrize(("body", "text"), BAD_REQUESTS.values(), ids=BAD_REQUESTS.keys())
def test_bad_requests(server: Server, body: Any, text: str) -> None:
    assert_refused(server.ask("POST", INFER, json.dumps(body)), 400, text)


@pytest.mark.parametrize(("body", "text"), BAD_TEXTS.values(), ids=BAD_TEXTS.keys())
def test_bad_json(server: Server, body: bytes, text: str) -> None:
    assert_refused(server.ask("POST", INFER, body), 400, text)


@pytest.mark.parametrize(
    "length", ["-1", "1.5", "", "x", "99999999999", "9" * 400, "0x10", "٣", "5, 5"],
)  # fmt: skip
def test_bad_header_lengths(server: Server, length: str) -> None:
    headers = {"Inference-Header-Content-Length": length.encode().decode("latin-1")}
    assert_refused(server.ask("POST", INFER, GOOD, headers), 400, "must lie within the .* bytes of the body|JSON")


@pytest.mark.parametrize(
    ("raw", "size", "text"),
    [
        (b"\0" * 255, 255, r"shape \[1, 1, 8, 8\] FP32 takes 256 bytes, found 255"),
        (b"\0" * 255, 256, "binary_data_size is 256, the body has 255 bytes after the JSON"),
        (b"\0" * 257, 256, "the body has 257 bytes after the JSON"),
        (b"\0" * 260, 260, "takes 256 bytes, found 260"),
        (np.full(64, np.nan, "<f4").tobytes(), 256, "not finite"),
        (np.full(64, np.inf, "<f4").tobytes(), 256, "not finite"),
        (np.full(64, 1.5, "<f4").tobytes(), 256, "found values from 1.5"),
    ],
    ids=["short", "cut", "trailing", "long", "NaN", "infinity", "above 1"],
)
def test_bad_binary_tensors(server: Server, raw: bytes, size: int, text: str) -> None:
    head = json.dumps(binary(size)).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    assert_refused(server.ask("POST", INFER, head + raw, headers), 400, text)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "takes 256 bytes, found 0"),
        (b"\0" * 255, "takes 256 bytes, found 255"),
        (b"\0" * 512, "takes 256 bytes, found 512"),
        (np.full(64, np.nan, "<f4").tobytes(), "not finite"),
        (np.full(64, 2.5, "<f4").tobytes(), "found values from 2.5"),
    ],
    ids=["none", "short", "two rows", "NaN", "above 1"],
)
def test_bad_raw_requests(server: Server, body: bytes, text: str) -> None:
    assert_refused(server.ask("POST", INFER, body, {"Inference-Header-Content-Length": "0"}), 400, text)


@pytest.mark.parametrize(
    ("encoding", "body", "text"),
    [
        ("gzip, gzip", gzip.compress(GOOD, mtime=0), "not valid gzip"),
        ("deflate, gzip", gzip.compress(GOOD, mtime=0), "not valid deflate"),
        ("gzip, gzip, gzip, gzip, gzip", GOOD, "at most 4 codings, found 5"),
        ("gzip", GOOD, "not valid gzip"),
        ("gzip", b"", "not one whole gzip stream"),
        ("gzip", gzip.compress(GOOD, mtime=0)[:-9], "not one whole gzip stream"),
        ("gzip", gzip.compress(GOOD, mtime=0) + b"more", "not valid gzip"),
        ("deflate", zlib.compress(GOOD) * 2, "not one whole deflate stream"),
        ("deflate", zlib.compress(GOOD)[2:-4], "not valid deflate"),
        ("deflate", gzip.compress(GOOD, mtime=0), "not valid deflate"),
        ("deflate", zlib.compress(GOOD)[:-5], "not one whole deflate stream"),
    ],
)
def test_bad_compression(server: Server, encoding: str, body: bytes, text: str) -> None:
    assert_refused(server.ask("POST", INFER, body, {"Content-Encoding": encoding}), 400, text)


@pytest.mark.parametrize("path", [INFER, "/v1/classify", "/v2/repository/index"])
@pytest.mark.parametrize("encoding", ["br", "gzip, br", "compress", "chunked"])
def test_unknown_codings_are_415(server: Server, path: str, encoding: str) -> None:
    answer = server.ask("POST", path, GOOD, {"Content-Encoding": encoding})
    assert_refused(answer, 415, "must be gzip, deflate or identity, found '(br|compress|chunked)'")
    assert answer[1]["accept-encoding"] == "gzip, deflate"


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/v2/models/letters", "unknown model 'letters': this server has 'digits'"),
        ("/v2/models/digits/versions/2", "no version '2': it has version 1"),
        ("/v2/models/digits/versions/2/ready", "no version '2'"),
        ("/v2/models/..%2f..%2fetc%2fpasswd", "no such route"),
        ("/v2/models/%2e%2e", "unknown model"),
        ("/v2/models/digits%00", "unknown model"),
        ("/v2/models/" + "a" * 4000, "unknown model"),
        ("/v2/models/digits/", "no such route|unknown model"),
        ("/v3", "no such route: GET '/v3'"),
        ("/docs/", "no such route"),
    ],
)
def test_unknown_names_are_404(server: Server, path: str, text: str) -> None:
    assert_refused(server.ask("GET", path), 404, text)


def test_infer_of_an_unknown_model_is_404(server: Server) -> None:
    assert_refused(server.ask("POST", "/v2/models/letters/infer", GOOD), 404, "unknown model 'letters'")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", INFER, "POST"),
        ("PUT", INFER, "POST"),
        ("GET", "/v1/classify", "POST"),
        ("GET", "/v2/repository/index", "POST"),
        ("POST", "/v2", "GET"),
        ("DELETE", "/v2/models/digits", "GET"),
        ("POST", "/metrics", "GET"),
    ],
)
def test_wrong_verbs_are_405(server: Server, method: str, path: str, allowed: str) -> None:
    answer = server.ask(method, path)
    assert_refused(answer, 405, f"{method} is not for this route: use ")
    assert allowed in answer[1]["allow"]


@pytest.mark.parametrize(
    ("query", "body", "headers", "text"),
    [
        ("", b"", {}, "the body is empty"),
        ("", b"no image at all", {}, "the body is the text 'no image at all', not an image: send the bytes"),
        ("", b"no image\n\0 at all", {}, "that are not an image"),
        ("", base64.b64encode(b"image" * 50), {}, "the body is base64, not an image: .*--data-binary"),
        ("", base64.urlsafe_b64encode(b"\xff\xee" * 50), {}, "the body is base64"),
        ("", b"data:image/png;base64," + base64.b64encode(b"image" * 50), {}, "the body is base64"),
        ("", b"\x89PNG\x1aIHDR", {}, "lost its line ends .* --data-binary"),
        ("", b'{"image": "AAAA*"}', {}, '"image" is not base64'),
        ("", b'{"image": 7}', {}, 'JSON must be {"image": "BASE64"}, found the keys'),
        ("", b'{"image": "AAAA", "budget": "low"}', {}, r"found the keys 'image', 'budget'; .*\?budget=low"),
        ("", b'[{"image": "AAAA"}]', {}, "found a JSON list"),
        ("", b'{"instances": [{"b64": "AAAA"}]}', {}, "found the keys 'instances'"),
        ("", b'{"image": "AAAA"', {}, "not valid JSON"),
        ("", b"\x89PNG\r\n\x1a\n" + b"\0" * 50, {}, "not an image|damaged"),
        ("", b"--x\r\n", {"Content-Type": "multipart/form-data; boundary=x"}, "is a form .*--data-binary"),
        ("?budget=cheap", b"x", {}, "is not a budget"),
        ("?max_exit=two", b"x", {}, "max_exit must be a whole number, found 'two'"),
        ("?max_exit=99999999999", b"x", {}, "max_exit must be a whole number"),
        ("?deadline_ms=soon", b"x", {}, "above zero, found 'soon'"),
        ("?deadline_ms=nan", b"x", {}, "above zero"),
        ("?deadline_ms=inf", b"x", {}, "above zero"),
        ("?bugdet=low", b"x", {}, "unknown query 'bugdet': known are budget, deadline_ms, max_exit"),
    ],
)
def test_bad_images(server: Server, query: str, body: bytes, headers: dict[str, str], text: str) -> None:
    assert_refused(server.ask("POST", f"/v1/classify{query}", body, headers), 400, text)


@pytest.mark.parametrize("body", [b"[]", b'{"ready": 1}', b"[" * 250_000, b"{"], ids=["list", "number", "deep", "cut"])
def test_bad_index_requests(server: Server, body: bytes) -> None:
    assert_refused(server.ask("POST", "/v2/repository/index", body), 400, "ready|nested deeper|not valid JSON")


def send_raw(server: Server, *parts: bytes) -> bytes:
    """Send bytes as they are; return the first part of the answer."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as opened:
        for part in parts:
            opened.sendall(part)
        return opened.recv(65536)


HEAD = f"POST {INFER} HTTP/1.1\r\nHost: x\r\n".encode()


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(GOOD), GOOD),
        b"Content-Length: -5\r\n\r\n",
        b"Content-Length: five\r\n\r\n",
        b"Transfer-Encoding: sideways\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\nno chunk\r\n",
    ],
    ids=["two lengths", "length and chunks", "negative length", "length of text", "unknown framing", "bad chunk"],
)
def test_request_smuggling(server: Server, head: bytes) -> None:
    """A request with ambiguous framing is refused."""
    assert re.match(rb"HTTP/1.1 (400|413|501) ", send_raw(server, HEAD + head))


@pytest.mark.parametrize("host", [b"[", b"a b", b"\xff", b"x" * 5000], ids=["bracket", "space", "byte", "long"])
def test_invalid_host_headers(server: Server, host: bytes) -> None:
    """Some frameworks fail when they build a URL from this header."""
    answer = send_raw(server, b"GET /nowhere HTTP/1.1\r\nHost: " + host + b"\r\n\r\n")
    assert re.match(rb"HTTP/1.1 (400|404) ", answer)


def test_an_endless_head(server: Server) -> None:
    assert send_raw(server, HEAD, b"X: " + b"x" * 200_000).startswith(b"HTTP/1.1 400 ")


def test_endless_trailers(server: Server) -> None:
    """What follows the last chunk is bounded too."""
    answer = send_raw(server, HEAD, b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n", b"X: " + b"x" * 500_000)
    assert answer.startswith(b"HTTP/1.1 400 ")


def test_an_upgrade_is_ignored(server: Server) -> None:
    """Some clients offer HTTP/2 in this way, and send their next request over the same connection."""
    connection = server.connect()
    for _ in range(3):
        connection.request("GET", "/v2/health/live", headers={"Connection": "Upgrade", "Upgrade": "h2c"})
        assert connection.getresponse().read() == b'{"live": true}'
    connection.close()


def test_the_server_still_works(server: Server) -> None:
    """The same process answers after all requests above."""
    assert server.json("GET", "/v2/health/live") == (200, {"live": True})
    assert server.json("POST", INFER, request())[0] == 200
    assert "Traceback" not in server.errors


def cut(content: bytes, rng: np.random.Generator) -> bytes:
    return content[: rng.integers(len(content))]


def scramble(content: bytes, rng: np.random.Generator) -> bytes:
    codes = np.frombuffer(content, np.uint8)
    noise = rng.integers(0, 256, len(codes), np.uint8)
    return np.where(rng.random(len(codes)) < 0.02, noise, codes).tobytes()


def swap_tokens(content: bytes, rng: np.random.Generator) -> bytes:
    old, new = [b'"', b"[", b"1", b"8", b":", b"0.0"], [b"{", b"]", b"-1", b"null", b"1e9", b""]
    return content.replace(old[rng.integers(len(old))], new[rng.integers(len(new))], int(rng.integers(1, 4)))


def test_mutated_requests_never_break_the_server(server: Server) -> None:
    """Each of 390 damaged requests on one connection gets an answer, and no internal error."""
    rng = np.random.default_rng(3)
    connection = server.connect()
    for mutate in [cut, scramble, swap_tokens] * 130:
        connection.request("POST", INFER, mutate(GOOD, rng))
        response = connection.getresponse()
        body = response.read()
        assert response.status in (200, 400, 413), body
    connection.close()
