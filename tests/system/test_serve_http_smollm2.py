"""The demo model over HTTP: eight adapters of different ranks answer eight clients at once as each answers alone."""

from __future__ import annotations

import asyncio
import json
import re

import openai
import pytest
from fake_backend import serving
from serve_world import stream_greedy

from serve.engine.grammar import llguidance_tokenizer
from serve.runtime.device_thread import DeviceThread
from serve.server.app import create_app
from serve.server.gate import AppConfig

pytest_plugins = ["smollm2_fixtures"]
pytestmark = pytest.mark.slow  # by default `test_serve_http_real` and `test_serve_grammar`, with a tiny model
BASE, TOKENS = "smollm2", 12
PROMPTS = [
    "The capital of France is",
    "def add(a, b):",
    "My favourite place is",
    "Once upon a time there was a small robot who lived in a house at the edge of a very large forest, and",
    "Water boils at",
    "The opposite of hot is",
    "Dear Sir or Madam,",
    "SELECT name FROM",
]


@pytest.fixture(scope="module")
def url(smol_engine):
    runner = DeviceThread(smol_engine, base_name=BASE)
    runner.start()
    try:
        with serving(create_app(runner, AppConfig(default_max_tokens=TOKENS))) as root:
            yield root + "/v1"
    finally:
        runner.stop()


def test_eight_adapters_at_once_say_what_each_says_alone(smol, smol_engine, url):
    names = [a.ref.name for a in smol.adapters]
    most_running = 0
    step = smol_engine.step

    def counted(deliver=None):
        nonlocal most_running
        most_running = max(most_running, len(smol_engine.scheduler.running))
        return step(deliver)

    async def scenario():
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=120) as client:
            smol_engine.step = counted
            together = await asyncio.gather(
                *(stream_greedy(client, n, p, TOKENS) for n, p in zip(names, PROMPTS, strict=True))
            )
            smol_engine.step = step
            alone = [await stream_greedy(client, n, p, TOKENS) for n, p in zip(names, PROMPTS, strict=True)]
            base = await asyncio.gather(*(stream_greedy(client, BASE, p, TOKENS) for p in PROMPTS))
            return together, alone, base

    together, alone, base = asyncio.run(scenario())
    assert most_running == 8
    assert together == alone
    assert all(len(tokens) == TOKENS and smol.opened.tokenizer.decode(tokens) == text for tokens, text in together)
    as_base = [(name, t[1]) for name, t, b in zip(names, together, base, strict=True) if t[0] == b[0]]
    assert as_base == []  # every adapter says something else


def test_chat_answers_in_the_template_of_the_model(url):
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120) as client:
        answer = client.chat.completions.create(
            model=BASE,
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            max_tokens=TOKENS,
            temperature=0,
        )
    assert "Paris" in answer.choices[0].message.content


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "city": {"enum": ["Paris", "London", "Oslo"]},
    },
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}


def test_every_structured_answer_of_base_and_adapters_parses_and_is_valid(smol, url):
    """Greedy and drawn, chat and completion, all at once; random adapters would write nothing of the kind by themselves."""
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    models = [BASE, *(a.ref.name for a in smol.adapters[:5])]

    async def scenario():
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=300) as client:
            chats = [
                client.chat.completions.create(
                    model=m,
                    messages=[{"role": "user", "content": "Anna is 31 and lives in Oslo. As JSON?"}],
                    response_format=form,
                    max_tokens=70,
                    temperature=i % 2,
                    seed=i,
                    n=1 + i % 2,
                    presence_penalty=0.1 * i,
                )
                for i, m in enumerate(models)
            ]
            plain = [
                client.completions.create(
                    model=m,
                    prompt="The date is",
                    max_tokens=30,
                    temperature=1,
                    extra_body={"structured_outputs": {"regex": "[0-9]{4}-[01][0-9]-[0-3][0-9]"}, "min_tokens": 2},
                )
                for m in models
            ]
            return await asyncio.gather(*chats), await asyncio.gather(*plain)

    chats, plain = asyncio.run(scenario())
    for answer in chats:
        for choice in answer.choices:
            assert choice.finish_reason == "stop"
            value = json.loads(choice.message.content)
            assert list(value) == ["name", "age", "city"]
            assert len(value["name"]) <= 12
            assert type(value["age"]) is int
            assert 0 <= value["age"] <= 120
            assert value["city"] in ("Paris", "London", "Oslo")
    for answer in plain:
        assert re.fullmatch("[0-9]{4}-[01][0-9]-[0-3][0-9]", answer.choices[0].text)


def test_every_token_of_the_demo_model_has_our_bytes_in_a_grammar(smol):
    theirs = llguidance_tokenizer(smol.opened.tokenizer)
    wrong = [
        i
        for i in range(smol.opened.tokenizer.vocab_size)
        if theirs.decode_bytes([i]) != smol.opened.tokenizer.token_bytes(i)
    ]
    assert wrong == []
