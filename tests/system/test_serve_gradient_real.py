"""The official `gradientai` SDK against a real small server: what a call says of the loss, and what it does to the adapter."""

from __future__ import annotations

import json

import httpx2
import numpy as np
import pytest
from fake_backend import serving
from gradient_world import API, gradientai
from gradientai.openapi.client import exceptions as told
from jobs_api_world import BASE, LANE_TOKENS, Server, by_key

from jaxlora.config.serving import LimitsSection
from jaxlora.core.lora import AdapterWeights
from jaxlora.core.progress import Progress
from serve.api.adapters.service import AdapterService
from serve.api.gradient.complete import GradientConfig
from serve.api.gradient.errors import gradient_response
from serve.api.gradient.routes import GradientRoutes
from serve.db.gradient import StoredGradient
from serve.http.idempotency import Once
from serve.server.app import create_app
from serve.server.gate import AppConfig

pytest_plugins = ["serve_fixtures"]
SAMPLES = [{"inputs": "Q: 2+2? A: 4"}, {"inputs": "Q: 3+3? A: 6", "multiplier": 0.5}]


@pytest.fixture(scope="module")
def server(world, tmp_path_factory):
    """(server, url)."""
    it = Server(world, tmp_path_factory.mktemp("gradient"))
    it.runner.start()
    it.host.start(Progress(None))
    wire = GradientRoutes(
        it.runner,
        GradientConfig(default_lr=0.02, longest=LANE_TOKENS, rank=4),
        records=StoredGradient(it.database),
        once=Once(it.database),
        tuner=it.host.tuner,
    )
    app = create_app(
        it.runner,
        AppConfig(
            default_max_tokens=8,
            caller_of=by_key,
            routers=[wire.router()],
            error_shapes={API: gradient_response},
        ),
    )
    try:
        with serving(app) as url:
            yield it, url
    finally:
        it.stop()


@pytest.fixture
def sdk(server):
    with gradientai.Gradient(access_token="acme", workspace_id="lab", host=server[1] + API) as client:
        yield client


def loss_by_hand(world, text, adapter=None):
    """Nats of all tokens but the first, in float64."""
    ids = world.tokenizer.encode(text)
    weights, total = world.plain.merged(adapter), 0.0
    for i in range(1, len(ids)):
        logits = world.plain.logits(ids[:i], weights)
        total += np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[ids[i]]
    return total


def test_create_train_three_times_ask_and_delete(world, server, sdk):
    base = sdk.get_base_model(base_model_slug=BASE.rpartition("/")[2])
    adapter = base.create_model_adapter(name="sums")
    query = {"query": "Q: 2+2? A:", "auto_template": False, "temperature": 0, "max_generated_token_count": 6}
    assert adapter.complete(**query) == base.complete(**query)  # it changes nothing yet
    store, losses = server[0].runner.engine.store, []
    for _ in range(3):
        before = store.get(store.latest("acme", "sums"))
        done = adapter.fine_tune(samples=SAMPLES)
        texts = [s["inputs"] for s in SAMPLES]
        assert done.number_of_trainable_tokens == sum(len(world.tokenizer.encode(t)) - 1 for t in texts)
        # Under the weights before the update, and not scaled by the multipliers.
        assert done.sum_loss == pytest.approx(sum(loss_by_hand(world, t, before) for t in texts), rel=1e-4)
        losses.append(done.sum_loss)
    assert losses[0] > losses[1] > losses[2]
    assert store.latest("acme", "sums").version == before.ref.version + 1 == 4
    assert adapter.complete(**query).generated_output != base.complete(**query).generated_output

    with pytest.raises(told.BadRequestException) as caught:
        adapter.fine_tune(samples=[{"inputs": "Q: 2+2? A: 4", "multiplier": 3e38}])
    assert json.loads(caught.value.body)["type"] == "nanLoss"
    assert store.latest("acme", "sums").version == 4
    assert adapter.fine_tune(samples=SAMPLES).sum_loss < losses[2]  # it goes on as if that had not been asked

    adapter.delete()
    with pytest.raises(told.NotFoundException):
        adapter.complete(**query)
    assert store.latest("acme", "sums") is None


@pytest.mark.parametrize("way", ["gradient", "adapters", "its versions"])
def test_what_its_calls_have_learned_goes_with_an_adapter(server, sdk, tmp_path, way):
    it = server[0]
    name, store, tuner = f"gone-{way.replace(' ', '-')}", it.runner.engine.store, it.host.tuner
    adapter = sdk.get_base_model(base_model_slug=BASE.rpartition("/")[2]).create_model_adapter(name=name)
    adapter.fine_tune(samples=SAMPLES)
    moments = it.config.data / "tuned/acme" / name
    tuner._writer.flush()
    assert list(moments.iterdir())
    service = AdapterService(
        it.runner,
        config=it.host.live.jobs.trainer.base.config,
        read_head=lambda: None,
        staging=tmp_path / "staging",
        roots=(),
        quota=it.quota,
        deleted=tuner.forget,
    )
    if way == "gradient":
        adapter.delete()
    elif way == "adapters":
        service.delete("acme", name)
    else:
        for ref in store.versions("acme", name):
            assert moments.exists()
            service.delete("acme", f"{name}@{ref.version}")
    tuner._writer.flush()
    assert store.latest("acme", name) is None
    assert not moments.exists()
    assert ("acme", name) not in tuner._kept


