"""The Gradient wire as other clients use it: bodies, errors in its shape, tenants and workspaces, repeated calls."""

from __future__ import annotations

import re
import threading
import time

import httpx2
import pytest
from fake_backend import BASE, FakeBackend, serving
from fake_tuner import FakeTuner
from gradient_world import API, LONGEST, by_key, error_of

from jaxlora.config.serving import LimitsSection
from jaxlora.core.errors import StorageFailed
from serve.access.rate_limit import Limiter
from serve.api.gradient.complete import GradientConfig
from serve.api.gradient.errors import gradient_response
from serve.api.gradient.routes import GradientRoutes
from serve.server.app import create_app
from serve.server.gate import AppConfig

pytest_plugins = ["gradient_fixtures"]


# Short names for this file: those of the plug-in are everybody's.
@pytest.fixture(name="world")
def its_world(gradient):
    return gradient


@pytest.fixture(name="backend")
def its_house(gradient_house):
    return gradient_house


@pytest.fixture(name="tuner")
def its_tuner(gradient_tuner):
    return gradient_tuner


@pytest.fixture(name="http")
def its_http(gradient_http):
    return gradient_http


@pytest.fixture(name="adapter")
def its_adapter(gradient_adapter):
    return gradient_adapter


def create(http, world, name="made", **hyper):
    body = {"model": {"baseModelId": world.wire.base_id, "name": name}, "initialHyperparameters": hyper or None}
    return http.post("/models", json=body)


def tune(http, id, *samples, **fields):
    body = {"samples": [s if isinstance(s, dict) else {"inputs": s} for s in samples]}
    return http.post(f"/models/{id}/fine-tune", json=body, **fields)


def complete(http, id, **fields):
    return http.post(f"/models/{id}/complete", json={"query": "hi"} | fields)


# --- what is made


def test_extensions_reach_the_tuner(http, world, tuner):
    lora = {"rank": 4, "alpha": 8, "useRslora": True, "targetModules": ["q_proj"], "seed": 7}
    training = {"learningRate": 0.5, "weightDecay": 0.1, "maxGradNorm": 2}
    id = create(http, world, loraHyperparameters=lora, trainingArguments=training).json()["id"]
    _, name, spec, seed = tuner.created[0]
    assert (name, spec.rank, spec.alpha, spec.rslora, spec.targets, seed) == ("made", 4, 8.0, True, ("q_proj",), 7)
    tune(http, id, "ab")
    optimizer = tuner.calls[0][3]
    assert (optimizer.lr, optimizer.weight_decay, optimizer.clip) == (0.5, 0.1, 2.0)
    http.delete(f"/models/{id}")


@pytest.mark.parametrize(
    "hyper",
    [
        None,
        {},
        {"loraHyperparameters": None, "trainingArguments": None},
        {"loraHyperparameters": {"rank": None}, "trainingArguments": {"learningRate": None}},
    ],
    ids=["null", "empty", "inner_null", "values_null"],
)
def test_null_asks_for_the_default(http, world, tuner, hyper):
    body = {"model": {"baseModelId": world.wire.base_id, "name": "d"}, "initialHyperparameters": hyper}
    id = http.post("/models", json=body).json()["id"]
    assert tuner.created[0][2].rank == 8
    http.delete(f"/models/{id}")


def test_a_name_that_is_taken_or_no_name_gives_way_to_the_id(http, world, tuner, monkeypatch):
    names = ["mine", "mine", "a name with spaces", BASE, "versions", "ft-0123456789ab", "harbor"]
    monkeypatch.setattr(tuner, "is_made_by_job", lambda tenant, name: name == "harbor")  # and has no version yet
    ids = [create(http, world, name).json()["id"] for name in names]
    assert [name for _, name, _, _ in tuner.created] == ["mine", *ids[1:]]
    assert [http.get(f"/models/{id}").json()["name"] for id in ids] == names
    for id in ids:
        assert http.delete(f"/models/{id}").json() == {}


