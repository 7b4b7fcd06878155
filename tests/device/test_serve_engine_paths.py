"""Whatever happens to a request on its way, at whatever token, its answer is the one an undisturbed engine gives."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import jax
import numpy as np
import pytest
from serve_world import (
    CONFIG,
    ONE_SHAPE,
    SLOTS,
    Answer,
    Ran,
    ask,
    mixing,
    read_all,
    run_all,
    step,
    watch_programs,
    with_pages,
)

from jaxlora.model.serving_pool import zero_rows
from serve.engine.engine import Engine
from serve.engine.sequence import Plan, Sequence, Status

pytest_plugins = ["serve_fixtures"]
PROMPT, TOKENS = 19, 10  # three chunks, the last of them short; five pages and a bit
STEPS = 11  # of the request alone: one of prompt, ten of tokens, and it is gone
COLUMN = np.arange(STEPS)


def preempt(engine: Engine, s: Sequence) -> None:
    if s.status is Status.RUNNING:
        engine.scheduler._preempt(s, engine.clock())


def save(engine: Engine, s: Sequence) -> None:
    """Preempts it, and its KV goes to the host; its pages are filled with NaN meanwhile."""
    preempt(engine, s)
    if s.number in engine.scheduler._preempted:
        plan = Plan()
        engine.scheduler._offload_or_drop(engine.scheduler._preempted.pop(s.number), plan)
        engine._move(plan)
        assert s.status is Status.OFFLOADED
        engine.scheduler.pages.forget(s.salt)
        poison(engine)


def drop(engine: Engine, s: Sequence) -> None:
    """Preempts it, and its KV is lost."""
    limits = engine.scheduler.limits
    engine.scheduler.limits = replace(limits, host_pages=0)
    preempt(engine, s)
    if s.number in engine.scheduler._preempted:
        engine.scheduler._offload_or_drop(engine.scheduler._preempted.pop(s.number), Plan())
        engine.scheduler.pages.forget(s.salt)
        assert s.done == 0
    engine.scheduler.limits = limits
    poison(engine)


def poison(engine: Engine) -> None:
    """NaN in every page that nobody refers to."""
    scheduler = engine.scheduler
    held = {p for group in scheduler._groups.values() for s in group.values() for p in s.pages}
    free = np.array([p for p in range(engine.size.pages) if p not in held])
    format = engine._kv.k_LPZF.format
    engine._kv = jax.tree.map(lambda x: jax.device_put(x.at[:, free].set(np.nan), format), engine._kv)


PATHS: dict[str, Callable[[Engine, Sequence], None]] = {"preempt": preempt, "save": save, "drop": drop}


@pytest.fixture(scope="module")
def shared(world):
    """One engine for all positions: what one leaves behind meets the next."""
    return world.engine()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("lanes", [1, CONFIG.prefill_lanes])
def test_an_answer_is_the_same_after_each_path_at_each_position(world, shared, path, lanes):
    engine = shared
    engine.scheduler.prefill_lanes = lanes
    engine.scheduler.limits = replace(engine.scheduler.limits, lanes=lanes)
    neighbour_answers = []
    for at in COLUMN.tolist():
        request = ask(f"{path}/{lanes}/{at}", world.adapters[at % 4], PROMPT, TOKENS)
        neighbour = ask(f"n{path}{lanes}-{at}", world.adapters[(at + 1) % 4], 7, TOKENS)
        answers: dict[str, Answer] = defaultdict(Answer)
        engine.submit(request)
        engine.submit(neighbour)
        sequence, count = engine._sequences[request.id], 0
        while engine.has_work:
            if count == at and request.id in engine._sequences:
                PATHS[path](engine, sequence)
            step(engine, answers)
            count += 1
        assert answers[request.id].tokens == world.greedy(request), (path, at)
        neighbour_answers.append(answers[neighbour.id].tokens == world.greedy(neighbour))
    assert all(neighbour_answers)


@pytest.mark.fault("T12")
def test_an_answer_is_the_same_when_every_step_exchanges_adapters(world):
    """Six groups over three slots, and the longest active leaves at every step."""
    engine = world.engine(replace(CONFIG, quantum_s=1e-9))
    requests = [ask(f"r{i}", [None, *world.adapters][i % 6], 3 + 5 * i % 17, 4 + i % 9) for i in range(18)]
    answers = run_all(engine, requests)
    for r in requests:
        assert answers[r.id].tokens == world.greedy(r), r.id
    assert engine.scheduler.active.swaps >= 15


@pytest.mark.fault("R11")
@pytest.mark.parametrize("host_bytes", [0, 10**6])
def test_an_answer_is_the_same_when_pages_hold_little_more_than_one_request(world, host_bytes):
    engine = with_pages(world.engine(replace(CONFIG, quantum_s=1e-9, host_bytes=host_bytes)), 9)
    requests = [ask(f"r{i}", [None, *world.adapters][i % 6], 3 + 5 * i % 17, 4 + i % 9) for i in range(12)]
    answers = run_all(engine, requests)
    for r in requests:
        assert answers[r.id].tokens == world.greedy(r), r.id
    assert (engine.scheduler.recomputed_tokens > 0) >= (host_bytes == 0)


@pytest.mark.fault("T4")
def test_an_answer_stays_with_its_version_when_another_is_published_at_each_position(world, engine):
    rows = world.device_rows(world.adapters[1])
    first = world.add("republished", seed=0)
    for at in COLUMN.tolist():
        request = ask(f"old{at}", first, PROMPT, TOKENS)
        answers: dict[str, Answer] = defaultdict(Answer)
        engine.submit(request)
        count = 0
        while engine.has_work:
            if count == at:
                newest = world.add(first.ref.name, seed=100 + at)  # in the store
                engine.install(newest.ref, rows)
            step(engine, answers)
            count += 1
        assert answers[request.id].tokens == world.greedy(request), at


@pytest.mark.slow
@pytest.mark.parametrize("quantum_s", [1000.0, 1e-9])
def test_bfloat16_pages_change_no_more_than_their_rounding(world, quantum_s):
    """Preempted, saved and restored pages included.  Keys and values keep 8 bits, and these models' logits reach tens."""
    requests = [ask(f"r{i}", [None, *world.adapters][i % 6], 12 + i, 8, logprobs=0) for i in range(9)]
    exact = run_all(world.engine(), requests)
    engine = with_pages(world.engine(replace(CONFIG, kv_dtype="bfloat16", quantum_s=quantum_s)), 20)
    assert engine._kv.k_LPZF.dtype == "bfloat16"
    rounded = run_all(engine, requests)
    differences = [
        abs(a.logprob - b.logprob)
        for r in requests
        for a, b in zip(exact[r.id].logprobs, rounded[r.id].logprobs, strict=True)
        if exact[r.id].tokens == rounded[r.id].tokens
    ]
    assert len(differences) >= 5 * 8  # few answers differ in a token
    assert np.median(differences) < 0.02
    assert 0 < max(differences) < 0.3


