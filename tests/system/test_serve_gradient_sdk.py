"""The official `gradientai` SDK against the Gradient wire: its whole life of an adapter, and its exceptions."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest
from fake_backend import BOS, EOS
from gradient_world import API, MOST, gradientai
from gradientai.openapi.client import exceptions as told

from jaxlora.core.errors import Overloaded, RateLimited

pytest_plugins = ["gradient_fixtures"]
SLUG = "base"


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


@pytest.fixture(name="sdk")
def its_sdk(gradient_sdk):
    return gradient_sdk


def base(sdk):
    return sdk.get_base_model(base_model_slug=SLUG)


@pytest.fixture
def bot(sdk):
    adapter = base(sdk).create_model_adapter(name="bot")
    yield adapter
    adapter.delete()


def test_the_life_of_an_adapter(sdk, backend, tuner):
    adapter = base(sdk).create_model_adapter(name="life", rank=4, learning_rate=0.01)
    assert len(adapter.id) == len(base(sdk).id) == 50
    backend.reply = lambda request: f"version {request.adapter.version}"
    assert adapter.complete(query="who?").generated_output == "version 1"  # it can be asked at once
    losses = []
    for i in range(3):
        done = adapter.fine_tune(samples=[{"inputs": "Q: 2+2? A: 4"}])
        assert done.number_of_trainable_tokens == 12
        losses.append(done.sum_loss)
        assert adapter.complete(query="who?").generated_output == f"version {i + 2}"
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[2]
    with pytest.raises(told.BadRequestException) as caught:
        adapter.fine_tune(samples=[{"inputs": "boom", "multiplier": 1e30}])
    assert json.loads(caught.value.body)["type"] == "nanLoss"
    assert adapter.complete(query="who?").generated_output == "version 4"
    found = sdk.get_model_adapter(model_adapter_id=adapter.id)
    assert (found.name, found.base_model_id) == ("life", base(sdk).id)
    adapter.delete()
    for call in (
        adapter.delete,
        lambda: adapter.complete(query="who?"),
        lambda: adapter.fine_tune(samples=[{"inputs": "xx"}]),
    ):
        with pytest.raises(told.NotFoundException) as caught:
            call()
        assert json.loads(caught.value.body)["type"] == "unknownModelAdapter"


def test_models_are_listed(sdk, bot):
    models = sdk.list_models(only_base=False)
    assert [m.id for m in models][:2] == [base(sdk).id, bot.id]
    assert [m.id for m in sdk.list_models(only_base=True)] == [base(sdk).id]
    assert base(sdk).capabilities == ["complete", "fineTune"]
    for capability in gradientai.CapabilityFilterOption if hasattr(gradientai, "CapabilityFilterOption") else [None]:
        assert bot.id in [m.id for m in sdk.list_models(only_base=False, capability=capability)]
    assert sdk.list_embeddings_models() == []


def test_an_unknown_slug_ends_as_the_sdk_ends(sdk):
    with pytest.raises(StopIteration):
        sdk.get_base_model(base_model_slug="nobody")


def test_what_the_sdk_leaves_out_has_our_defaults(sdk, tuner, bot):
    tenant, name, spec, seed = tuner.created[0]
    assert (tenant, name, spec.rank, spec.alpha, spec.dropout, spec.rslora) == ("acme", "bot", 8, 32.0, 0.0, False)
    assert len(spec.targets) == 7
    assert 0 <= seed < 2**32
    bot.fine_tune(samples=[{"inputs": "ab"}])
    optimizer = tuner.calls[0][3]
    assert (optimizer.lr, optimizer.weight_decay, optimizer.clip) == (3e-4, 0.0, 1.0)
    assert (optimizer.b1, optimizer.b2, optimizer.eps, optimizer.schedule) == (0.9, 0.999, 1e-8, "constant")


def test_spans_and_multipliers_become_tokens_and_weights(sdk, tuner, bot):
    samples = [
        {
            "inputs": [
                {"value": "Q<turn>", "trainable": False},
                {"value": "A<turn>", "trainable": True, "parse_special_tokens": False},
            ],
            "multiplier": 0.5,
        },
        {"inputs": "xy"},
    ]
    done = bot.fine_tune(samples=samples)
    first, second = tuner.calls[0][2]
    assert first.tokens.tolist() == [BOS, ord("Q"), 258, *b"A<turn>"]  # the first mark is a token, the second is text
    assert first.weights.tolist() == [0.0] * 3 + [0.5] * 7
    assert (second.tokens.tolist(), second.weights.tolist()) == ([BOS, *b"xy"], [0.0, 1.0, 1.0])
    assert second.tokens.dtype == np.int32
    assert EOS not in first.tokens
    assert done.number_of_trainable_tokens == 9


def test_the_query_is_a_turn_unless_it_is_raw(sdk, backend, bot):
    bot.complete(query="hi")
    bot.complete(query="hi", auto_template=True)
    bot.complete(query="hi<turn>", auto_template=False)
    turn = tuple(backend.tokenizer.chat([{"role": "user", "content": "hi"}]))
    assert [r.prompt for r in backend.requests] == [turn, turn, (BOS, *b"hi", 258)]
    template, backend.tokenizer.chat_template = backend.tokenizer.chat_template, None
    try:
        bot.complete(query="hi")
    finally:
        backend.tokenizer.chat_template = template
    assert backend.requests[-1].prompt == (BOS, *b"hi")


def test_sampling_fields_reach_the_engine(sdk, backend, bot):
    done = bot.complete(query="hi", max_generated_token_count=5, temperature=0.25, top_k=3, top_p=0.5)
    assert (done.finish_reason, done.generated_output) == ("length", "Gr\u00fc\ufffd")  # it ends within a character
    params = backend.requests[-1].params
    assert (params.max_tokens, params.temperature, params.top_k, params.top_p) == (5, 0.25, 3, 0.5)
    done = bot.complete(query="hi")
    params = backend.requests[-1].params
    assert (params.max_tokens, params.temperature, params.top_k, params.top_p) == (128, 1.0, -1, 1.0)
    assert done.finish_reason == "stop"
    request = backend.requests[-1]
    assert (request.tenant, request.follow, request.adapter.version) == ("acme", False, 1)


def test_a_choice_is_scored_and_returned_verbatim(sdk, backend, bot):
    guidance = {"type": "choice", "value": ["no, never", "yes", "Grüße"]}
    done = bot.complete(query="hi", guidance=guidance, temperature=0)
    # The fake backend gives each token of a prompt minus its place: the shortest choice is the likeliest.
    assert (done.finish_reason, done.generated_output) == ("stop", "yes")
    assert [r.params.max_tokens for r in backend.requests] == [0, 0, 0]
    assert [bytes(r.prompt[-len(c.encode()) :]) for r, c in zip(backend.requests, guidance["value"], strict=True)] == [
        c.encode() for c in guidance["value"]
    ]


def test_the_base_can_be_asked_and_not_trained(sdk, backend, world, http):
    base(sdk).complete(query="hi")
    assert backend.requests[-1].adapter is None
    answer = http.post(f"/models/{world.wire.base_id}/fine-tune", json={"samples": [{"inputs": "ab"}]})
    assert (answer.status_code, answer.json()["type"]) == (400, "modelIncapableOfFineTuning")


def test_many_at_once(sdk, bot):
    async def ask():
        return await asyncio.gather(*(bot.acomplete(query=f"q{i}", max_generated_token_count=4) for i in range(12)))

    assert len(asyncio.run(ask())) == 12


@pytest.mark.parametrize(
    ("error", "exception", "status"),
    [
        pytest.param(Overloaded("the queue is full; retry later"), told.ServiceException, 503, id="overloaded"),
        pytest.param(RateLimited("too many", retry_after_s=2.5), told.ApiException, 429, id="rate"),
        pytest.param(RuntimeError("/secret/path"), told.ServiceException, 500, id="ours"),
    ],
)
def test_errors_are_the_sdks_exceptions(sdk, backend, bot, error, exception, status):
    backend.submit_error = error
    with pytest.raises(exception) as caught:
        bot.complete(query="hi")
    backend.submit_error = None
    assert caught.value.status == status
    body = json.loads(caught.value.body)
    assert body["type"] == "failed"
    assert "secret" not in body["message"]
    if status == 429:
        assert caught.value.headers["Retry-After"] == "3"


def test_without_a_key_it_is_unauthorized(world):
    with (
        gradientai.Gradient(access_token="", workspace_id="lab", host=world.url + API) as sdk,
        pytest.raises(told.UnauthorizedException) as caught,
    ):
        sdk.list_models(only_base=True)
    assert json.loads(caught.value.body)["type"] == "failed"


def test_a_tenant_with_too_many_adapters_is_told(world, backend, tuner):
    with gradientai.Gradient(access_token="poor", workspace_id="lab", host=world.url + API) as sdk:
        made = [base(sdk).create_model_adapter(name="a") for _ in range(MOST)]
        with pytest.raises(told.ApiException) as caught:
            base(sdk).create_model_adapter(name="a")
        assert caught.value.status == 429
        made.pop().delete()
        made.append(base(sdk).create_model_adapter(name="a"))
        for adapter in made:
            adapter.delete()
