"""Grammars: our tokenizer's bytes, what is refused and why, and answers of random logits that always parse."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from fake_backend import EOS, ByteTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_world import CONFIG, ask, forget_pages, run_all, watch_programs, with_pages, with_resident
from small_world import TINY_MODELS, tiny_path

from jaxlora.checkpoints.load import open_model
from jaxlora.core.errors import InvalidRequest, Overloaded
from jaxlora.model.compile_cache import CompileCounter
from serve.engine import grammar
from serve.engine.grammar import Grammar, Grammars, GrammarSource, llguidance_tokenizer
from serve.engine.request import FinishReason

pytest_plugins = ["serve_fixtures"]
BYTES = Grammars(ByteTokenizer())
BITS_W = np.zeros(-(-ByteTokenizer.vocab_size // 32), np.uint32)


def source(kind: str, text: object) -> GrammarSource:
    return GrammarSource(kind=kind, text=text if isinstance(text, str) else json.dumps(text), param="the_field")


def random_answer(grammar: Grammar, draw: np.random.Generator, most: int = 3000) -> tuple[bytes, bool]:
    """(text, whether the grammar ended it): any allowed byte with equal chance, but the end first."""
    state, said = grammar.start(), bytearray()
    bits_W = np.zeros(-(-ByteTokenizer.vocab_size // 32), np.uint32)
    for _ in range(most):
        state.allow(bits_W)
        assert state.error is None
        allowed = np.flatnonzero(np.unpackbits(bits_W.view(np.uint8), bitorder="little"))
        token = EOS if EOS in allowed and draw.random() < 0.5 else int(draw.choice(allowed))
        done = state.take(token)
        assert state.error is None
        if token < 256:
            said.append(token)
        if done:
            return bytes(said), True
    return bytes(said), False


# --- the tokenizer


@pytest.mark.parametrize("name", TINY_MODELS[:1])
def test_every_token_has_our_bytes(name):
    _, tokenizer = open_model(tiny_path(name))
    theirs = llguidance_tokenizer(tokenizer)
    assert theirs.vocab_size == tokenizer.vocab_size
    for i in range(tokenizer.vocab_size):
        raw = tokenizer.token_bytes(i)
        marked = raw == b"\xff"  # a byte that no text has is their mark of special tokens
        assert theirs.decode_bytes([i]) == (b"" if marked else raw)
        assert theirs.is_special_token(i) == (marked or i in tokenizer.special_ids)
    assert sorted(theirs.eos_tokens) == sorted(tokenizer.eos_ids)


# --- what is compiled, and what is refused


@pytest.mark.fault("R6")
@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        pytest.param("json", {"type": "nosuch"}, "nosuch", id="schema_with_a_wrong_type"),
        pytest.param("json", {"not": {}}, "not", id="schema_with_what_is_not_built"),
        pytest.param("json", {"not": {}, "x-guidance": {"lenient": True}}, "not", id="schema_that_would_be_lenient"),
        pytest.param("json", "[1", "JSON", id="no_json"),
        pytest.param("json", "true", "object", id="schema_that_is_no_object"),
        pytest.param("json", "[" * 60_000, "JSON", id="deep_json"),
        pytest.param("json", {"type": "integer", "multipleOf": 9999991}, "multipleOf", id="automaton_of_10_million"),
        pytest.param(
            "json",
            {"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]},
            "multipleOf",
            id="automaton_of_a_million_in_two_parts",
        ),
        pytest.param("json", {"enum": ["x" * 70_000]}, "65536", id="too_large"),
        pytest.param("json", {"$ref": "http://example.com/x"}, "example.com", id="schema_elsewhere"),
        pytest.param("regex", "([", "regex", id="bad_regex"),
        pytest.param("regex", "(" * 20_000 + "a" + ")" * 20_000, "regex", id="deep_regex"),
        pytest.param("grammar", "start: A", "unknown name", id="bad_grammar"),
        pytest.param("grammar", "start: " + "(" * 5000 + '"a"' + ")" * 5000, "nested", id="deep_grammar"),
        pytest.param("grammar", "root ::= " + "(" * 5000 + '"a"' + ")" * 5000, "recursion", id="deep_gbnf"),
        pytest.param("grammar", 'start: %json {"multipleOf": 9999991}', "%json", id="schema_in_a_grammar"),
        pytest.param(
            "grammar", '%llguidance {"no_forcing": false}\nstart: "a"', "%llguidance", id="options_of_the_library"
        ),
    ],
)
def test_a_bad_grammar_is_an_error_of_its_field_in_one_line(kind, text, reason):
    with pytest.raises(InvalidRequest, match=re.escape(reason)) as caught:
        BYTES.compile_now(source(kind, text))
    assert caught.value.param == "the_field"
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 400


def test_a_grammar_is_compiled_once_and_the_oldest_are_forgotten(monkeypatch):
    monkeypatch.setattr(grammar, "KEPT", 2)
    grammars = Grammars(ByteTokenizer())
    first = grammars.compile_now(source("regex", "a"))
    assert grammars.compile_now(source("regex", "a")) is first
    assert grammars.compile_now(source("grammar", 'start: "a"')) is not first
    grammars.compile_now(source("regex", "b"))
    assert grammars.compile_now(source("regex", "a")) is not first


@pytest.fixture
def held(monkeypatch):
    """An event until which schemas, and no other grammars, take to be compiled."""
    go_on, written = threading.Event(), grammar._written
    monkeypatch.setattr(grammar, "_written", lambda s: (s.kind != "json" or go_on.wait(60), written(s))[1])
    yield go_on
    go_on.set()


@pytest.mark.fault("R6")
def test_a_grammar_that_takes_too_long_is_refused_and_one_that_waits_for_it_is_told_to_retry(monkeypatch, held):
    monkeypatch.setattr(grammar, "COMPILE_S", 0.1)
    monkeypatch.setattr(grammar, "THREADS", 1)
    grammars = Grammars(ByteTokenizer())
    with pytest.raises(InvalidRequest, match=r"over 0.1 s") as caught:
        asyncio.run(grammars.compile(source("json", {"type": "integer"}), "acme"))
    assert caught.value.param == "the_field"
    for tenant in ("acme", "globex"):
        with pytest.raises(Overloaded):
            asyncio.run(grammars.compile(source("regex", "a"), tenant))
    held.set()
    monkeypatch.setattr(grammar, "COMPILE_S", 60.0)
    assert asyncio.run(grammars.compile(source("regex", "a"), "acme"))


def test_one_grammar_of_a_tenant_is_compiled_at_a_time(monkeypatch, held):
    monkeypatch.setattr(grammar, "COMPILE_S", 1.0)
    grammars = Grammars(ByteTokenizer())
    slow, quick = source("json", {"type": "integer"}), source("regex", "a")

    async def both() -> list:
        first = asyncio.create_task(grammars.compile(slow, "acme"))
        await asyncio.sleep(0)
        others = [grammars.compile(quick, tenant) for tenant in ("acme", "globex")]
        return await asyncio.gather(first, *others, return_exceptions=True)

    first, own, other = asyncio.run(both())
    assert [type(first), type(own)] == [InvalidRequest, Overloaded]
    assert not isinstance(other, BaseException)


@pytest.mark.fault("R6")
def test_a_grammar_that_is_too_complex_in_the_middle_says_so():
    state = BYTES.compile_now(
        source("json", {"type": "string", "minLength": 100_000, "pattern": "^(a|b|ab)*$"})
    ).start()
    bits_W = np.zeros(9, np.uint32)
    for token in b'"a':
        state.allow(bits_W)
        state.take(token)
    state.allow(bits_W)
    assert isinstance(state.error, InvalidRequest)
    assert "simplify" in state.error.message


def ambiguous(rules: int) -> str:
    """Lark: any text of a's, in as many ways as there are rules for each of them."""
    names = " | ".join(f"r{i}" for i in range(rules))
    return "\n".join([f"start: ({names})+"] + [f'r{i}: "a"' for i in range(rules)])


