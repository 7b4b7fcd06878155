"""The whole server over HTTP: eight clients, eight adapters, one base, and each reads what its adapter says alone."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from dataclasses import replace

import httpx2
import numpy as np
import openai
import pytest
from fake_backend import serving
from serve_world import CONFIG, check_idle, stream_greedy

from jaxlora.core.lora import ALL_TARGETS, ATTENTION_TARGETS
from jaxlora.model.compile_cache import CompileCounter
from serve.runtime.device_thread import DeviceThread
from serve.server.app import create_app
from serve.server.gate import AppConfig

pytest_plugins = ["serve_fixtures"]
BASE = "tiny"
COUNT = 8


@pytest.fixture(scope="module")
def eight(world):
    """Eight adapters of every rank and of different targets; the pool has three slots."""
    targets = [ALL_TARGETS, ATTENTION_TARGETS, ("q_proj", "v_proj"), ("lm_head", "down_proj")]
    return [world.add(f"tenant{i}", 200 + i, 1 + i % 6, targets[i % 4]) for i in range(COUNT)]


@pytest.fixture(scope="module")
def server(world, eight):
    runner = DeviceThread(world.engine(), base_name=BASE)
    runner.start()
    try:
        with serving(create_app(runner, AppConfig(default_max_tokens=16))) as url:
            yield runner, url
    finally:
        runner.stop()
    check_idle(runner.engine)


def prompt_of(i: int) -> list[int]:
    return np.random.default_rng(i).integers(4, 320, 4 + 5 * i).tolist()


def test_eight_streams_at_once_say_what_each_adapter_says_alone(world, eight, server):
    _runner, url = server
    max_tokens = 20

    async def scenario():
        async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=30) as client:
            models = [a.ref.name for a in eight]
            together = await asyncio.gather(
                *(stream_greedy(client, m, prompt_of(i), max_tokens) for i, m in enumerate(models))
            )
            alone = [await stream_greedy(client, m, prompt_of(i), max_tokens) for i, m in enumerate(models)]
            return together, alone, await stream_greedy(client, BASE, prompt_of(0), max_tokens)

    together, alone, base = asyncio.run(scenario())
    assert together == alone
    for i, (tokens, text) in enumerate(together):
        assert tokens == world.plain.greedy(prompt_of(i), max_tokens, eight[i]), i
        assert text == world.tokenizer.decode(tokens)
    assert base[0] == world.plain.greedy(prompt_of(0), max_tokens, None) != together[0][0]


def test_chat_goes_through_the_template(world, eight, server):
    messages = [{"role": "user", "content": "what is a slot?"}]
    ids = world.tokenizer.chat(messages)
    with openai.OpenAI(base_url=server[1] + "/v1", api_key="none", max_retries=0, timeout=30) as client:
        answer = client.chat.completions.create(
            model="tenant1@1", messages=messages, max_tokens=10, temperature=0, extra_body={"ignore_eos": True}
        )
    tokens = world.plain.greedy(ids, 10, eight[1])
    assert answer.choices[0].message.content == world.tokenizer.decode(tokens)
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 10)


def test_text_goes_through_the_tokenizer(world, server):
    with openai.OpenAI(base_url=server[1] + "/v1", api_key="none", max_retries=0, timeout=30) as client:
        answer = client.completions.create(
            model=BASE, prompt="hello slot", max_tokens=6, temperature=0, extra_body={"ignore_eos": True}
        )
    ids = world.tokenizer.encode("hello slot")
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.choices[0].text == world.tokenizer.decode(world.plain.greedy(ids, 6, None))
    body = {"model": BASE, "prompt": "hello slot"}
    tokenized = httpx2.post(server[1] + "/tokenize", json=body).json()
    assert tokenized["tokens"] == ids
    bare = httpx2.post(server[1] + "/tokenize", json=body | {"add_special_tokens": False}).json()
    assert bare["tokens"] == world.tokenizer.encode("hello slot", add_special_tokens=False) != ids
    back = httpx2.post(server[1] + "/detokenize", json={"model": BASE, "tokens": bare["tokens"]}).json()
    assert back["prompt"] == "hello slot"


@pytest.mark.fault("T3")
def test_a_version_published_between_two_requests_answers_the_second(world, server):
    runner, url = server
    first = world.add("fresh", seed=300)
    second = world.add("other", seed=301)
    with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=30) as client:

        def text():
            answer = client.completions.create(
                model="fresh", prompt=prompt_of(1), max_tokens=9, temperature=0, extra_body={"ignore_eos": True}
            )
            return answer.choices[0].text

        def expected(adapter):
            return world.tokenizer.decode(world.plain.greedy(prompt_of(1), 9, adapter))

        assert text() == expected(first)
        rows = world.device_rows(second)
        runner.call(lambda: runner.publisher.publish("acme", "fresh", second.spec, rows))
        assert text() == expected(second) != expected(first)
        card = client.models.retrieve("fresh").model_extra
        assert (card["version"], card["state"], card["rank"]) == (2, "device", 3)


def test_a_failing_adapter_is_an_error_of_its_asker(world, server):
    world.add("foreign-base", seed=1, base_hash="another")
    with openai.OpenAI(base_url=server[1] + "/v1", api_key="none", max_retries=0, timeout=30) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="foreign-base", prompt="x", max_tokens=4)
        assert caught.value.code == "base_mismatch"
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model=BASE, prompt="x", max_tokens=100)
        assert caught.value.code == "context_length_exceeded"
        assert client.completions.create(model=BASE, prompt="x", max_tokens=4).choices[0].finish_reason


def test_echoed_logprobs_and_prompt_logprobs_are_those_of_the_plain_model(world, eight, server):
    prompt = prompt_of(3)
    weights = world.plain.merged(eight[2])
    with openai.OpenAI(base_url=server[1] + "/v1", api_key="none", max_retries=0, timeout=30) as client:
        answer = client.completions.create(
            model="tenant2", prompt=prompt, max_tokens=0, echo=True, logprobs=2, extra_body={"prompt_logprobs": 1}
        )
    choice = answer.choices[0]
    assert choice.text == world.tokenizer.decode(prompt)
    told = choice.model_extra["prompt_logprobs"]
    for i, token in enumerate(prompt[1:], start=1):
        logits = world.plain.logits(prompt[:i], weights)
        raw = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        assert abs(choice.logprobs.token_logprobs[i] - raw[token]) < 1e-4
        assert abs(told[i][str(token)]["logprob"] - raw[token]) < 1e-4
        assert told[i][str(token)]["rank"] == 1 + (raw > raw[token]).sum()
        assert str(int(raw.argmax())) in told[i]


def test_the_prompt_tokens_that_were_cached_are_told(server):
    with openai.OpenAI(base_url=server[1] + "/v1", api_key="none", max_retries=0, timeout=30) as client:

        def cached(**options) -> int:
            prompt = [[9, *range(20, 41)], [8, *range(30, 40)]]
            answer = client.completions.create(model="tenant4", prompt=prompt, max_tokens=1, n=2, **options)
            assert answer.usage.prompt_tokens == 33
            return answer.usage.prompt_tokens_details.cached_tokens

        assert cached() == 0
        assert cached() == 20 + 8  # whole pages of four; each prompt counts once
        assert cached(extra_body={"prompt_logprobs": 0}) == 0


@pytest.mark.fault("R7")
def test_any_mixture_of_options_is_answered_and_compiles_nothing(eight, server):
    """Eight clients at once, each field drawn; answers with a form parse."""
    draw = np.random.default_rng(17)
    options = {
        "temperature": [0, 0.7, 2],
        "top_p": [0.1, 0.9],
        "presence_penalty": [-2, 0.5, 2],
        "frequency_penalty": [-2, 0.5, 2],
        "logit_bias": [{"5": 3, "300": -100}, {str(i): -1 for i in range(300)}],
        "seed": [1, 2**62],
        "stop": ["a", ["b", "c"]],
        "n": [1, 2],
        "echo": [True],
        "logprobs": [0, 5],
    }
    extra = {
        "top_k": [1, 40],
        "min_p": [0.1],
        "repetition_penalty": [0.01, 1.3, 100],
        "min_tokens": [1, 9],
        "stop_token_ids": [[5, 6]],
        "ignore_eos": [True],
        "prompt_logprobs": [0, 20],
        "structured_outputs": [{"regex": "[a-z]{2,5}"}, {"choice": ["yes", "no"]}, {"json_object": True}],
    }

    def some(of: dict) -> dict:
        return {k: v[int(draw.integers(len(v)))] for k, v in of.items() if draw.random() < 0.4}

    async def scenario():
        async with openai.AsyncOpenAI(base_url=server[1] + "/v1", api_key="none", max_retries=0, timeout=60) as client:
            for _ in range(4):
                asked = [(some(options), some(extra)) for _ in range(COUNT)]
                models = [BASE if draw.random() < 0.3 else a.ref.name for a in eight]
                answers = await asyncio.gather(
                    *(
                        client.completions.create(model=m, prompt=prompt_of(i % 5), max_tokens=9, **o, extra_body=e)
                        for i, (m, (o, e)) in enumerate(zip(models, asked, strict=True))
                    )
                )
                for (o, e), answer in zip(asked, answers, strict=True):
                    assert len(answer.choices) == o.get("n", 1)
                    ended = [c for c in answer.choices if c.finish_reason == "stop"]
                    if "regex" in e.get("structured_outputs", {}) and not o.keys() & {"stop", "echo"} | e.keys() & {
                        "stop_token_ids"
                    }:
                        assert all(re.fullmatch("[a-z]{2,5}", c.text) for c in ended), (o, e, answer)

    with CompileCounter() as counter:
        asyncio.run(scenario())
    assert not counter.retraced


@pytest.fixture
def crowd(world):
    """A slow server with clients in every state: running, preempted, in line, and waiting for an adapter to be read."""
    engine = world.engine(replace(CONFIG, rows=2, prefill_lanes=2, quantum_s=1e-9))
    gate, get, step = threading.Event(), engine.store.get, engine.step
    locked = world.adapters[4].ref
    world.store.get = lambda ref, *how: gate.wait(30) and get(ref, *how) if ref == locked else get(ref, *how)
    runner = DeviceThread(engine, base_name=BASE)
    runner.start()
    engine.step = lambda deliver: time.sleep(0.05) or step(deliver)
    try:
        with serving(create_app(runner, AppConfig(default_max_tokens=16, max_request_s=60))) as url:
            yield runner, url
    finally:
        gate.set()
        del world.store.get
        runner.stop()
    check_idle(engine)


def everyone(runner: DeviceThread, names: list[str]) -> bool:
    """Whether all are there, and somebody in each state."""
    engine = runner.engine
    running, preempted, waiting = engine.scheduler.counts()
    return min(running, preempted, waiting) > 0 and running + preempted + waiting == len(names) and bool(engine._loads)


async def crowded(world, runner, url, headers: dict[str, str], then) -> list[httpx2.Response]:
    """All clients ask; when each state is there, `then` is called with their tasks.  What they got."""
    names = [BASE, *(a.ref.name for a in world.adapters)] * 2
    async with httpx2.AsyncClient(base_url=url, timeout=30, headers=headers) as client:
        body = {"prompt": prompt_of(0), "max_tokens": 50, "ignore_eos": True}
        tasks = [asyncio.create_task(client.post("/v1/completions", json=body | {"model": n})) for n in names]
        began = time.monotonic()
        while not await asyncio.to_thread(lambda: runner.call(lambda: everyone(runner, names))):
            assert time.monotonic() - began < 20
        then(tasks)
        return await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.fault("R5")
def test_clients_that_hang_up_free_what_they_hold_wherever_they_are(world, crowd):
    runner, url = crowd
    asyncio.run(crowded(world, runner, url, {}, lambda tasks: [t.cancel() for t in tasks]))
    began = time.monotonic()
    while runner.call(lambda: runner.engine.has_work):
        assert time.monotonic() - began < 8  # of thirty and more that the answers would take
    runner.call(lambda: check_idle(runner.engine))


def test_requests_whose_time_is_over_end_wherever_they_are(world, crowd):
    runner, url = crowd
    headers = {"x-request-timeout-s": "2.5"}
    began = time.monotonic()
    answers = asyncio.run(crowded(world, runner, url, headers, lambda tasks: None))
    assert 2.4 < time.monotonic() - began < 8
    for answer in answers:
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert answer.headers["x-should-retry"] == "false"
    began = time.monotonic()
    while runner.call(lambda: runner.engine.has_work):
        assert time.monotonic() - began < 8
    runner.call(lambda: check_idle(runner.engine))


def test_a_client_that_hangs_up_frees_what_it_held(server):
    runner, url = server
    body = {"model": "tenant0", "prompt": prompt_of(0), "max_tokens": 60, "stream": True, "ignore_eos": True}
    body["seed"] = 1  # whose first tokens are text; bytes that are none yet would be held back
    slow = runner.engine.step
    runner.engine.step = lambda deliver: (
        time.sleep(0.15) or slow(deliver)
    )  # nine seconds of tokens: not over before we look
    try:
        with (
            httpx2.Client(base_url=url, timeout=10) as client,
            client.stream("POST", "/v1/completions", json=body) as r,
        ):
            lines = r.iter_lines()  # dropping it would hang up
            first = next(lines)
            assert first.startswith("data: ")
            assert runner.call(lambda: runner.engine.has_work), first
        began, generated = time.monotonic(), runner.engine.decoded_tokens
        while runner.call(lambda: runner.engine.has_work):
            assert time.monotonic() - began < 5
        assert runner.engine.decoded_tokens - generated < 40
        runner.call(lambda: check_idle(runner.engine))
    finally:
        runner.engine.step = slow
