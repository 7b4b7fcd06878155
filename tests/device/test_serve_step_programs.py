"""A step as several programs, as accelerators run it: the same answers, nothing compiled late, and no more than rows need."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from serve_world import ask, run_all

from jaxlora.model.compile_cache import CompileCounter
from serve.engine.engine import Engine
from serve.engine.request import SamplingParams
from serve.engine.sampling import SamplingBatch, Work
from serve.engine.step import Needs, StepBatch, StepPrograms

pytest_plugins = ["serve_fixtures"]


@pytest.fixture(scope="module")
def split(world) -> Engine:
    """An engine, warmed up, whose step is several programs."""
    engine = world.engine()
    engine._programs = StepPrograms(world.mesh, one=False)
    engine.warm_up()
    return engine


def mixed_requests(world) -> list:
    settings = [
        {},
        {"temperature": 0.9},
        {"temperature": 1.3, "min_p": 0.1, "logprobs": 3},
        {"temperature": 0.8, "top_p": 0.8, "top_k": 20},
        {"temperature": 0.7, "top_p": 0.5, "logprobs": 20},
        {"repetition_penalty": 1.4, "presence_penalty": 0.6},
        {"temperature": 1.0, "logit_bias": ((7, 2.0), (100, -5.0)), "logprobs": 1},
        {"prompt_logprobs": 4},
        {"prompt_logprobs": 0, "temperature": 1.0},
        {"logprobs": 0},
    ]
    return [
        ask(f"s{i}", [None, *world.adapters][i % 4], 5 + 2 * i, 9, seed=i, **params)
        for i, params in enumerate(settings * 2)
    ]


def test_several_programs_answer_as_one_does_and_compile_nothing(world, engine, split):
    requests = mixed_requests(world)
    one = run_all(engine, requests)
    with CompileCounter() as counter:
        several = run_all(split, requests)
    assert not counter.retraced
    for request in requests:
        got, want = several[request.id], one[request.id]
        assert got.tokens == want.tokens, request.params
        for a, b in ((got.logprobs, want.logprobs), (got.prompt_logprobs, want.prompt_logprobs)):
            assert [(t.token, [token for token, _ in t.top]) for t in a] == [
                (t.token, [token for token, _ in t.top]) for t in b
            ]
            np.testing.assert_allclose([t.logprob for t in a], [t.logprob for t in b], atol=1e-5)
            np.testing.assert_allclose([x for t in a for _, x in t.top], [x for t in b for _, x in t.top], atol=1e-5)


@pytest.mark.parametrize(
    ("params", "started"),
    [
        ({}, {"GREEDY"}),
        ({"temperature": 1.0}, {"DRAWN"}),
        ({"temperature": 1.0, "min_p": 0.2}, {"DRAWN"}),
        ({"top_k": 5, "top_p": 0.5}, {"GREEDY"}),
        ({"temperature": 1.0, "top_k": 5}, {"FILTERED"}),
        ({"temperature": 1.0, "top_p": 0.5}, {"FILTERED"}),
        ({"frequency_penalty": 1.0, "min_tokens": 3}, {"EDITED"}),
        ({"logprobs": 2}, {"GREEDY", "alternatives"}),
        ({"prompt_logprobs": 2}, {"GREEDY", "scores"}),
    ],
)
def test_no_program_does_more_than_the_rows_need(split, monkeypatch, params, started):
    ran = Counter()
    for name in ("choice", "alternatives", "scores"):
        program = getattr(split._programs, name)

        def watched(*args, name=name, program=program):
            ran[args[-1].name if name == "choice" else name] += 1
            return program(*args)

        monkeypatch.setattr(split._programs, name, watched)
    run_all(split, [ask(f"only {params}", None, 12, 4, **params)])
    assert set(ran) - {"GREEDY"} == started - {"GREEDY"}
    assert ran["scores"] == ("prompt_logprobs" in params)
    assert sum(ran[work.name] for work in Work) == 1 + 3  # the first of the prompt's step


def test_the_reported_programs_are_those_that_a_warm_up_compiles(world):
    """Of each prefill shape the step, four kinds of choice, the alternatives and scores, and no scores of decode."""
    engine, said, ran = world.engine(), [], set()
    programs = engine._programs = StepPrograms(world.mesh, one=False)
    launch = programs.launch

    def watched(base, pool, kv, newest_B, packed, edits, needs):
        ran.add((tuple(batch.words_GW.shape for batch in packed), needs))
        return launch(base, pool, kv, newest_B, packed, edits, needs)

    programs.launch = watched
    engine.warm_up(lambda number, of: said.append((number, of)))
    assert len(ran) == 4 * len(Work)
    assert said == [(i + 1, len(ran) + 1) for i in range(len(ran) + 1)]
    assert {needs.work for _, needs in ran} == set(Work)
    assert sum(needs.alternatives for _, needs in ran) == 4
    assert sum(needs.scores for _, needs in ran) == 2


def test_one_row_decides_for_its_step():
    batch = SamplingBatch.idle(4)
    assert Work.of(batch, edited=False) is Work.GREEDY
    batch.fill(2, SamplingParams(max_tokens=1, temperature=0.5), 0, 0)
    assert Work.of(batch, edited=False) is Work.DRAWN
    batch.fill(1, SamplingParams(max_tokens=1, temperature=1.0, top_p=0.9), 0, 0)
    assert Work.of(batch, edited=False) is Work.FILTERED
    assert Work.of(batch, edited=True) is Work.EDITED


@pytest.mark.parametrize(
    "needs", [Needs(work=w, alternatives=a, scores=a) for w in list(Work)[:3] for a in (False, True)]
)
def test_what_is_asked_of_a_batch_is_what_it_needs(needs):
    batch = StepBatch.idle(2, 4, 1)
    needs.ask(batch)
    assert Needs.of(batch, edited=False) == needs