def test_six_hundred_ambiguous_rules_end_their_own_answer_and_a_plain_one_does_not(monkeypatch):
    """What a token may take is set by what one of the plain grammar takes, so that any machine can tell them apart."""

    def answer(text: str) -> tuple[list[float], InvalidRequest | None]:
        state, bits_W, times = Grammars(ByteTokenizer()).compile_now(source("grammar", text)).start(), BITS_W.copy(), []
        for _ in range(60):
            began = time.thread_time()
            state.allow(bits_W)
            state.take(ord("a"))
            times.append(time.thread_time() - began)
            if state.error is not None:
                break
        return times, state.error

    plain_s, error = answer('start: ("a" | "b")+')
    assert error is None
    monkeypatch.setattr(grammar, "TOKEN_S", 10 * float(np.median(plain_s)))
    monkeypatch.setattr(grammar, "TOKENS_OVER_S", 100 * float(np.median(plain_s)))
    monkeypatch.setattr(grammar, "MOST_S", 20 * float(np.median(plain_s)))
    _, error = answer(ambiguous(600))
    assert isinstance(error, InvalidRequest)
    assert "of every token" in error.message


def test_a_grammar_whose_text_is_forced_for_ever_keeps_no_thread():
    """In a process of its own: its mask after the x would never be made, and no thread could be stopped."""
    code = """
import numpy as np
from fake_backend import ByteTokenizer
from serve.engine.grammar import Grammars, GrammarSource
text = 'start: "y" | "x" A A\\nA: /a+/'
state = Grammars(ByteTokenizer()).compile_now(GrammarSource(kind="grammar", text=text, param="p")).start()
for token in b"xaa":
    state.allow(np.zeros(9, np.uint32))
    state.take(token)
print("done")
"""
    where = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=where, capture_output=True, timeout=30, check=True)
    assert done.stdout == b"done\n"


