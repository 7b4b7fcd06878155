"""Every route of the served document, with data that fits it and data that does not: no server error, nothing undocumented."""

from __future__ import annotations

import math
from collections import Counter

import hypothesis
import pytest
import requests
import schemathesis
from fake_house import BASE, FakeHouse, serving
from fake_tuner import gradient_over, known_adapter
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)
from wire_fixtures import other_wires

from serve.app import create_app
from serve.auth import LOCAL_TENANT
from serve.gradient_errors import API, gradient_response
from serve.openapi import DOCUMENT_PATH

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
MODES = {GenerationMode.POSITIVE: CHECKS, GenerationMode.NEGATIVE: [*CHECKS, negative_data_rejection]}
ADAPTER = "a" * 36 + "_model_adapter"  # of the Gradient wire


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    house = FakeHouse(context=4000)
    wires = other_wires(house, tmp_path_factory.mktemp("wires"))
    with gradient_over(house, tmp_path_factory.mktemp("gradient")) as gradient:
        assert known_adapter(gradient, LOCAL_TENANT, "any") == ADAPTER
        routers, shapes = [*wires, gradient.router()], {API: gradient_response}
        with serving(create_app(house, default_max_tokens=16, routers=routers, error_shapes=shapes)) as url:
            yield url


def fuzz(url: str, total: int) -> Counter[int]:
    """How often each status came, over so many cases, equally many of each route and mode that has any number of them."""
    document = schemathesis.openapi.from_url(url + DOCUMENT_PATH)
    operations = [result.ok() for result in document.get_all_operations()]
    runs = [(operation, mode) for operation in operations for mode in modes(operation)]
    cases = math.ceil(total / sum(bool(inputs(operation)) for operation, _ in runs))
    seen: Counter[int] = Counter()
    with requests.Session() as session:
        for operation, mode in runs:
            fuzz_operation(operation, mode, cases, session, seen)
    return seen


def inputs(operation) -> set[str]:
    """Where a request to the route says something: "path", "query", "body"."""
    takes = operation.definition.raw
    return {p["in"] for p in takes.get("parameters", [])} | ({"body"} if "requestBody" in takes else set())


def modes(operation) -> list[GenerationMode]:
    """Without body and query nothing can be wrong."""
    return list(MODES) if inputs(operation) & {"query", "body"} else [GenerationMode.POSITIVE]


def fuzz_operation(operation, mode, cases, session, seen):
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
            case.body["model"] = BASE  # a drawn name is nobody's, and what follows would never be reached
        if (
            mode is GenerationMode.POSITIVE
            and known
            and operation.path.startswith(API)
            and operation.method != "delete"
        ):
            case.path_parameters = {"id": ADAPTER}
            case.headers = {"x-gradient-workspace-id": "any"}
        response = case.call(session=session)
        seen[response.status_code] += 1
        case.validate_response(response, checks=MODES[mode])
        if response.status_code >= 400 and operation.path.startswith(API):
            assert response.json().keys() - {"payload"} == {"type", "message"}
        elif response.status_code >= 400:
            assert response.json()["error"].keys() == {"message", "type", "param", "code"}

    check()


def test_a_few_cases_of_every_route(served):
    seen = fuzz(served, 200)
    assert {200, 400, 404} <= seen.keys()


@pytest.mark.slow
def test_thousands_of_cases_of_every_route(served):
    seen = fuzz(served, 5000)
    assert seen.total() >= 5000
    print(dict(seen))
