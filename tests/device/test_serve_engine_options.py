"""What a request says of its tokens, through the engine: penalties, min_tokens, prompt log-probabilities; no neighbour feels it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from serve_world import CONFIG, ask, forget_pages, run_all, watch_programs, with_pages, with_resident
from test_serve_edits import by_hand

from jaxlora.model.compile_cache import CompileCounter
from serve.engine.request import MAX_TOP_LOGPROBS, FinishReason
from serve.engine.sequence import Plan

pytest_plugins = ["serve_fixtures"]
VOCAB = 320

PENALTIES = {"repetition_penalty": 1.4, "presence_penalty": 0.6, "frequency_penalty": 0.3}


def plain_loop(world, request, adapter, ends=()) -> list[int]:
    """Greedy over all logits of the plain model, edited by hand; refuses a choice that rounding could turn."""
    weights, said = world.plain.merged(adapter), []
    for _ in range(request.params.max_tokens):
        logits = world.plain.logits([*request.prompt, *said], weights)
        logits = by_hand(logits, request.params, list(request.prompt), said, ends)
        second, best = np.sort(logits)[-2:]
        assert best - second > 1e-4, "too close to call: choose another seed"
        said.append(int(logits.argmax()))
    return said


@pytest.mark.parametrize("pages", [64, 12], ids=["room", "preempted_and_computed_again"])
def test_greedy_with_penalties_is_the_plain_loop_wherever_a_request_goes(world, pages):
    engine = with_pages(world.engine(replace(CONFIG, host_bytes=0)), pages)
    bias = ((7, 2.0), (100, -5.0), (319, 3.0))
    settings = [PENALTIES, {"logit_bias": bias}, PENALTIES | {"logit_bias": bias}, {"frequency_penalty": 2.0}]
    requests = [ask(f"p{i}", world.adapters[i], 5 + 3 * i, 14, **s) for i, s in enumerate(settings)]
    answers = run_all(engine, requests)
    for request, adapter in zip(requests, world.adapters, strict=False):
        assert answers[request.id].tokens == plain_loop(world, request, adapter), request.id
        assert answers[request.id].tokens != world.greedy(request)
    assert (engine.scheduler.recomputed_tokens > 0) == (pages < 64)


def test_nothing_ends_an_answer_before_min_tokens(world, engine):
    first = ask("m", world.adapters[0], 5, 12)
    free = world.greedy(first)
    stop = next(t for t in free[2:] if free.index(t) >= 2)
    before = free.index(stop)
    eos = next(iter(world.tokenizer.eos_ids))
    pull = ((eos, 100.0),)
    answers = run_all(
        engine,
        [
            ask("m", world.adapters[0], 5, 12, stop_token_ids=(stop,)),
            ask("later", world.adapters[0], first.prompt, 12, stop_token_ids=(stop,), min_tokens=9),
            ask("eos", None, 5, 12, ignore_eos=False, logit_bias=pull),
            ask("eos later", None, 5, 12, ignore_eos=False, logit_bias=pull, min_tokens=5),
            ask("eos is a word", None, 5, 4, logit_bias=pull, min_tokens=2),
        ],
    )
    assert answers["m"].tokens == free[: before + 1]
    assert answers["later"].tokens[:before] == free[:before]
    assert len(answers["later"].tokens) > 9
    assert stop not in answers["later"].tokens[:9]
    assert len(answers["eos"].tokens) == 1
    assert len(answers["eos later"].tokens) == 6
    assert answers["eos later"].finish is FinishReason.STOP
    assert answers["eos is a word"].tokens == [eos] * 4


def test_a_stop_string_counts_from_min_tokens_on(world, engine):
    def asked(id, **more):
        return ask(id, world.adapters[0], range(10, 16), 20, **more)

    whole = run_all(engine, [asked("whole")])["whole"].text
    word = whole[2]
    later = run_all(engine, [asked("now", stop=(word,)), asked("later", stop=(word,), min_tokens=20)])
    assert later["now"].text == whole[:2]
    assert later["later"].text == whole


def raw_logprobs(world, tokens, adapter) -> np.ndarray:
    weights = world.plain.merged(adapter)
    rows = [world.plain.logits(tokens[:i], weights) for i in range(1, len(tokens))]
    return np.array([r - np.log(np.exp(r - r.max()).sum()) - r.max() for r in rows])


def check_scores(world, got, request, adapter, top: int) -> None:
    tokens = list(request.prompt)
    expected = raw_logprobs(world, tokens, adapter)
    assert [p.token for p in got] == tokens[1:]
    for p, row, token in zip(got, expected, tokens[1:], strict=True):
        assert abs(p.logprob - row[token]) < 1e-4
        assert p.rank == 1 + (row > row[token]).sum()
        best = np.sort(row)[::-1][:top]
        assert len(p.top) == top
        np.testing.assert_allclose([v for _, v in p.top], best, atol=1e-4)
        np.testing.assert_allclose([row[t] for t, _ in p.top], best, atol=1e-4)


@pytest.mark.parametrize("dropped", [False, True], ids=["undisturbed", "dropped_between_chunks"])
def test_every_prompt_token_is_scored_over_chunks_and_whatever_is_cached(world, engine, dropped):
    scheduler = engine.scheduler
    scheduler.limits = replace(scheduler.limits, lanes=2, host_pages=0)
    prompt = np.random.default_rng(3).integers(4, VOCAB, 29).tolist()  # four chunks of eight
    run_all(engine, [ask("fills the cache", world.adapters[0], prompt, 3)])
    hits = scheduler.pages.hits
    requests = [
        ask("a", world.adapters[0], prompt, 4, prompt_logprobs=3),
        ask("b", world.adapters[1], prompt[:9], 4, prompt_logprobs=MAX_TOP_LOGPROBS, temperature=1.0, seed=1),
        ask("c", None, prompt[:1], 4, prompt_logprobs=0),
        ask("d", None, prompt[:17], 12),
    ]

    def drop(_: int) -> None:
        a = engine._sequences.get("a")
        if dropped and a is not None and 8 <= a.done < 29 and not scheduler.recomputed_tokens:
            scheduler._preempt(a, engine.clock())
            scheduler._offload_or_drop(scheduler._preempted.pop(a.number), Plan())

    answers = run_all(engine, requests, drop)
    assert (scheduler.recomputed_tokens > 0) == dropped
    for id, adapter, top in (("a", world.adapters[0], 3), ("b", world.adapters[1], MAX_TOP_LOGPROBS), ("c", None, 0)):
        request = next(r for r in requests if r.id == id)
        check_scores(world, answers[id].prompt_logprobs, request, adapter, top)
    assert answers["d"].prompt_logprobs == []
    assert answers["a"].tokens == world.greedy(requests[0])
    assert hits == scheduler.pages.hits
    again = run_all(engine, [ask("e", world.adapters[0], prompt, 3)])
    assert scheduler.pages.hits > hits  # what a scored request has computed serves others
    assert again["e"].tokens == answers["a"].tokens[:3]


def test_a_prompt_can_be_scored_and_nothing_said_even_one_that_fills_the_context(world, engine):
    request = ask("score", world.adapters[2], CONFIG.max_tokens, 0, prompt_logprobs=1)
    answers = run_all(engine, [request, ask("beside", None, 5, 6)])
    check_scores(world, answers["score"].prompt_logprobs, request, world.adapters[2], 1)
    assert (answers["score"].tokens, answers["score"].text) == ([], "")
    assert answers["score"].finish is FinishReason.LENGTH


LOUD = [
    PENALTIES | {"logit_bias": tuple((i, (-1.0) ** i * 3) for i in range(4, 304)), "min_tokens": 9},
    {"prompt_logprobs": 20, "logprobs": 20},
    {"temperature": 1.7, "top_p": 0.6, "top_k": 9, "min_p": 0.05, "seed": 7, "repetition_penalty": 0.5},
    {"stop": ("a", "of"), "stop_token_ids": (5, 6, 7), "ignore_eos": False, "presence_penalty": -2.0},
]


def test_no_neighbour_feels_what_a_request_asks(world):
    """Bit for bit, as the same programs run: company that stays to the end keeps them the full ones."""
    engine = with_resident(world.engine(), *world.adapters[:2])
    ran = watch_programs(engine)
    quiet = [
        ask("greedy", world.adapters[1], 6, 10, logprobs=4),
        ask("drawn", None, 6, 10, temperature=0.9, top_p=0.9, seed=3, logprobs=4),
    ]
    company = ask("company", None, 6, 10)
    plain = [ask(f"loud{i}", world.adapters[0], 6, 10, seed=i) for i in range(len(LOUD))]
    loud = [ask(f"loud{i}", world.adapters[0], 6, 10, **{"seed": i} | s) for i, s in enumerate(LOUD)]
    alone = run_all(engine, [*quiet, company, *plain])
    met_alone = {r.id: ran.pop(r.id) for r in quiet}
    forget_pages(engine)
    beside = run_all(engine, [*quiet, company, *loud])
    for id in ("greedy", "drawn"):
        assert ran[id] == met_alone[id]
        assert {r.lanes for r in ran[id]} == {CONFIG.rows}
        assert beside[id].tokens == alone[id].tokens
        assert beside[id].logprobs == alone[id].logprobs


@pytest.mark.fault("R7")
def test_nothing_that_a_request_says_compiles(world):
    engine = world.engine()
    engine.warm_up()
    draw = np.random.default_rng(11)
    with CompileCounter() as counter:
        for turn in range(6):
            requests = []
            for i in range(8):
                some = {k: v for k, v in LOUD[int(draw.integers(4))].items() if draw.random() < 0.7}
                adapter = (None, *world.adapters[:3])[int(draw.integers(4))]
                some["min_tokens"] = min(some.get("min_tokens", 0), 1 + turn)
                requests.append(ask(f"{turn} {i}", adapter, int(draw.integers(1, 30)), 1 + turn, **some))
            run_all(engine, requests)
    assert not counter.retraced
