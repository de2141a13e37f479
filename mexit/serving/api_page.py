"""The OpenAPI description as an HTML page (`GET /docs`), without scripts and outside resources."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

Json = dict[str, Any]
HEADERS = {
    "content-type": "text/html; charset=utf-8",
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
}
_METHODS = ("get", "post")
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222;
       background: #fff; }
details { border: 1px solid #ccc; border-radius: 6px; margin: .5rem 0; padding: .4rem .8rem; }
summary { cursor: pointer; }
code, pre { font: 14px/1.4 ui-monospace, monospace; }
pre { background: #f5f5f5; padding: .6rem; overflow-x: auto; }
.method { display: inline-block; min-width: 3.5rem; font-weight: bold; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .15rem 1rem .15rem 0; vertical-align: top; }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #181818; } pre { background: #262626; } }
"""


def api_page(description: Json) -> bytes:
    """The page of an OpenAPI description.

    Args:
        description: what `openapi.description` returns.
    """
    info = description["info"]
    title = f"{escape(info['title'])} {escape(info['version'])}"
    operations = "".join(_operations(description["paths"]))
    schemas = "".join(
        _fold(f'<code id="{escape(name)}">{escape(name)}</code>', _schema(schema))
        for name, schema in description["components"]["schemas"].items()
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
        f"<h1>{title}</h1><p>{escape(info['description'])} "
        'For programs: <a href="openapi.json">openapi.json</a>.</p>'
        "<p>Where the server has tokens, requests carry <code>Authorization: Bearer TOKEN</code>.</p>"
        f"<h2>Routes</h2>{operations}<h2>JSON</h2>{schemas}</body></html>\n"
    ).encode()


def _operations(paths: Json) -> Iterator[str]:
    for path, item in paths.items():
        for method in (name for name in _METHODS if name in item):
            operation = item[method]
            head = f'<span class="method">{method.upper()}</span> <code>{escape(path)}</code> '
            text = f"<p>{escape(operation['description'])}</p>" if "description" in operation else ""
            parameters = [*item.get("parameters", []), *operation.get("parameters", [])]
            content = text + _parameters(parameters) + _request(operation) + _responses(operation["responses"])
            yield _fold(head + escape(operation["summary"]), content)


def _parameters(parameters: list[Json]) -> str:
    rows = [
        (f"<code>{escape(entry['name'])}</code>", entry["in"], escape(entry.get("description", "")))
        for entry in parameters
    ]
    return _table(("parameter", "in", "meaning"), rows) if rows else ""


def _request(operation: Json) -> str:
    content = operation.get("requestBody", {}).get("content", {})
    rows = [(escape(kind), _kind(entry["schema"])) for kind, entry in content.items()]
    return _table(("body", ""), rows) if rows else ""


def _responses(responses: Json) -> str:
    rows = []
    for status, response in responses.items():
        kinds = ", ".join(f"{escape(kind)} {_kind(entry['schema'])}" for kind, entry in response["content"].items())
        rows.append((status, escape(response["description"]), kinds))
    return _table(("status", "when", "content"), rows)


def _kind(schema: Json) -> str:
    """The name of a schema, as a link, or nothing for text and bytes."""
    names = [entry["$ref"].rpartition("/")[2] for entry in schema.get("oneOf", [schema]) if "$ref" in entry]
    return " or ".join(f'<a href="#{escape(name)}"><code>{escape(name)}</code></a>' for name in names)


def _schema(schema: Json) -> str:
    return f"<pre>{escape(json.dumps(schema, indent=2))}</pre>"


def _fold(head: str, content: str) -> str:
    return f"<details><summary>{head}</summary>{content}</details>\n"


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    first = "".join(f"<th>{head}</th>" for head in heads)
    rest = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{first}</tr>{rest}</table>"
