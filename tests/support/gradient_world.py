"""What the tests of the Gradient wire share: the SDK, keys, and what every error has.  Fixtures are in gradient_fixtures.py."""

from __future__ import annotations

import warnings

from jaxlora.core.errors import Unauthorized
from serve.access.caller import Caller
from serve.api.gradient.errors import API

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it is written for the pydantic of its time
    import gradientai

__all__ = ["API", "LONGEST", "MOST", "by_key", "error_of", "gradientai"]

LONGEST = 50  # tokens of a sample
MOST = 2  # adapters of the tenant `poor`


def by_key(connection):
    """The tenant is the key; `boss` is an admin."""
    _, _, key = connection.headers.get("authorization", "").partition("Bearer ")
    if not key:
        raise Unauthorized("give a key: Authorization: Bearer KEY")
    return Caller(owner=key, admin=key == "boss")


def error_of(answer):
    """(status, type, message) after checking what every error has."""
    body = answer.json()
    assert set(body) <= {"type", "message", "payload"}
    assert body["message"]
    assert ("payload" in body) == body["type"].endswith("ParsingError")
    assert answer.headers["x-request-id"].startswith("req_")
    return answer.status_code, body["type"], body["message"]
