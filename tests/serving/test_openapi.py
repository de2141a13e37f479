"""The OpenAPI description, against the routes and the answers of a real server."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from servers import INFER, Server, infer_body

from mexit.serving import http, openapi

DESCRIPTION = openapi.description()
jsonschema = pytest.importorskip("jsonschema", reason="needs the extra dev")
OPERATIONS = [
    (method.upper(), path)
    for path, item in DESCRIPTION["paths"].items()
    for method in item
    if method in ("get", "post")
]


def resolve(value: Any) -> Any:
    """A part of the description with its references replaced by what they name."""
    if isinstance(value, list):
        return [resolve(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    if "$ref" in value:
        return resolve(DESCRIPTION["components"]["schemas"][value["$ref"].rpartition("/")[2]])
    return {name: resolve(entry) for name, entry in value.items()}


def assert_described(method: str, path: str, answer: tuple[int, dict[str, str], bytes]) -> None:
    """The status, the type and the JSON of an answer are those of the description."""
    status, headers, content = answer
    response = DESCRIPTION["paths"][path][method.lower()]["responses"][str(status)]
    kind = headers["content-type"].partition(";")[0]
    schema = resolve(response["content"][kind]["schema"])
    if kind == "application/json":
        jsonschema.validate(json.loads(content), schema)


def test_every_route_is_described() -> None:
    assert sorted(OPERATIONS) == sorted((route.method, route.path) for route in http.ROUTES)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_answers_are_as_described(
    server: Server, images: NDArray[np.float32], sample_png: bytes, method: str, path: str
) -> None:
    """The answers of a good request, and of one for a model that is not there."""
    bodies = {
        "infer": infer_body(images[:2], mexit_receipts=True),
        "classify": sample_png,
        "explain": sample_png,
    }
    body = bodies.get(path.rpartition("/")[2], b"")
    query = "?receipts=true" if path == "/v1/classify" else ""
    known = path.format(model="digits", version=1, file="dashboard.js", name="gate")
    if not path.startswith(("/v2/repository/models/", "/v1/cameras")):  # of the tests' common server, without cameras
        answer = server.ask(method, f"{known}{query}", body)
        assert answer[0] == 200
        assert_described(method, path, answer)
    unknown = path.format(model="letters", version=1, file="letters.js", name="gate")
    if unknown != path or path.startswith("/v1/cameras"):
        answer = server.ask(method, unknown, body)
        assert answer[0] == 404
        assert_described(method, path, answer)
    answer = server.ask("PUT", known)
    assert answer[0] == 405
    assert_described(method, path, answer)


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({}, b"{", 400),
        ({"Content-Encoding": "br"}, b"{}", 415),
        ({"Content-Length": str(2**40)}, b"", 413),
        ({"Inference-Header-Content-Length": "0"}, bytes(256), 200),
    ],
)
def test_errors_are_as_described(server: Server, headers: dict[str, str], body: bytes, status: int) -> None:
    answer = server.ask("POST", INFER, body, headers)
    assert answer[0] == status
    assert_described("POST", "/v2/models/{model}/infer", answer)


def test_the_description_is_valid_and_complete(server: Server) -> None:
    """Every reference and every path parameter is there, and the served description is this one."""
    assert server.json("GET", "/openapi.json") == (200, DESCRIPTION)
    text = json.dumps(DESCRIPTION)
    names = set(re.findall(r'"#/components/schemas/(\w+)"', text))
    assert names == set(DESCRIPTION["components"]["schemas"])
    for name in names:
        jsonschema.Draft202012Validator.check_schema(resolve({"$ref": f"#/{name}"}))
    for path, item in DESCRIPTION["paths"].items():
        given = {entry["name"] for entry in item.get("parameters", [])}
        assert given == set(re.findall(r"\{(\w+)\}", path))


class Page(HTMLParser):
    """The tags, links and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.add(tag)
        self.links += [value for name in ("href", "src") if (value := values.get(name))]
        self.ids |= {value for value in [values.get("id")] if value}

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_loads_nothing(server: Server) -> None:
    """It shows every route; links stay on the page and the server, and a browser is told to load nothing."""
    status, headers, content = server.ask("GET", "/docs")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert headers["content-security-policy"].startswith("default-src 'none';")
    page = Page(content.decode())
    assert not page.tags & {"script", "link", "img", "iframe", "form", "object"}
    assert {link for link in page.links if not link.startswith("#")} == {"openapi.json"}
    assert {link[1:] for link in page.links if link.startswith("#")} <= page.ids
    assert not re.search(r"url\(|@import", content.decode())
    for _, path in OPERATIONS:
        assert path in page.text