def test_an_adapter_that_could_not_be_made_leaves_nothing(http, world, tuner):
    tuner.failure = StorageFailed("the disk /secret")
    assert error_of(create(http, world, "lost"))[:2] == (500, "failed")
    tuner.failure = None
    assert "lost" not in [m.get("name") for m in http.get("/models").json()["models"]]


def test_what_is_read_has_the_documented_fields(http, world, adapter):
    card = http.get(f"/models/{adapter}").json()
    assert set(card) == {"type", "id", "name", "baseModelId", "latestUpdateTime"}
    assert (card["type"], card["baseModelId"]) == ("modelAdapter", world.wire.base_id)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", card["latestUpdateTime"])
    time.sleep(0.002)
    tune(http, adapter, "ab")
    assert http.get(f"/models/{adapter}").json()["latestUpdateTime"] > card["latestUpdateTime"]


@pytest.mark.parametrize(
    ("query", "count"),
    [
        ("", 2),
        ("?onlyBase=False", 2),
        ("?onlyBase=True", 1),
        ("?onlyBase=true", 1),
        ("?capability=fineTune", 2),
        ("?capability=complete&onlyBase=TRUE", 1),
    ],
)
def test_the_list_is_filtered(http, adapter, query, count):
    models = http.get("/models" + query).json()["models"]
    assert len(models) == count
    assert models[0] == {
        "type": "baseModel",
        "id": models[0]["id"],
        "name": BASE,
        "slug": "base",
        "capabilities": ["complete", "fineTune"],
    }
    assert models[0]["id"].endswith("_base_ml_model")
    assert len(models[0]["id"]) == 50


def test_an_adapter_that_another_wire_deleted_is_gone(http, world, backend):
    id = create(http, world, "elsewhere").json()["id"]
    del backend.adapters["elsewhere"]
    assert id not in [m["id"] for m in http.get("/models").json()["models"]]
    for answer in (http.get(f"/models/{id}"), complete(http, id), tune(http, id, "ab"), http.delete(f"/models/{id}")):
        assert error_of(answer)[:2] == (404, "unknownModelAdapter")


# --- what is refused, and how


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "kind"),
    [
        pytest.param("POST", "/models", {}, 400, "bodyParsingError", id="no_model"),
        pytest.param("POST", "/models", b"{", 400, "bodyParsingError", id="no_json"),
        pytest.param(
            "POST", "/models", {"model": {"baseModelId": "x", "name": "n"}}, 404, "unknownBaseModel", id="base"
        ),
        pytest.param(
            "POST", "/models", {"model": {"baseModelId": "x", "name": ""}}, 400, "bodyParsingError", id="name"
        ),
        pytest.param("GET", "/models?onlyBase=maybe", None, 400, "queryOrPathParsingError", id="query"),
        pytest.param("GET", "/models?other=1", None, 400, "queryOrPathParsingError", id="unknown_query"),
        pytest.param("GET", "/models/nobody", None, 404, "unknownModelAdapter", id="adapter"),
        pytest.param("DELETE", "/models/nobody", None, 404, "unknownModelAdapter", id="delete"),
        pytest.param("POST", "/models/x/complete", {"query": "q"}, 404, "unknownModelAdapter", id="ask"),
        pytest.param(
            "POST", f"/models/{'0' * 36}_base_ml_model/complete", {"query": "q"}, 404, "unknownBaseModel", id="ask_base"
        ),
        pytest.param("POST", "/embeddings/bge-large", {}, 404, "failed", id="embeddings"),
        pytest.param("POST", "/blocks/answer", {}, 404, "failed", id="blocks"),
        pytest.param("GET", "/rag-collections", None, 404, "failed", id="rag"),
        pytest.param("PUT", "/models", {}, 405, "failed", id="method"),
        pytest.param("POST", "/models", b"x" * 100_001, 413, "failed", id="large"),
    ],
)
def test_every_refusal_has_gradients_shape(http, method, path, body, status, kind):
    content = body if isinstance(body, bytes) else None
    answer = http.request(
        method,
        path,
        content=content,
        json=None if content is not None else body,
        headers={"content-type": "application/json"},
    )
    assert error_of(answer)[:2] == (status, kind)
    if status in (404, 405) and kind == "failed":
        assert "is not supported by this server" in error_of(answer)[2]