@pytest.mark.parametrize("anew", [False, True], ids=["it is gone", "another has its name"])
def test_a_call_publishes_nothing_for_an_adapter_that_is_deleted_meanwhile(server, sdk, tmp_path, monkeypatch, anew):
    """The deletion comes by another wire, when the update is made and its version is not given yet."""
    it = server[0]
    store, publisher, name = it.runner.engine.store, it.runner.publisher, f"meanwhile-{anew}"
    adapter = sdk.get_base_model(base_model_slug=BASE.rpartition("/")[2]).create_model_adapter(name=name)
    adapter.fine_tune(samples=SAMPLES)
    kept = store.get(store.latest("acme", name)).weights
    spec, add = store.get(store.latest("acme", name)).spec, publisher.add

    def deleted_first(tenant, name, weights, *args, **how):
        store.delete(tenant, name)
        if anew:
            store.add(tenant, name, AdapterWeights(spec=spec, base_hash="another", weights=dict(kept)))
        return add(tenant, name, weights, *args, **how)

    monkeypatch.setattr(publisher, "add", deleted_first)
    with pytest.raises(told.NotFoundException):
        adapter.fine_tune(samples=SAMPLES)
    assert [ref.version for ref in store.versions("acme", name)] == ([3] if anew else [])


def test_without_room_for_more_versions_a_call_replaces_the_oldest(server, sdk, monkeypatch):
    it = server[0]
    base = sdk.get_base_model(base_model_slug=BASE.rpartition("/")[2])
    adapter = base.create_model_adapter(name="full")
    store = it.runner.engine.store
    each = store.nbytes(store.latest("acme", "full"))
    monkeypatch.setattr(it.quota, "limits", LimitsSection(adapter_bytes=10**12))
    used = 10**12 - it.quota.left_bytes("acme")
    monkeypatch.setattr(it.quota, "limits", LimitsSection(adapter_bytes=used + 2 * each))
    losses, versions = [], []
    for _ in range(4):
        losses.append(adapter.fine_tune(samples=SAMPLES).sum_loss)
        versions.append([r.version for r in store.versions("acme", "full")])
    assert versions == [[1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5]]
    assert losses == sorted(losses, reverse=True)
    with pytest.raises(told.ApiException) as caught:
        base.create_model_adapter(name="more")
    assert caught.value.status == 429
    assert json.loads(caught.value.body)["type"] == "failed"
    adapter.delete()
    base.create_model_adapter(name="more").delete()


def test_a_choice_is_the_one_that_was_trained(world, sdk, monkeypatch):
    monkeypatch.setattr(
        "serve.api.gradient.routes.secrets.randbelow", lambda most: 7
    )  # one draw in ten learns too slowly
    base = sdk.get_base_model(base_model_slug=BASE.rpartition("/")[2])
    adapter = base.create_model_adapter(name="chooser", learning_rate=0.05)
    ask = {"query": "colour?", "auto_template": False, "temperature": 0}
    guidance = {"type": "choice", "value": [" red", " blue"]}

    def by_hand():
        both = [loss_by_hand(world, ask["query"] + c) - loss_by_hand(world, ask["query"]) for c in guidance["value"]]
        return guidance["value"][int(np.argmin(both))]

    favourite = base.complete(**ask, guidance=guidance).generated_output
    assert favourite == by_hand()
    (other,) = set(guidance["value"]) - {favourite}
    for _ in range(12):
        adapter.fine_tune(
            samples=[{"inputs": [{"value": ask["query"], "trainable": False}, {"value": other, "trainable": True}]}]
        )
    done = adapter.complete(**ask, guidance=guidance)
    assert (done.finish_reason, done.generated_output) == ("stop", other)
    adapter.delete()


def test_a_negative_multiplier_pushes_away(server, sdk):
    base = sdk.get_base_model(base_model_slug=BASE.rpartition("/")[2])
    adapter = base.create_model_adapter(name="away", rank=2)
    url = f"{server[1]}{API}/models/{adapter.id}/fine-tune"
    sample = {"inputs": "Q: 2+2? A: 4", "fineTuningParameters": {"multiplier": -1}}
    headers = {"authorization": "Bearer acme", "x-gradient-workspace-id": "lab"}
    losses = [httpx2.post(url, json={"samples": [sample]}, headers=headers).json()["sumLoss"] for _ in range(3)]
    assert 0 < losses[0] < losses[1] < losses[2]
    adapter.delete()


def test_a_call_of_too_many_tokens_is_refused_and_names_the_setting(server, sdk, monkeypatch):
    base = sdk.get_base_model(base_model_slug=BASE.rpartition("/")[2])
    adapter = base.create_model_adapter(name="large")
    tokens = adapter.fine_tune(samples=SAMPLES).number_of_trainable_tokens
    tuner = server[0].host.tuner
    monkeypatch.setattr(tuner, "_call_tokens", tokens)
    adapter.fine_tune(samples=SAMPLES)
    monkeypatch.setattr(tuner, "_call_tokens", tokens - 1)
    with pytest.raises(told.BadRequestException, match=rf"{tokens} tokens.*at most {tokens - 1}.*training.call_tokens"):
        adapter.fine_tune(samples=SAMPLES)
    assert server[0].runner.engine.store.latest("acme", "large").version == 3
