"""GET and POST /v1/tuning on a running server: who may, what changes, and what is refused."""

from __future__ import annotations

import pytest
from adapters_world import seeded, upload, zip_of
from pydantic import TypeAdapter

from serve.api.tuning import TuningObject

pytest_plugins = ["serve_fixtures", "adapters_fixtures"]


@pytest.fixture
def before(shelf, root):
    """The server's tuning, which it has again afterwards."""
    told = root.get("/v1/tuning").json()
    yield told
    assert root.post("/v1/tuning", json={"quantum_ms": told["quantum_ms"]}).json() == told


def test_an_admin_changes_the_quantum_and_nothing_else(shelf, root, acme, bot, before):
    upload(acme, bot, zip_of(seeded(1)))
    assert root.post(f"/v1/adapters/acme/{bot}/pin").status_code == 200
    changed = root.post("/v1/tuning", json={"quantum_ms": 12.5})
    assert changed.status_code == 200
    assert changed.json() == before | {"quantum_ms": 12.5, "pin": [f"acme/{bot}"]} == root.get("/v1/tuning").json()
    TypeAdapter(TuningObject).validate_python(changed.json())  # as the document says
    assert shelf.runner.engine.scheduler.active.quantum_s == 0.0125
    assert root.post(f"/v1/adapters/acme/{bot}/unpin").status_code == 200
    assert shelf.runner.tuning.quantum_ms == 12.5  # a pin keeps the quantum, too


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_tenant_may_not(acme, before, method):
    answer = acme.request(method, "/v1/tuning", json={"quantum_ms": 1.0} if method == "POST" else None)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "insufficient_scope")


@pytest.mark.parametrize(
    "body",
    ['{"quantum_ms": 0}', '{"quantum_ms": -1}', '{"quantum_ms": NaN}', '{"quantum_ms": "9"}', "{}", '{"slots": 2}'],
)
def test_what_is_no_quantum_is_refused(shelf, root, before, body):
    answer = root.post("/v1/tuning", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert shelf.runner.tuning.quantum_ms == before["quantum_ms"]