def test_the_gate_and_the_other_wire_keep_their_shapes(world):
    answer = httpx2.get(world.url + API + "/models", headers={"x-gradient-workspace-id": "lab"})
    assert error_of(answer)[:2] == (401, "failed")
    assert answer.headers["www-authenticate"] == "Bearer"
    answer = httpx2.get(world.url + API + "/models", headers={"host": "evil.example"})
    assert error_of(answer)[:2] == (403, "failed")
    assert set(httpx2.get(world.url + "/v1/models").json()) == {"error"}
    assert set(httpx2.get(world.url + "/apiary", headers={"authorization": "Bearer a"}).json()) == {"error"}


@pytest.mark.parametrize("workspace", [None, "", "w" * 300], ids=["none", "empty", "long"])
def test_a_workspace_is_needed(world, workspace):
    headers = {"authorization": "Bearer acme"} | ({} if workspace is None else {"x-gradient-workspace-id": workspace})
    status, kind, message = error_of(httpx2.get(world.url + API + "/models", headers=headers))
    assert (status, kind) == (400, "queryOrPathParsingError")
    assert "x-gradient-workspace-id" in message


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        pytest.param("", "samples[1].inputs", id="empty"),
        pytest.param([], "samples[1].inputs", id="no_spans"),
        pytest.param([{"value": "ab", "trainable": False}], "samples[1] has no token to train", id="nothing_to_train"),
        pytest.param("x" * LONGEST, f"samples[1] has {LONGEST + 1} tokens", id="long"),
        pytest.param([{"value": "ab", "odd": 1}], "odd", id="unknown_field"),
        pytest.param([{"value": "ab", "trainable": "yes"}], "trainable", id="lax"),
    ],
)
def test_a_bad_sample_is_named_and_nothing_is_trained(http, adapter, tuner, sample, words):
    status, kind, message = error_of(tune(http, adapter, "good", {"inputs": sample}))
    assert (status, kind) == (400, "bodyParsingError")
    assert words in message
    assert tuner.calls == []


@pytest.mark.parametrize(
    ("multiplier", "fine"),
    [(None, True), (0.5, True), (-2, True), (0, False), (1e-60, False), (1e60, False), ("1", False), (True, False)],
    ids=str,
)
def test_multipliers(http, adapter, tuner, multiplier, fine):
    sample = {"inputs": "ab", "fineTuningParameters": {"multiplier": multiplier}}
    answer = tune(http, adapter, sample)
    if fine:
        assert answer.status_code == 200
        assert tuner.calls[0][2][0].weights.tolist() == [0.0] + 2 * [1.0 if multiplier is None else multiplier]
    else:
        status, _, message = error_of(answer)
        assert status == 400
        assert "multiplier" in message


def test_no_samples_and_too_large_a_rank(http, world, adapter):
    assert error_of(tune(http, adapter))[:2] == (400, "bodyParsingError")
    assert error_of(create(http, world, loraHyperparameters={"rank": 65}))[:2] == (400, "bodyParsingError")


def test_the_longest_sample_is_taken(http, adapter):
    assert tune(http, adapter, "x" * (LONGEST - 1)).json()["numberOfTrainableTokens"] == LONGEST - 1


