"""Prompt chunks and decode rows in one program, as accelerators run them: the same answers from one read of the weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from serve_world import CONFIG, ONE_SHAPE, SLOTS, Answer, World, ask, mixing, read_all, run_all, with_resident

from jaxlora.core.errors import AdapterInvalid
from jaxlora.model.compile_cache import CompileCounter
from jaxlora.model.lora_pool import host_rows
from serve.engine import engine as engine_module
from serve.engine.engine import Engine
from serve.engine.grammar import Grammars, GrammarSource
from serve.engine.request import Request
from serve.engine.sampling import Work
from serve.engine.step import NO_PLACE

pytest_plugins = ["serve_fixtures"]
CHUNKS, ROWS = (4, CONFIG.prefill_tokens), (4, 1)


@pytest.fixture(scope="module")
def warm(world) -> Engine:
    """One that is warmed up, with programs for base requests alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "BASE_ALONE", ("cpu",))
        engine = mixing(world.engine(ONE_SHAPE))
    engine.warm_up()
    return engine


def watch(engine: Engine, patch: pytest.MonkeyPatch) -> list[tuple[str, tuple[tuple[int, int], ...], bool]]:
    """What is started from now on: the program's name, the shapes of its batches, whether it has a pool."""
    ran = []
    step, choice = engine._programs.step, engine._programs.choice

    def watched_step(base, pool, kv, newest_B, packed, edits):
        ran.append(("step", tuple((b.lanes, b.tokens) for b in packed), bool(pool)))
        return step(base, pool, kv, newest_B, packed, edits)

    def watched_choice(logits_BV, newest_B, packed, edits, work):
        ran.append((work.name, tuple((b.lanes, b.tokens) for b in packed), len(logits_BV)))
        return choice(logits_BV, newest_B, packed, edits, work)

    patch.setattr(engine._programs, "step", watched_step)
    patch.setattr(engine._programs, "choice", watched_choice)
    return ran


def staggered(world: World, engine: Engine, requests: list[Request]) -> dict[str, Answer]:
    """The answers of requests that come one after the other, so that prompts are computed beside decode rows."""
    later = list(requests)

    def between(count: int) -> None:
        read_all(engine)
        if later and count % 2 == 0:
            engine.submit(later.pop(0))

    return run_all(engine, [later.pop(0), later.pop(0)], between)


def requests_of_all_kinds(world: World, engine: Engine) -> list[Request]:
    letters = Grammars(engine.tokenizer).compile_now(GrammarSource(kind="regex", text="[a-z ]{30}", param="x"))
    ways = [
        {},
        {"temperature": 0.9, "logprobs": 3},
        {"prompt_logprobs": 4},
        {"temperature": 0.8, "top_p": 0.8, "top_k": 20},
        {"grammar": letters, "temperature": 1.0},
        {"repetition_penalty": 1.4, "presence_penalty": 0.6},
        {"prompt_logprobs": 0, "temperature": 1.0},
    ]
    return [
        ask(f"m{i}", [None, *world.adapters][i % 4], 5 + 11 * i % 29, 12, seed=i, **ways[i % len(ways)])
        for i in range(14)
    ]


def test_a_step_of_chunks_and_rows_is_one_program_and_one_choice(world, warm, monkeypatch):
    ran = watch(warm, monkeypatch)
    requests = [ask("early", None, 4, 8), ask("late", world.adapters[0], 40, 4)]  # two steps of four lanes
    with_resident(warm, world.adapters[0])
    ran.clear()
    answers = run_all(warm, requests[:1], lambda count: count == 2 and warm.submit(requests[1]))
    first = [("step", (CHUNKS,), False), ("GREEDY", (CHUNKS,), 4)]
    alone = [("step", (ROWS,), False), ("GREEDY", (ROWS,), 4)]
    mixed = [("step", (CHUNKS, ROWS), True), ("GREEDY", (CHUNKS, ROWS), 8)]
    assert ran[:10] == first + 2 * alone + 2 * mixed
    assert {shapes for _, shapes, _ in ran[10:]} == {(ROWS,)}
    for request in requests:
        assert answers[request.id].tokens == world.greedy(request)