def test_a_version_that_is_given_up_leaves_no_page_in_the_cache(world, engine):
    told = [
        ask(f"told{i}", a, PROMPT, 4, tenant=t)
        for i, (a, t) in enumerate(
            [(world.adapters[0], "acme"), (world.adapters[0], "zoo"), (world.adapters[1], "acme")]
        )
    ]
    run_all(engine, told)
    assert engine.release(world.adapters[0].ref)
    assert engine.scheduler.pages.salts == [("acme", world.adapters[1].ref, None)]
    again = [replace(r, id=f"again {r.id}") for r in told]
    before = engine.scheduler.pages.hits
    answers = run_all(engine, again)
    assert engine.scheduler.pages.hits == before + PROMPT // CONFIG.page_tokens * CONFIG.page_tokens
    for r in again:
        assert answers[r.id].tokens == world.greedy(r), r.id


def test_an_answer_is_the_same_when_its_beginning_is_found_in_the_cache(world, engine):
    first = ask("first", world.adapters[0], PROMPT, TOKENS)
    told = [*first.prompt, *run_all(engine, [first])["first"].tokens]
    for count in range(1, len(told)):
        again = ask(f"again{count}", world.adapters[0], told[:count], 3)
        answer = run_all(engine, [again])[again.id]
        assert answer.tokens == world.greedy(again), count
        assert count < PROMPT or answer.tokens[: len(told) - count] == told[count : count + 3], count
    assert engine.scheduler.pages.hits > 100
    other = ask("other", world.adapters[1], told[:20], 3)
    before = engine.scheduler.pages.hits
    assert run_all(engine, [other])["other"].tokens == world.greedy(other)
    assert engine.scheduler.pages.hits == before  # another adapter's KV is never found


@pytest.mark.parametrize("mixes", [False, True])
def test_nan_in_free_pages_unused_slots_and_padding_changes_no_bit(world, monkeypatch, mixes):
    """Of tokens and of log-probabilities, while requests are preempted, saved, found in the cache and adapters exchanged.

    Both runs meet the same programs, as each adapter has been read when the next step is planned.
    """

    def run(poisoned: bool) -> tuple[dict[str, Answer], dict[str, list[Ran]]]:
        engine = with_pages(world.engine(replace(ONE_SHAPE if mixes else CONFIG, quantum_s=1e-9)), 24)
        if mixes:
            mixing(engine)
            engine.runs_ahead = False  # else a prefix is found again after its last owner ended, when it is poisoned
        engine.clock = iter(np.arange(0.0, 1e6)).__next__
        program = engine._run

        def run_poisoned(packed, edits):
            for batch in (one.fields for one in packed):
                padding = batch.position_GJ < 0
                idle = padding.all(axis=1)
                batch.token_GJ[padding] = 33
                batch.page_GC[idle] = 23
                for numbers in (batch.sampling.temperature_B, batch.sampling.top_p_B, batch.sampling.min_p_B):
                    numbers[idle] = np.nan
            unused = np.array([s for s in range(SLOTS) if s not in engine.slots.resident().values()], int)
            zeros = zero_rows(engine.base.config, engine.pool_spec)
            for slot in unused.tolist():
                engine._write(slot, jax.tree.map(lambda x: x + np.nan, zeros))
            poison(engine)
            return program(packed, edits)

        if poisoned:
            monkeypatch.setattr(engine, "_run", run_poisoned)
        ran = watch_programs(engine)
        beginning = ask("beginning", None, 12).prompt
        requests = [
            ask(f"r{i}", [None, *world.adapters][i % 6], [*beginning, 7, 9 + i], 4 + i % 9, logprobs=5)
            for i in range(14)
        ]
        answers = run_all(engine, requests, lambda _: read_all(engine))
        assert engine.scheduler.active.swaps > 3
        assert engine.scheduler.pages.hits > 0
        return answers, ran

    (plain, plain_ran), (poisoned, poisoned_ran) = run(False), run(True)
    assert poisoned_ran == plain_ran
    for id, answer in plain.items():
        assert answer.tokens == poisoned[id].tokens, id
        assert answer.logprobs == poisoned[id].logprobs, id
