"""Every route of the served document, with data that fits it and data that does not: no server error, nothing undocumented."""

from __future__ import annotations

import contextlib
import math
from collections import Counter

import hypothesis
import pytest
import requests
import schemathesis
from edge_world import gradient_wire
from fake_backend import BASE, FakeBackend, serving
from files_world import opened
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)
from whole_world import joined, whole_config

from jaxlora.config.serving import LimitsSection
from jaxlora.core.progress import Progress
from jaxlora.storage.adapter_store import AdapterStore
from serve.access.rate_limit import Limiter
from serve.api.files.routes import FilesRoutes
from serve.api.gradient.errors import API, gradient_response
from serve.db.database import Database
from serve.http.idempotency import Once
from serve.http.schema import DOCUMENT_PATH
from serve.server.app import create_app
from serve.server.gate import AppConfig

pytest_plugins = ["serve_fixtures"]

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
MODES = {GenerationMode.POSITIVE: CHECKS, GenerationMode.NEGATIVE: [*CHECKS, negative_data_rejection]}
SHAPES = {"/api/": {"type", "message", "payload"}}  # of the errors of routes that are not OpenAI's


@pytest.fixture(scope="module")
def wires(tmp_path_factory):
    """Every wire that needs no model behind it."""
    folder, backend = tmp_path_factory.mktemp("wires"), FakeBackend(context=4000)
    with (
        contextlib.closing(Database(f"sqlite:///{folder}/db.sqlite")) as database,
        opened(database, folder / "files") as files,
    ):
        routers = [
            FilesRoutes(files, database, Once(database), Limiter(LimitsSection()), max_file_bytes=2**20).router(),
            gradient_wire(backend, database).router(),
        ]
        shapes = {API: gradient_response}
        with serving(
            create_app(backend, AppConfig(default_max_tokens=16, routers=routers, error_shapes=shapes))
        ) as url:
            yield url


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """The whole server, that generates and trains."""
    settings = whole_config(tmp_path_factory.mktemp("whole"))
    store = AdapterStore(settings.adapters, host_bytes=10**8)
    with contextlib.closing(store), joined(world, settings, store) as server:
        server.runner.start()
        server.own.jobs.start(Progress(None))
        try:
            with serving(server.app) as url:
                yield url
        finally:
            server.runner.stop()


def fuzz(url: str, base: str, total: int) -> Counter[int]:
    """How often each status came, over so many cases, equally many of each route and mode that has any number of them.

    Fails with what is wrong of all routes together.
    """
    document = schemathesis.openapi.from_url(url + DOCUMENT_PATH)
    operations = [result.ok() for result in document.get_all_operations()]
    runs = [(operation, mode) for operation in operations for mode in modes(operation)]
    cases = math.ceil(total / sum(bool(inputs(operation)) for operation, _ in runs))
    seen: Counter[int] = Counter()
    wrong = []
    with requests.Session() as session:
        for operation, mode in runs:
            try:
                fuzz_operation(operation, mode, cases, base, session, seen)
            except Exception as error:
                told = error.exceptions if isinstance(error, ExceptionGroup) else [error]
                wrong += [f"{operation.label}, {mode.name}: {e!r} {e}" for e in told]
    assert wrong == []
    return seen


def inputs(operation) -> set[str]:
    """Where a request to the route says something: "path", "query", "body"."""
    takes = operation.definition.raw
    return {p["in"] for p in takes.get("parameters", [])} | ({"body"} if "requestBody" in takes else set())


def modes(operation) -> list[GenerationMode]:
    """Without body and query nothing can be wrong."""
    return list(MODES) if inputs(operation) & {"query", "body"} else [GenerationMode.POSITIVE]


def fuzz_operation(operation, mode, cases, base, session, seen):
    @hypothesis.settings(
        max_examples=cases,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(operation.as_strategy(mode), hypothesis.strategies.integers(0, 3))
    def check(case, known):
        if known and isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = base  # a drawn name is nobody's, and what follows would never be reached
        if case.media_type == "multipart/form-data" and isinstance(case.body, dict):
            # A form cannot tell a list of one from its element, nor an empty one from no field.
            hypothesis.assume(all(len(value) > 1 for value in case.body.values() if isinstance(value, list)))
        response = case.call(session=session)
        seen[response.status_code] += 1
        case.validate_response(response, checks=MODES[mode])
        if response.status_code >= 400:
            shape = next((s for path, s in SHAPES.items() if operation.path.startswith(path)), {"error"})
            assert response.json().keys() <= shape

    check()


def test_a_few_cases_of_every_route(wires):
    seen = fuzz(wires, BASE, 120)
    assert {200, 400, 404} <= seen.keys()


@pytest.mark.parametrize(
    "total", [pytest.param(n, marks=m) for n, m in ((5000, pytest.mark.slow), (20_000, pytest.mark.soak))]
)
def test_thousands_of_cases_of_every_route(whole, total):
    seen = fuzz(whole, "tiny", total)
    assert seen.total() >= total
    print(dict(seen))