def test_a_grammar_whose_masks_take_too_long_ends_its_answers_and_is_refused_from_then_on(monkeypatch):
    grammars, text = Grammars(ByteTokenizer()), source("regex", "[ab]*")
    bits_W = np.zeros(9, np.uint32)
    state = grammars.compile_now(text).start()
    monkeypatch.setattr(grammar, "TOKEN_S", -1.0)  # every mask takes too long
    monkeypatch.setattr(grammar, "MOST_S", 10.0)
    monkeypatch.setattr(grammar, "TOKENS_OVER_S", 3.5)
    for _ in range(3):
        state.allow(bits_W)
        assert state.error is None
        state.take(ord("a"))
    state.allow(bits_W)
    assert isinstance(state.error, InvalidRequest)
    assert "simplify" in state.error.message
    monkeypatch.undo()
    with pytest.raises(InvalidRequest, match="the_field takes over") as caught:
        grammars.compile_now(text)
    assert caught.value.param == "the_field"
    assert grammars.compile_now(source("regex", "[abc]*")).start().error is None


def test_a_slow_mask_now_and_then_is_no_error(monkeypatch):
    ticks = iter([0.0] + [4.0] * 200)  # the first takes four seconds: the machine stood still
    monkeypatch.setattr(grammar.time, "thread_time", lambda: next(ticks))
    state = BYTES.compile_now(source("regex", "[xy]*")).start()
    bits_W = np.zeros(9, np.uint32)
    for _ in range(40):
        state.allow(bits_W)
        assert state.error is None
        state.take(ord("x"))


# --- what comes out


@pytest.mark.parametrize(
    ("kind", "text", "full"),
    [
        ("regex", "[ab]{2,4}-\\d", r"[ab]{2,4}-\d"),
        ("choice", ["yes", "no", "näin 😀", 'a"\n\\'], None),
        ("choice", ["same", "same and more"], None),
        ("grammar", 'start: "a"+ "b"', r"a+b"),
        ("grammar", 'root ::= ("x" | "y") digit\ndigit ::= [0-9]', r"[xy][0-9]"),
    ],
)
def test_random_answers_are_what_was_asked(kind, text, full):
    draw, grammar = np.random.default_rng(1), BYTES.compile_now(source(kind, text))
    seen = set()
    for _ in range(40):
        said, done = random_answer(grammar, draw)
        assert done
        said = said.decode()
        assert said in text if full is None else re.fullmatch(full, said)
        seen.add(said)
    assert len(seen) > 1