@pytest.mark.parametrize(
    ("fields", "status", "kind", "words"),
    [
        ({"query": ""}, 400, "bodyParsingError", "query"),
        ({"maxGeneratedTokenCount": 0}, 400, "bodyParsingError", "maxGeneratedTokenCount"),
        ({"maxGeneratedTokenCount": 195}, 422, "unprocessableContent", "context is 200"),
        ({"query": "x" * 200}, 422, "unprocessableContent", "context is 200"),
        (
            {"query": "x" * 195, "guidance": {"type": "choice", "value": ["yes"]}},
            422,
            "unprocessableContent",
            "context",
        ),
        ({"temperature": -1}, 400, "bodyParsingError", "temperature"),
        ({"temperature": 3}, 400, "bodyParsingError", "temperature"),
        ({"topP": 0}, 400, "bodyParsingError", "topP"),
        ({"topK": -2}, 400, "bodyParsingError", "topK"),
        ({"guidance": {"type": "regex", "value": ["a"]}}, 400, "bodyParsingError", "guidance.type"),
        ({"guidance": {"type": "choice", "value": []}}, 400, "bodyParsingError", "guidance.value"),
        ({"guidance": {"type": "choice", "value": ["x" * 33]}}, 400, "bodyParsingError", "guidance.value[0]"),
        (
            {"guidance": {"type": "choice", "value": ["abc"]}, "maxGeneratedTokenCount": 2},
            400,
            "bodyParsingError",
            "abc",
        ),
        ({"rag": {"collectionId": "c"}}, 404, "unknownRagCollection", "RAG"),
        ({"stream": True}, 400, "bodyParsingError", "stream"),
    ],
    ids=lambda value: re.sub(r"\W+", "_", str(value))[:30],
)
def test_a_field_of_complete_is_honoured_or_refused(http, adapter, fields, status, kind, words):
    told = error_of(complete(http, adapter, **fields))
    assert told[:2] == (status, kind)
    assert words in told[2]


# --- tenants


def test_another_tenant_and_another_workspace_find_nothing(http, world, adapter):
    bodies = set()
    others = [{"authorization": "Bearer zoo"}, {"x-gradient-workspace-id": "other"}]
    for id, headers in [(adapter, others[0]), (adapter, others[1]), ("f" * 36 + "_model_adapter", {})]:
        for answer in (
            http.get(f"/models/{id}", headers=headers),
            http.delete(f"/models/{id}", headers=headers),
            http.post(f"/models/{id}/complete", json={"query": "q"}, headers=headers),
            tune(http, id, "ab", headers=headers),
        ):
            assert answer.status_code == 404
            bodies.add(answer.text)
    assert len(bodies) == 1
    for headers in others:
        assert len(http.get("/models", headers=headers).json()["models"]) == 1
    assert http.get(f"/models/{adapter}", headers={"authorization": "Bearer boss"}).status_code == 200


# --- calls


@pytest.mark.fault("C5")
def test_a_repeated_call_with_its_key_trains_once(http, adapter, tuner):
    headers = {"idempotency-key": "k1"}
    first, again = (tune(http, adapter, "ab", headers=headers) for _ in range(2))
    assert (first.status_code, first.json()) == (again.status_code, again.json())
    assert len(tuner.calls) == 1
    other = tune(http, adapter, "another", headers=headers)
    assert other.status_code == 409
    tuner.failure = StorageFailed("no")
    assert tune(http, adapter, "ab", headers={"idempotency-key": "k2"}).status_code == 500
    tuner.failure = None
    assert tune(http, adapter, "ab", headers={"idempotency-key": "k2"}).status_code == 200  # it had not been done
    assert len(tuner.calls) == 2


def test_a_call_whose_time_is_over_is_done_all_the_same(http, adapter, tuner):
    tuner.hold = threading.Event()
    headers = {"x-request-timeout-s": "0.2", "idempotency-key": "slow"}
    assert error_of(tune(http, adapter, "ab", headers=headers))[:2] == (504, "failed")
    tuner.hold.set()
    deadline = time.monotonic() + 5
    while (answer := tune(http, adapter, "ab", headers=headers)).status_code != 200:
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.02)
    assert len(tuner.calls) == 1


