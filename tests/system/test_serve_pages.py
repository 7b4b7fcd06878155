"""The two pages for people: what they show, to whom, and that a browser asks no other host for anything."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

import httpx2
import pytest
from fake_backend import FakeBackend, serving
from fastapi import APIRouter

from jaxlora.core.errors import Unauthorized
from serve.http.drain import Drain
from serve.http.schema import DOCUMENT_PATH
from serve.server.app import create_app
from serve.server.gate import AppConfig
from serve.server.pages import LINKS

PAGES = ("/", "/docs")
FETCHED = ("src", "href", "srcset", "action", "data", "poster", "formaction", "ping")  # attributes


class Page(HTMLParser):
    """The tags, what they refer to, the text, and the styles of a page."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.refers, self.ids, self.styles, self.text = set(), [], set(), [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.refers += [value for name, value in attributes if name in FETCHED]
        self.ids |= {value for name, value in attributes if name == "id"}
        assert not [name for name, _ in attributes if name.startswith("on") or name == "style"]

    def handle_data(self, data):
        if self.lasttag == "style" and not self.styles:
            self.styles.append(data)
        else:
            self.text += data


def refuse(connection):
    raise Unauthorized("no key")


@pytest.fixture(scope="module")
def drain():
    return Drain()


@pytest.fixture(scope="module")
def backend():
    return FakeBackend()


@pytest.fixture(scope="module")
def url(drain, backend):
    """A server that lets nobody in."""
    router = APIRouter()

    @router.get("/v1/odd/{name}")
    async def odd(name: str) -> None:
        """Says <script>alert(1)</script>."""

    config = AppConfig(default_max_tokens=8, drain=drain, caller_of=refuse, routers=[router])
    with serving(create_app(backend, config)) as url:
        yield url


@pytest.fixture(params=PAGES)
def answer(url, request):
    return httpx2.get(url + request.param, headers={"accept": "text/html,*/*"})


def test_no_host_but_its_own_is_named_or_asked(answer):
    assert answer.status_code == 200
    page = Page(answer.text)
    assert re.findall(r"(?i)(?:https?:)?//[a-z0-9]", answer.text) == []
    assert page.refers
    assert [to for to in page.refers if not re.match(r"/[^/]|#|data:,$", to)] == []
    assert "url(" not in page.styles[0]
    assert "@import" not in page.styles[0]


def test_the_headers_allow_the_style_and_nothing_else(answer):
    rules = dict(rule.strip().split(" ", 1) for rule in answer.headers["content-security-policy"].split(";"))
    (style,) = Page(answer.text).styles
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert rules.pop("style-src") == f"'sha256-{digest}'"
    assert rules.pop("img-src") == "data:"
    assert rules == dict.fromkeys(("default-src", "base-uri", "form-action", "frame-ancestors"), "'none'")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "script" not in Page(answer.text).tags


def test_every_operation_and_schema_of_the_document_can_be_read(url):
    document = httpx2.get(url + DOCUMENT_PATH).json()
    page = Page(httpx2.get(url + "/docs").text)
    assert len(document["paths"]) > 10
    for path, operations in document["paths"].items():
        for method in operations:
            assert f"{method.upper()} {path}" in page.text
    assert page.ids == set(document["components"]["schemas"])
    assert {to.removeprefix("#") for to in page.refers if to.startswith("#")} <= page.ids
    assert "max_completion_tokens" in page.text
    assert "Says <script>alert(1)</script>." in page.text


def test_the_root_says_how_the_server_is_and_where_to_look(url, drain, backend):
    page = Page(httpx2.get(url + "/").text)
    assert "State: ok" in page.text
    assert set(LINKS) <= set(page.refers)
    drain.waits_for = lambda: "compiling <2> of 4 programs, 31 s"
    try:
        assert "compiling <2> of 4 programs, 31 s" in Page(httpx2.get(url + "/").text).text
    finally:
        drain.waits_for = None
    backend.state = "it hangs"
    try:
        assert "State: it hangs" in Page(httpx2.get(url + "/").text).text
    finally:
        backend.state = "ok"


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("application/json", "application/json"),
        ("text/html,application/xhtml+xml,*/*;q=0.8", "text/html; charset=utf-8"),
        ("*/*", "text/html; charset=utf-8"),
        ("text/html, application/json", "text/html; charset=utf-8"),
    ],
)
def test_who_asks_for_json_alone_gets_it(url, accept, kind):
    answer = httpx2.get(url + "/", headers={"accept": accept})
    assert (answer.headers["content-type"], answer.headers["vary"]) == (kind, "Accept")
    if kind == "application/json":
        assert answer.json() == {"object": "server", "status": "ok", "links": list(LINKS)}


def test_a_server_that_starts_says_what_it_waits_for_and_lets_nobody_in(url, drain):
    drain.waits_for = lambda: "compiling 2 of 4 programs, 31 s"
    try:
        for path in ("/ready", "/health", "/v1/models"):
            answer = httpx2.get(url + path)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"], answer.headers["retry-after"]) == (503, "starting", "1")
            assert "starting: compiling 2 of 4 programs, 31 s; retry" in error["message"]
    finally:
        drain.waits_for = None
    assert [httpx2.get(url + path).status_code for path in ("/ready", "/health", "/v1/models")] == [200, 200, 401]