scalars = st.one_of(
    st.builds(lambda low, n: {"type": "string", "minLength": low, "maxLength": low + n}, *[st.integers(0, 4)] * 2),
    st.builds(
        lambda low, n: {"type": "integer", "minimum": low, "maximum": low + n},
        *[st.integers(-50, 50)] * 1,
        st.integers(0, 99),
    ),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"enum": ["a", 2, None, "é"]}, {"const": "x y"}]),
    st.just({"type": "number", "minimum": -1, "maximum": 1}),
)
schemas = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.builds(lambda item, n: {"type": "array", "items": item, "maxItems": n}, inner, st.integers(0, 3)),
        st.builds(
            lambda fields, some: {
                "type": "object",
                "properties": fields,
                "required": sorted(fields)[:some],
                "additionalProperties": False,
            },
            st.dictionaries(st.text("abü ", min_size=1, max_size=4), inner, max_size=3),
            st.integers(0, 3),
        ),
        st.builds(lambda one, two: {"anyOf": [one, two]}, inner, inner),
    ),
    max_leaves=6,
)


def valid(value: object, schema: dict) -> bool:
    """Whether the value is what the schema says, of the words that `schemas` uses."""
    if "anyOf" in schema:
        return any(valid(value, s) for s in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return any(value == v and type(value) is type(v) for v in schema.get("enum", [schema.get("const")]))
    match schema["type"]:
        case "null":
            return value is None
        case "boolean":
            return isinstance(value, bool)
        case "string":
            return isinstance(value, str) and schema["minLength"] <= len(value) <= schema["maxLength"]
        case "integer" | "number" as kind:
            whole = isinstance(value, int) and not isinstance(value, bool)
            number = whole or (kind == "number" and isinstance(value, float))
            return number and schema["minimum"] <= value <= schema["maximum"]
        case "array":
            return (
                isinstance(value, list)
                and len(value) <= schema["maxItems"]
                and all(valid(v, schema["items"]) for v in value)
            )
        case "object":
            known = schema["properties"]
            return (
                isinstance(value, dict)
                and set(schema["required"]) <= set(value) <= set(known)
                and all(valid(v, known[k]) for k, v in value.items())
            )
    raise AssertionError(schema)


@settings(max_examples=150)
@given(schema=schemas, seed=st.integers(0, 2**32 - 1), compact=st.booleans())
def test_random_answers_to_small_schemas_parse_and_are_valid(schema, seed, compact):
    grammar = BYTES.compile_now(replace(source("json", schema), compact=compact))
    said, done = random_answer(grammar, np.random.default_rng(seed))
    assert done
    value = json.loads(said)
    assert valid(value, schema), (schema, value)
    if not compact and not re.search(rb"\\|\d[.eE]|-0|[\x80-\xff]", said):
        assert json.dumps(value, ensure_ascii=False).encode() == said  # white space is json.dumps'


# --- through the engine


@pytest.fixture(scope="module")
def grammars(world) -> Grammars:
    return Grammars(world.tokenizer)


PERSON = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "ok": {"type": "boolean"}},
    "required": ["n", "ok"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("pages", [64, 14], ids=["room", "preempted_and_computed_again"])
def test_answers_of_base_and_adapters_parse_wherever_they_go(world, grammars, pages):
    """Greedy and drawn, with every other option: a random model's logits are as random as any."""
    engine = with_pages(world.engine(), pages)
    person, word = grammars.compile_now(source("json", PERSON)), grammars.compile_now(source("regex", "[a-z]{3,9}"))
    ways = [
        {},
        {"temperature": 1.0, "seed": 1, "choice": 1},
        {"temperature": 2.0, "seed": 2, "top_p": 0.9, "logprobs": 5, "min_tokens": 4},
        {"repetition_penalty": 1.5, "presence_penalty": 1.0, "logit_bias": ((7, 50.0),), "prompt_logprobs": 1},
        {"temperature": 1.0, "seed": 3, "min_tokens": 40},
    ]
    adapters = [None, *world.adapters[:3], None]
    requests = []
    for i, (adapter, way) in enumerate(zip(adapters, ways, strict=True)):
        requests.append(ask(f"person {i}", adapter, 4 + i, 40, grammar=person, ignore_eos=i % 2 == 0, **way))
        requests.append(ask(f"word {i}", adapter, 4 + i, 40, grammar=word, ignore_eos=False, **way))
    for _ in range(2):
        answers = run_all(engine, requests)
        for id, answer in answers.items():
            assert answer.error is None
            assert answer.finish is FinishReason.STOP
            if id.startswith("person"):
                assert valid(json.loads(answer.text), PERSON | {"required": ["n", "ok"]}), answer.text
            else:
                assert re.fullmatch("[a-z]{3,9}", answer.text), answer.text
    assert {len(a.tokens) >= 4 for id, a in answers.items() if id == "person 2"} == {True}


def test_a_grammar_changes_no_token_that_it_allows(world, engine, grammars):
    """Of a base that says letters only, so that every answer is text."""
    said = {token: world.tokenizer.decode([token]) for token in range(4, 320)}
    letters = tuple((token, 50.0) for token, text in said.items() if re.fullmatch("[a-zA-Z]", text))
    free = ask("free", world.adapters[1], 6, 10, logit_bias=letters)
    text = run_all(engine, [free])["free"].text
    assert re.fullmatch("[a-zA-Z]{10}", text)
    allowed = {
        "anything": "(?s:.*)",
        "letters": "[a-zA-Z]+",
        "exactly": text,
        "no such letter": f"[^{text[0]}]*",
    }
    requests = [
        replace(free, id=id, params=replace(free.params, grammar=grammars.compile_now(source("regex", regex))))
        for id, regex in allowed.items()
    ]
    texts = {id: answer.text for id, answer in run_all(engine, requests).items()}
    assert {id for id, same in texts.items() if same == text} == allowed.keys() - {"no such letter"}


def test_stop_strings_and_max_tokens_end_before_the_grammar_does(world, engine, grammars):
    word = grammars.compile_now(source("regex", "(abc){50}"))
    answers = run_all(
        engine,
        [
            ask("stop", None, 4, 40, grammar=word, stop=("cab",)),
            ask("include", None, 4, 40, grammar=word, stop=("cab",), include_stop=True),
            ask("length", None, 4, 1, grammar=word),
        ],
    )
    assert answers["stop"].text == "ab"
    assert answers["include"].text == "abcab"
    assert [answers[id].finish for id in ("stop", "include", "length")] == [FinishReason.STOP] * 2 + [
        FinishReason.LENGTH
    ]


def test_a_grammar_that_fails_ends_its_own_request_only(world, engine, grammars):
    hard = grammars.compile_now(source("json", {"type": "string", "minLength": 100_000, "pattern": "^(a|b|ab)*$"}))
    requests = [ask("hard", None, 4, 20, grammar=hard), ask("other", None, 5, 6)]
    answers = run_all(engine, requests)
    assert isinstance(answers["hard"].error, InvalidRequest)
    assert answers["other"].tokens == world.greedy(requests[1])


def test_no_grammar_compiles_a_program_and_no_neighbour_feels_one(world, grammars):
    """Bit for bit, as the same programs run: company that stays to the end keeps them the full ones."""
    engine = with_resident(world.engine(), world.adapters[0])
    engine.warm_up()
    ran = watch_programs(engine)
    quiet = ask("quiet", world.adapters[0], 6, 8, temperature=1.0, seed=5, logprobs=3)
    company = [ask(f"company{i}", None, 6, 8) for i in range(2)]
    plain = [ask(f"g{i}", None, 6, 8) for i in range(3)]
    alone = run_all(engine, [quiet, *company, *plain])["quiet"]
    met_alone = ran.pop("quiet")
    forget_pages(engine)
    texts = [
        source("regex", "[0-9]{8}[0-9]*"),
        source("choice", ["yes indeed", "no"]),
        source("json", {"type": "object"}),
    ]
    with CompileCounter() as counter:
        loud = [ask(f"g{i}", None, 6, 8, grammar=grammars.compile_now(s)) for i, s in enumerate(texts)]
        beside = run_all(engine, [quiet, *company, *loud])["quiet"]
    assert not counter.retraced
    assert ran["quiet"] == met_alone
    assert {r.lanes for r in met_alone} == {CONFIG.rows}
    assert (beside.tokens, beside.logprobs) == (alone.tokens, alone.logprobs)
