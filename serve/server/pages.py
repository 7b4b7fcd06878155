"""Two pages for people: `/` says how the server is and what there is to see, `/docs` reads the served document out.  Pure.

Plain HTML without a script and without anything from another host, which the headers forbid as well.  Neither shows what
is a tenant's, so neither needs a key.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from html import escape

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response

from jaxlora.core.errors import Unavailable
from serve.http.request_log import HEALTH_PATH, METRICS_PATH, READY_PATH, STATS_PATH
from serve.http.schema import DOCUMENT_PATH

ROOT_PATH, DOCS_PATH = "/", "/docs"
LINKS = {  # what is to see, and what it is
    DOCS_PATH: "what the API takes and answers",
    DOCUMENT_PATH: "the same as an OpenAPI document",
    "/v1/models": "the base and its adapters",
    HEALTH_PATH: "whether the server can serve",
    READY_PATH: "whether it takes requests, or what it waits for",
    STATS_PATH: "slots, queues, tokens a second and jobs",
    METRICS_PATH: "the same for Prometheus",
}
STYLE = """\
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color-scheme: light dark }
code, summary { font-family: ui-monospace, monospace; overflow-wrap: anywhere }
summary { cursor: pointer; padding: .2rem 0 }
table { border-collapse: collapse; width: 100% }
td, th { text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #8884 }
b { display: inline-block; min-width: 4.5rem }"""
STYLE_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{STYLE_HASH}'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def pages(document: Callable[[], dict], check_ready: Callable[[], None]) -> APIRouter:
    """The routes of both pages.  document: makes the OpenAPI document.  check_ready: raises Unavailable, saying why."""
    router = APIRouter()
    read_out = functools.cache(lambda: docs_page(document()))

    @router.get(ROOT_PATH)
    async def root(request: Request) -> Response:
        """How the server is, as a page; as JSON for who asks for that alone."""
        try:
            check_ready()
            state = "ok"
        except Unavailable as error:
            state = error.message
        accepted = request.headers.get("accept", "")
        if "application/json" in accepted and "text/html" not in accepted:
            return JSONResponse({"object": "server", "status": state, "links": list(LINKS)}, headers={"Vary": "Accept"})
        return HTMLResponse(root_page(state), headers=HEADERS | {"Vary": "Accept"})

    @router.get(DOCS_PATH)
    async def docs() -> Response:
        """The document for people."""
        return HTMLResponse(read_out(), headers=HEADERS)

    return router


def page(title: str, body: str) -> str:
    """A whole page."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style></head><body><h1>{escape(title)}</h1>{body}</body></html>"
    )


def root_page(state: str) -> str:
    """The page at `/`."""
    rows = "".join(f'<tr><td><a href="{path}">{path}</a></td><td>{what}</td></tr>' for path, what in LINKS.items())
    return page(
        "jaxlora",
        f"<p>State: <strong>{escape(state)}</strong></p><table>{rows}</table>"
        "<p>Where keys exist, all but the first two and the probes need one: <code>Authorization: Bearer KEY</code>.</p>"
        "<p>In a terminal: <code>jaxlora chat --url</code> and this address.</p>",
    )


def docs_page(document: Mapping) -> str:
    """The page at `/docs`: each operation, then each schema that one names."""
    operations = "".join(
        operation(method, path, what)
        for path, methods in sorted(document["paths"].items())
        for method, what in methods.items()
    )
    schemas = document["components"]["schemas"]
    named = "".join(
        f'<details id="{escape(name)}"><summary>{escape(name)}</summary>{fields(schema)}</details>'
        for name, schema in sorted(schemas.items())
    )
    title = f"{document['info']['title']} {document['info']['version']}"
    return page(title, f"<h2>Operations</h2>{operations}<h2>Schemas</h2>{named}")


def operation(method: str, path: str, what: Mapping) -> str:
    """One operation, folded."""
    says = what.get("description") or what.get("summary", "")
    parts = [f"<p>{escape(says)}</p>"]
    rows = [
        (p["name"], p["in"] + (", required" if p.get("required") else ""), p.get("schema", {}))
        for p in what.get("parameters", ())
    ]
    rows += [("body", media, content.get("schema", {})) for media, content in contents(what.get("requestBody", {}))]
    for status, answer in what["responses"].items():
        found = list(contents(answer))
        says = answer.get("description", "")
        rows += [(status, f"{says}, {media}", c.get("schema", c.get("itemSchema", {}))) for media, c in found]
        rows += [] if found else [(status, says, {})]
    cells = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{escape(of)}</td><td>{kind(schema)}</td></tr>"
        for name, of, schema in rows
    )
    summary = f"<b>{escape(method.upper())}</b> {escape(path)}"
    return f"<details><summary>{summary}</summary>{''.join(parts)}<table>{cells}</table></details>"


def contents(part: Mapping) -> Iterator[tuple[str, Mapping]]:
    """(media type, content) of a body or an answer."""
    yield from part.get("content", {}).items()


def fields(schema: Mapping) -> str:
    """The fields of an object, or what else a schema is."""
    properties = schema.get("properties")
    if not properties:
        return f"<p>{kind(schema)}</p>"
    required = schema.get("required", ())
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{'required' if name in required else ''}</td><td>{kind(field)}</td></tr>"
        for name, field in properties.items()
    )
    return f"<table>{rows}</table>"


def kind(schema: Mapping) -> str:
    """What a value may be, in words and with links to the schemas."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    if arms := schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf"):
        return " or ".join(dict.fromkeys(kind(arm) for arm in arms))
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return " or ".join(f"<code>{escape(json.dumps(value))}</code>" for value in values)
    if schema.get("type") == "array":
        return f"list of {kind(schema.get('items', {}))}"
    if "properties" in schema:
        return (
            f"object with {', '.join(f'<code>{escape(n)}</code> {kind(s)}' for n, s in schema['properties'].items())}"
        )
    limits = [f"{word} {schema[key]}" for key, word in LIMITS.items() if key in schema]
    return escape(" ".join([str(schema.get("type", "anything")), *limits]))


LIMITS = {
    "minimum": "from",
    "maximum": "to",
    "exclusiveMinimum": "above",
    "exclusiveMaximum": "below",
    "minLength": "of at least",
    "maxLength": "of at most",
}