def test_mixed_steps_answer_as_two_programs_do_and_compile_nothing(world, warm, monkeypatch):
    requests = requests_of_all_kinds(world, warm)
    want = staggered(world, world.engine(ONE_SHAPE), requests)
    ran = watch(warm, monkeypatch)
    with CompileCounter() as counter:
        got = staggered(world, warm, requests)
    assert not counter.retraced
    mixed = [(name, shapes) for name, shapes, _ in ran if len(shapes) == 2]
    assert Counter(name == "step" for name, _ in mixed) == {True: len(mixed) // 2, False: len(mixed) // 2}
    assert len(mixed) > 20
    assert {name for name, _ in mixed} >= {"step", *(work.name for work in Work if work > Work.DRAWN)}
    for request in requests:
        a, b = got[request.id], want[request.id]
        assert (a.tokens, a.text, a.finish) == (b.tokens, b.text, b.finish), request.params
        for some, others in ((a.logprobs, b.logprobs), (a.prompt_logprobs, b.prompt_logprobs)):
            assert [t.token for t in some] == [t.token for t in others]
            np.testing.assert_allclose([t.logprob for t in some], [t.logprob for t in others], atol=1e-5)
    scored = [got[r.id] for r in requests if r.params.prompt_logprobs is not None]
    assert all(answer.prompt_logprobs for answer in scored)


def test_a_mixed_step_without_adapters_runs_the_program_without_lora(world, warm, monkeypatch):
    with_resident(warm, world.adapters[0])
    ran = watch(warm, monkeypatch)
    for first, second, lora in ((None, None, False), (world.adapters[0], None, True), (None, world.adapters[0], True)):
        ran.clear()
        late = ask(f"late {lora} {first}", second, 6, 4)
        run_all(
            warm,
            [ask(f"early {lora} {second}", first, 4, 8)],
            lambda count, late=late: count == 2 and warm.submit(late),
        )
        assert [pool for name, shapes, pool in ran if len(shapes) == 2 and name == "step"] == [lora]


@pytest.mark.parametrize("bad_first", [False, True])
def test_a_nan_adapter_in_one_part_leaves_the_other_alone(world, warm, bad_first):
    """Whether its row decodes beside a neighbour's prompt, or its prompt is computed beside a neighbour's row."""
    good = world.adapters[0]
    with_resident(warm, good, world.adapters[1])
    nan = jax.tree.map(lambda x: np.full(x.shape, np.nan, x.dtype), host_rows(world.base.config, world.spec, good))
    bad, neighbour = ask(f"bad{bad_first}", world.adapters[1], 6, 20), ask(f"good{bad_first}", good, 13, 6)
    first, second = (bad, neighbour) if bad_first else (neighbour, bad)

    def between(count: int) -> None:
        if count == 2:
            warm._write(warm.slots.find(world.adapters[1].ref), nan)
            warm.submit(second)

    answers = run_all(warm, [first], between)
    assert isinstance(answers[bad.id].error, AdapterInvalid)
    assert answers[neighbour.id].tokens == world.greedy(neighbour)
    warm._write(warm.slots.find(world.adapters[1].ref), host_rows(world.base.config, world.spec, world.adapters[1]))


def test_parked_cancelled_and_following_requests_get_the_same_tokens(world):
    """Fewer rows than requests and fewer slots than adapters: chunks that were computed before are computed beside rows."""
    old = world.add("following", seed=80)
    requests = [
        replace(ask(f"p{i}", [None, *world.adapters, old][i % 7], 3 + 9 * i % 25, 8 + 5 * i % 20), follow=i % 7 == 6)
        for i in range(18)
    ]
    engine = mixing(world.engine(replace(ONE_SHAPE, host_bytes=6_000, quantum_s=8.0)))
    engine.clock = iter(np.arange(0.0, 1e6)).__next__
    later, mixed, start = requests[6:], [], engine._start

    def watched(chunks, sequences):
        mixed.append(bool(chunks and sequences))
        return start(chunks, sequences)

    engine._start = watched

    def between(count: int) -> None:
        read_all(engine)
        if later and count % 2 == 0:
            engine.submit(later.pop(0))
        if count == 9:
            engine.cancel("p1")

    answers = run_all(engine, requests[:6], between)
    for request in requests:
        if request.id != "p1":
            assert answers[request.id].tokens == world.greedy(request), request.id
    assert sum(mixed) > 10
    assert engine.scheduler.preemptions > 3
    assert engine.scheduler.active.swaps > SLOTS


def test_a_version_that_is_published_between_steps_is_not_mixed_with_the_old_one(world):
    old = world.add("published", seed=81)
    engine = with_resident(mixing(world.engine(ONE_SHAPE)), old, world.adapters[0])
    engine.submit(replace(ask("follows", old, 4, 12), follow=True))
    said: dict[str, list] = {"follows": [], "prompt": []}
    while engine.has_work:
        if len(said["follows"]) == 4 and not said["prompt"] and "prompt" not in engine._sequences:
            new = world.add("published", seed=82)
            engine.install(new.ref, world.device_rows(new))
            engine.submit(prompt := ask("prompt", old, 6, 5))
        for delta in engine.step():
            said[delta.request_id] += [(token, delta.adapter) for token in delta.tokens]
    assert [ref for _, ref in said["follows"]] == [old.ref] * 5 + [new.ref] * 7  # the fifth was launched before
    assert [token for token, _ in said["prompt"]] == world.greedy(prompt)
    assert {ref for _, ref in said["prompt"]} == {old.ref}


def test_the_warm_up_runs_each_rung_of_chunks_beside_the_full_number_of_rows(world):
    engine, ran = mixing(world.engine()), []
    engine._run = lambda packed, edits: ran.append(tuple((b.lanes, b.tokens) for b in packed)) or jnp.zeros(())
    said = []
    engine.warm_up(lambda number, of: said.append((number, of)))
    single = [(shape,) for shape in engine.shapes()]
    assert list(dict.fromkeys(ran)) == single + [(shape, (CONFIG.rows, 1)) for shape in engine.shapes()[:2]]
    assert said == [(i + 1, 6 * len(Work) + 1) for i in range(6 * len(Work) + 1)]


def test_a_cpu_runs_chunks_and_rows_apart(world):
    engine = world.engine(ONE_SHAPE)
    assert not engine.mixes
    parts, start = [], engine._start

    def watched(chunks, sequences):
        parts.append((bool(chunks), bool(sequences)))
        return start(chunks, sequences)

    engine._start = watched
    staggered(world, engine, [ask(f"c{i}", None, 6, 6) for i in range(4)])
    assert set(parts) == {(True, False), (False, True)}


def test_a_lane_that_chooses_nothing_keeps_no_token(world, warm):
    """A chunk within a prompt has no place, so a row's newest token is never another sequence's."""
    kept, run = [], warm._run

    def watched(packed, edits):
        kept.extend(np.concatenate([b.fields.place_G for b in packed]).tolist() for _ in (0,) if len(packed) == 2)
        return run(packed, edits)

    warm._run = watched
    try:
        late = ask("long", None, 5 * CHUNKS[1], 3)
        run_all(warm, [ask("short", None, 3, 12)], lambda count: count == 2 and warm.submit(late))
    finally:
        del warm._run
    assert kept
    for places in kept:
        taken = [place for place in places if place != NO_PLACE]
        assert len(taken) == len(set(taken))