def test_who_goes_away_frees_the_engine(http, world, adapter, backend):
    backend.hang_after = 1
    answer = http.post(f"/models/{adapter}/complete", json={"query": "q"}, headers={"x-request-timeout-s": "0.2"})
    assert error_of(answer)[:2] == (504, "failed")
    assert backend.streams[-1].cancelled.wait(5)
    with httpx2.Client(headers=http.headers, timeout=0.3) as hasty, pytest.raises(httpx2.TimeoutException):
        hasty.post(world.url + API + f"/models/{adapter}/complete", json={"query": "q"})
    assert backend.streams[-1].cancelled.wait(5)


def test_a_choice_that_fails_ends_the_others(http, adapter, backend):
    backend.admit, backend.submit_error = 2, StorageFailed("x")
    guidance = {"type": "choice", "value": ["a", "b", "c"]}
    assert error_of(complete(http, adapter, guidance=guidance))[:2] == (500, "failed")
    assert [s.cancelled.is_set() for s in backend.streams] == [True, True]


def test_a_server_that_does_not_train_says_so(world):
    backend = FakeBackend()
    records = world.wire._records
    wire = GradientRoutes(
        backend,
        GradientConfig(default_lr=1e-3, longest=9),
        records=records,
        once=world.wire._once,
        tuner=None,
    )
    app = create_app(
        backend, AppConfig(default_max_tokens=8, routers=[wire.router()], error_shapes={API: gradient_response})
    )
    headers = {"x-gradient-workspace-id": "empty"}
    with serving(app) as url, httpx2.Client(base_url=url + API, headers=headers) as http:
        assert http.get("/models").json()["models"][0]["capabilities"] == ["complete"]
        assert http.get("/models?capability=fineTune").json() == {"models": []}
        body = {"model": {"baseModelId": wire.base_id, "name": "n"}}
        assert error_of(http.post("/models", json=body))[:2] == (400, "modelIncapableOfFineTuning")
        assert http.post(f"/models/{wire.base_id}/complete", json={"query": "q"}).status_code == 200


def test_answers_and_training_count_against_the_minute(world):
    backend = FakeBackend(context=200)
    wire = GradientRoutes(
        backend,
        GradientConfig(default_lr=1e-3, longest=50),
        records=world.wire._records,
        once=world.wire._once,
        tuner=FakeTuner(backend),
        limiter=Limiter(LimitsSection(tokens_per_minute=60)),
    )
    app = create_app(
        backend,
        AppConfig(
            default_max_tokens=8,
            caller_of=by_key,
            routers=[wire.router()],
            error_shapes={API: gradient_response},
        ),
    )
    headers = {"authorization": "Bearer counted", "x-gradient-workspace-id": "counted"}
    with serving(app) as url, httpx2.Client(base_url=url + API, headers=headers) as http:
        body = {"model": {"baseModelId": wire.base_id, "name": "counted"}}
        id = http.post("/models", json=body).json()["id"]
        assert tune(http, id, "x" * 39).status_code == 200  # 40 tokens with the first
        fields = {"query": "x" * 5, "autoTemplate": False}
        answer = complete(http, id, maxGeneratedTokenCount=20, **fields)
        assert error_of(answer)[:2] == (429, "failed")
        assert int(answer.headers["retry-after"]) >= 1
        assert complete(http, id, maxGeneratedTokenCount=4, **fields).status_code == 200
        assert error_of(tune(http, id, "x" * 39))[:2] == (429, "failed")
        http.delete(f"/models/{id}")


def test_the_document_names_every_route_and_its_errors(world):
    paths = {p: m for p, m in world.app.openapi()["paths"].items() if p.startswith(API)}
    assert len(paths) == 5
    for methods in paths.values():
        for operation in methods.values():
            assert {"200", "400", "401", "404", "413", "422", "429", "503"} <= set(operation["responses"])
            schema = operation["responses"]["422"]["content"]["application/json"]["schema"]
            assert set(schema["required"]) == {"type", "message"}
