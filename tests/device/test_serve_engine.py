"""The engine against the plain model: whoever comes, goes, loads, fails or is cancelled, everyone else's tokens stay."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import jax
import numpy as np
import pytest
from serve_world import CONFIG, RANK, SLOTS, Answer, ask, run_all, step, watch_programs, with_pages, with_resident

from jaxlora.core.errors import AdapterInvalid
from jaxlora.core.lora import ATTENTION_TARGETS, AdapterRef
from jaxlora.model.compile_cache import CompileCounter
from jaxlora.model.lora_pool import PoolSpec, host_rows
from pallas_kernels.dispatch import traced_for
from serve.engine import engine as engine_module
from serve.engine.request import FinishReason

pytest_plugins = ["serve_fixtures"]


def nan_everywhere(tree):
    return jax.tree.map(lambda x: np.full(x.shape, np.nan, x.dtype), tree)


def poison(world, engine, name: str) -> AdapterRef:
    """An adapter whose rows on the device are NaN: it came past every gate."""
    adapter = world.add(name, seed=99)
    slot = engine.slots.choose()
    engine._write(slot, nan_everywhere(host_rows(world.base.config, world.spec, adapter)))
    engine.slots.place(slot, adapter.ref)
    return adapter.ref


# --- the right tokens


def test_greedy_is_the_plain_model_for_base_and_every_kind_of_adapter(world, engine):
    requests = [ask(f"{a}/{n}", [None, *world.adapters][a], n, 12) for a in range(6) for n in (1, 7, 8, 9)]
    answers = run_all(engine, requests)
    for r in requests:
        assert answers[r.id].tokens == world.greedy(r), r.id
        assert answers[r.id].finish is FinishReason.LENGTH
        assert answers[r.id].deltas == 12  # one token each
    starts = {tuple(world.greedy(ask("same", a, 6, 6))) for a in [None, *world.adapters]}
    assert len(starts) == 6  # the adapters do say different things, or this file proves little


def test_prompts_over_several_chunks_lanes_and_steps(world, engine):
    lane, lanes = CONFIG.prefill_tokens, CONFIG.prefill_lanes
    requests = [ask(f"long{i}", world.adapters[i % 3], 49 + i, 5) for i in range(4)]  # 28 lanes' worth of prompt
    requests += [ask("base", None, lane), ask("short", world.adapters[1], 2)]
    assert sum(-(-len(r.prompt) // lane) for r in requests) > 3 * lanes
    answers = run_all(engine, requests)
    for r in requests:
        assert answers[r.id].tokens == world.greedy(r), r.id
    assert engine.prefilled_tokens == sum(len(r.prompt) for r in requests)
    assert engine.decoded_tokens == sum(r.params.max_tokens for r in requests)


@pytest.mark.fault("T6")
def test_more_requests_than_rows_slots_and_pages(world):
    engine = with_pages(world.engine(), 20)
    requests = [ask(f"{i}", [None, *world.adapters][i % 6], 1 + i * 7 % 23, 3 + i % 9) for i in range(40)]
    assert sum(-(-(len(r.prompt) + r.params.max_tokens) // 4) for r in requests) > 5 * 20
    answers = run_all(engine, requests)
    for r in requests:
        assert answers[r.id].tokens == world.greedy(r), r.id


def test_joining_and_leaving_between_any_two_steps(world, engine):
    arrivals = {n: ask(f"at{n}", [None, *world.adapters][n % 4], 1 + n * 5 % 20, 2 + n % 11) for n in range(25)}
    answers: dict[str, Answer] = defaultdict(Answer)
    gone = []
    for n in range(60):
        if n in arrivals:
            engine.submit(arrivals[n])
        if n % 7 == 6 and engine._sequences:
            gone.append(list(engine._sequences)[n % len(engine._sequences)])
            engine.cancel(gone[-1])
        step(engine, answers)
    rest = run_all(engine)
    assert len(gone) >= 4
    for r in arrivals.values():
        tokens = answers[r.id].tokens + rest[r.id].tokens
        if r.id in gone:
            assert tokens == world.greedy(r)[: len(tokens)], r.id
        else:
            assert tokens == world.greedy(r), r.id


@pytest.mark.fault("T12")
def test_adapters_leave_and_come_back(world, engine):
    """5 adapters through 3 slots, twice round, under one long generation of the base and one of adapter 0."""
    keep = [ask("base", None, 5, 59), ask("tuned", world.adapters[0], 5, 59)]
    visitors = [ask(f"visit{i}", world.adapters[i % 5], 3, 2) for i in range(1, 13)]
    loads = []
    load = engine._load
    engine._load = lambda ref, slot: loads.append((ref, slot)) or load(ref, slot)
    waiting = list(visitors)

    def one_at_a_time(_count):
        if waiting and len(engine._sequences) <= 2:
            engine.submit(waiting.pop(0))

    answers = run_all(engine, keep, one_at_a_time)
    for r in keep + visitors:
        assert answers[r.id].tokens == world.greedy(r), r.id
    assert not waiting
    assert loads[0] == (world.adapters[0].ref, 0)
    assert all(slot != 0 for _, slot in loads[1:])  # pinned all along
    assert sum(ref == world.adapters[3].ref for ref, _ in loads) >= 2  # left and came back


def test_a_small_adapter_inherits_nothing_from_its_slot(world, engine):
    shape = host_rows(world.base.config, world.spec, world.adapters[0])
    for slot in range(SLOTS):
        engine._write(slot, jax.tree.map(lambda x: np.full(x.shape, 3.0, np.float32), shape))
    request = ask("quiet", world.adapters[3], 6, 8)  # rank 2, q_proj alone, in a slot full of noise
    assert run_all(engine, [request])[request.id].tokens == world.greedy(request)


def test_rows_of_a_smaller_trainer_inherit_nothing_either(world, engine):
    adapter = world.adapters[3]
    spec = PoolSpec(slots=1, rank=2, dtype="float32", targets=("q_proj",))
    shape = host_rows(world.base.config, world.spec, world.adapters[0])
    for slot in range(SLOTS):
        engine._write(slot, jax.tree.map(lambda x: np.full(x.shape, 3.0, np.float32), shape))
    request = ask("small", adapter, 6, 8)
    engine.install(adapter.ref, jax.device_put(host_rows(world.base.config, spec, adapter)))
    assert run_all(engine, [request])["small"].tokens == world.greedy(request)


# --- nobody feels a neighbour


def fingerprint(answer: Answer) -> tuple:
    return answer.tokens, answer.text, answer.logprobs, answer.finish


def test_a_request_feels_neither_its_neighbours_nor_its_row(world):
    """Bit for bit, within one compiled shape: three to eight requests run in the same programs."""
    mine = ask("mine", world.adapters[2], 9, 10, logprobs=5, temperature=0.8, seed=11)
    seen = []
    for case in range(4):
        engine = with_resident(world.engine(), *world.adapters[:3])
        others = [
            ask(f"o{case}{i}", [None, *world.adapters[:2]][(i + case) % 3], 6 + i, 14, temperature=1.0)
            for i in range(3 + case)
        ]
        place = case % len(others)
        ran = watch_programs(engine)
        answers = run_all(engine, [*others[:place], mine, *others[place:]])
        seen.append((ran["mine"], fingerprint(answers["mine"])))
    assert all(s == seen[0] for s in seen)


@pytest.mark.fault("A3")
@pytest.mark.parametrize("when", ["prefill", "decode"])
def test_a_nan_adapter_ends_only_its_own_requests(world, when):
    def mix(bad):
        others = [ask(f"o{i}", [None, world.adapters[0]][i % 2], 5 + 3 * i, 12, logprobs=3) for i in range(4)]
        asked = [ask("bad1", bad, 9, 12, logprobs=3), ask("bad2", bad, 3, 12, logprobs=3)]
        return [*others[:2], asked[0], *others[2:], asked[1]]

    engine = with_resident(world.engine(), *world.adapters[:2])
    clean_ran = watch_programs(engine)
    clean = run_all(engine, mix(world.adapters[1]))
    engine = with_resident(world.engine(), *world.adapters[:2])
    ran = watch_programs(engine)
    if when == "prefill":
        answers = run_all(engine, mix(poison(world, engine, "nan")))
    else:

        def turn_bad(count):
            if count == 3:
                slot = engine.slots.find(world.adapters[1].ref)
                engine._write(slot, nan_everywhere(host_rows(world.base.config, world.spec, world.adapters[1])))

        answers = run_all(engine, mix(world.adapters[1]), turn_bad)
    for id, answer in answers.items():
        if id.startswith("bad"):
            assert isinstance(answer.error, AdapterInvalid)
            assert "non-finite" in str(answer.error)
            assert answer.tokens == ([] if when == "prefill" else clean[id].tokens[: len(answer.tokens)])
        else:
            assert answer.error is None
            assert ran[id] == clean_ran[id]
            assert fingerprint(answer) == fingerprint(clean[id]), id


def test_pages_that_a_nan_adapter_used_are_as_good_as_new(world, engine):
    everyone = [ask(f"bad{i}", poison(world, engine, "nan2") if i == 0 else None, 60, 4) for i in range(1)]
    assert run_all(engine, everyone)["bad0"].error is not None
    assert np.isnan(np.asarray(engine._kv.k_LPZF)).any()
    request = ask("after", world.adapters[0], 17, 10)
    assert run_all(engine, [request])["after"].tokens == world.greedy(request)


def test_free_pages_full_of_nan_change_nothing(world):
    requests = [ask(f"p{i}", [None, *world.adapters[:2]][i % 3], 3 + 4 * i, 9, logprobs=4) for i in range(6)]
    engine = with_resident(world.engine(), *world.adapters[:2])
    clean_ran = watch_programs(engine)
    clean = run_all(engine, requests)
    engine = with_resident(world.engine(), *world.adapters[:2])
    ran = watch_programs(engine)
    engine._kv = jax.device_put(nan_everywhere(engine._kv), jax.tree.map(lambda x: x.sharding, engine._kv))
    answers = run_all(engine, requests)
    assert ran == clean_ran
    for r in requests:
        assert fingerprint(answers[r.id]) == fingerprint(clean[r.id]), r.id


def test_empty_slots_full_of_nan_change_nothing(world):
    requests = [ask(f"s{i}", [None, world.adapters[0]][i % 2], 3 + 4 * i, 9, logprobs=4) for i in range(6)]
    engine = with_resident(world.engine(), world.adapters[0])
    clean_ran = watch_programs(engine)
    clean = run_all(engine, requests)
    engine = world.engine()
    for slot in range(SLOTS):  # the last one too, where an index of -1 would read
        engine._write(slot, nan_everywhere(host_rows(world.base.config, world.spec, world.adapters[0])))
    with_resident(engine, world.adapters[0])
    ran = watch_programs(engine)
    answers = run_all(engine, requests)
    assert ran == clean_ran
    for r in requests:
        assert fingerprint(answers[r.id]) == fingerprint(clean[r.id]), r.id


# --- versions


@pytest.mark.fault("T3")
def test_a_running_request_keeps_its_version_and_the_next_gets_the_new_one(world, engine):
    old = world.add("published", seed=21)
    first = ask("first", old, 5, 30)
    new = []

    def publish(count):
        if count == 4:
            new.append(world.add("published", seed=22))
            assert engine.install(new[0].ref, world.device_rows(new[0])) is not None
            engine.submit(ask("second", new[0], 5, 10))

    answers = run_all(engine, [first], publish)
    second = ask("second", new[0], 5, 10)
    assert answers["first"].tokens == world.greedy(first)
    assert answers["second"].tokens == world.greedy(second)
    assert answers["second"].tokens != world.greedy(replace(second, adapter=old.ref))


def test_an_installed_version_is_not_read_from_the_store(world, engine, monkeypatch):
    adapter = world.add("installed", seed=23)
    request = ask("r", adapter, 5, 10)
    expected = world.greedy(request)
    engine.install(adapter.ref, world.device_rows(adapter))
    monkeypatch.setattr(engine.store, "get", None)
    assert run_all(engine, [request])["r"].tokens == expected


def test_publishing_while_every_slot_is_in_use_takes_nobodys_slot(world, engine):
    requests = [ask(f"r{i}", world.adapters[i], 5, 20) for i in range(SLOTS)]
    late = world.add("late", seed=24)
    with_resident(engine, *world.adapters[:SLOTS])
    installed = []

    def publish(count):
        if count == 2:
            installed.append(engine.install(late.ref, world.device_rows(late)))
            engine.submit(ask("late", late, 5, 6))

    answers = run_all(engine, requests, publish)
    assert installed == [None]
    for r in [*requests, ask("late", late, 5, 6)]:
        assert answers[r.id].tokens == world.greedy(r), r.id


def test_many_publishes_under_one_request(world, engine):
    request = ask("long", world.add("churn", seed=30), 4, 40)

    def publish(count):
        if count % 3 == 0 and count < 36:
            adapter = world.add("churn", seed=31 + count)
            engine.install(adapter.ref, world.device_rows(adapter))

    assert run_all(engine, [request], publish)["long"].tokens == world.greedy(request)


# --- the compiled programs


def storm(world, engine) -> dict[str, Answer]:
    """Everything that may happen between two steps, in one run."""
    rng = np.random.default_rng(3)
    missing = AdapterRef("acme", "nobody", 1)

    def between(count):
        if count < 40:
            adapter = [None, *world.adapters, missing][count % 7]
            params = {
                "temperature": float(rng.choice([0.0, 0.7, 2.0])),
                "top_k": int(rng.integers(0, 30)),
                "top_p": float(rng.uniform(0.1, 1)),
                "min_p": float(rng.choice([0.0, 0.1])),
                "logprobs": [None, 0, 20][count % 3],
                "stop": [(), ("a",), ("xyz", "q")][count % 3],
                "stop_token_ids": [(), (17, 40)][count % 2],
                "seed": [None, 4][count % 2],
                "choice": count % 4,
                "ignore_eos": count % 2 == 0,
            }
            engine.submit(ask(f"s{count}", adapter, int(rng.integers(1, 40)), int(rng.integers(1, 20)), **params))
        if count % 5 == 4 and engine._sequences:
            engine.cancel(next(iter(engine._sequences)))
        if count in (10, 20):
            engine.install(published[count // 20].ref, rows[count // 20])

    published = [world.add("storm", seed=50), world.add("storm", seed=51)]
    rows = [world.device_rows(a) for a in published]
    jax.block_until_ready(rows)
    with CompileCounter() as counter:
        answers = run_all(engine, [ask("first", None, 3, 4)], between)
    assert len(answers) > 30
    assert not counter.retraced, counter
    return answers


@pytest.mark.parametrize(("quantum_s", "pages"), [pytest.param(1000.0, 64, marks=pytest.mark.slow), (1e-9, 24)])
def test_nothing_compiles_after_warm_up(world, quantum_s, pages):
    """With a short quantum and few pages adapters are exchanged and KV is saved and restored all the time."""
    # Shapes of its own, so that no other test of this process has compiled them.
    lanes = 2 if pages == 64 else 3
    engine = world.engine(
        replace(CONFIG, rows=3, prefill_lanes=lanes, prefill_tokens=6, quantum_s=quantum_s, pages=pages)
    )
    begun = []
    engine.warm_up(lambda *told: begun.append(told))
    assert begun == [(i + 1, len(engine.shapes()) + 1) for i in range(len(engine.shapes()) + 1)]
    storm(world, engine)
    assert (engine.scheduler.active.swaps > 10) == (pages == 24)


def test_a_first_publication_compiles_nothing_though_every_slot_was_in_use(world):
    engine = with_resident(world.engine(), *world.adapters[:SLOTS])
    spec = PoolSpec(slots=1, rank=5, dtype="float32", targets=ATTENTION_TARGETS)  # a shape no other test writes
    adapter = world.adapters[1]
    rows = jax.device_put(host_rows(world.base.config, spec, adapter))
    before = jax.device_get(engine._pool)
    engine.rehearse_install(rows)
    assert all(
        (x == y).all() for x, y in zip(*map(jax.tree.leaves, (before, jax.device_get(engine._pool))), strict=True)
    )
    with CompileCounter() as counter:
        assert engine.install(AdapterRef("acme", "rehearsed", 1), rows) is not None
    assert not counter.retraced


def test_slots_of_several_ranks_give_the_same_tokens_and_compile_nothing(world):
    """Whatever mix comes finds its programs, guests in larger slots and device rows in smaller ones too."""
    spec = replace(world.spec, slots=4, classes=((1, RANK), (3, 1)))
    engine = replace(world, spec=spec).engine()
    engine.warm_up()
    adapters = [world.add(f"class{i}", seed=80 + i, rank=1 + 2 * (i % 3 == 0)) for i in range(7)]
    device_rows = world.device_rows(adapters[1])
    engine.rehearse_install(device_rows)
    requests = [ask(f"q{i}", a, 4 + i, 6) for i, a in enumerate([*adapters, *adapters])]
    with CompileCounter() as counter:
        assert engine.slots.rank(engine.install(adapters[1].ref, device_rows)) == 1
        answers = run_all(engine, requests)
    assert not counter.retraced
    assert [answers[r.id].tokens for r in requests] == [world.greedy(r) for r in requests]


def test_a_step_of_base_requests_alone_runs_a_program_without_lora(world, monkeypatch):
    """As on GPUs and TPUs: the same tokens, nothing compiles later, and for a TPU the program has no kernel of LoRA."""
    monkeypatch.setattr(engine_module, "BASE_ALONE", ("cpu",))
    engine = world.engine()
    engine.warm_up()
    pools, launch = [], engine._programs.launch

    def watched(base, pool, *rest):
        pools.append(bool(pool))
        return launch(base, pool, *rest)

    monkeypatch.setattr(engine._programs, "launch", watched)
    alone, mixed = [ask("alone", None, 4, 5)], [ask("base", None, 5, 4), ask("tuned", world.adapters[0], 5, 4)]
    with CompileCounter() as counter:
        answers = run_all(engine, alone)
        assert not any(pools)
        answers |= run_all(engine, mixed)
        assert any(pools)
    assert not counter.retraced
    for request in [*alone, *mixed]:
        assert answers[request.id].tokens == world.greedy(request)
    packed, edits = (engine._idle.make(2, 1),), engine._edits.make(2, tokens=False, allowed=False)
    for pool, has_lora in ((engine._pool, True), ({}, False)):
        state = (engine.base, pool, engine._kv, engine._newest)
        with traced_for("tpu"):
            traced = engine._programs.step.trace(*state, packed, edits)
        assert ("gathered_lora" in traced.lower(lowering_platforms=("tpu",)).as_text()) is has_lora


@pytest.mark.parametrize("count", [1, SLOTS])
def test_a_warm_up_leaves_what_is_in_the_slots(world, count):
    """A device thread warms its engine, which may have been another's."""
    engine = with_resident(world.engine(), *world.adapters[:count])
    requests = [ask(f"again{i}", adapter, 4, 6) for i, adapter in enumerate(world.adapters[:count])]
    engine.warm_up()
    answers = run_all(engine, requests)
    assert [answers[r.id].tokens for r in requests] == [world.greedy(r) for r in requests]


def test_a_write_keeps_the_place_of_the_pool(world, engine):
    """Else, on a mesh, the first step after a load would compile anew."""
    placed = jax.tree.map(lambda x: x.sharding, engine._pool)
    engine._write(0, host_rows(world.base.config, world.spec, world.adapters[0]))
    assert jax.tree.map(lambda x: x.sharding, engine._pool) == placed


def test_every_shape_is_warmed_up_and_no_other_runs(world, engine, monkeypatch):
    assert engine.shapes() == [(2, 8), (8, 8), (2, 1), (8, 1)]
    seen = set()
    step = engine._programs.step

    def watched(base, pool, kv, newest_B, packed, edits):
        seen.update((batch.lanes, batch.tokens) for batch in packed)
        return step(base, pool, kv, newest_B, packed, edits)

    monkeypatch.setattr(engine._programs, "step", watched)
    run_all(engine, [ask("one", None, 3), ask("two", None, 4)])
    assert seen == {(2, 8), (2, 1)}  # a few rows do not pay for many
    run_all(engine, [ask(f"r{i}", None, 9) for i in range(8)])
    assert seen == set(engine.shapes())


def test_warm_up_writes_nothing(world):
    engine = world.engine()
    engine.warm_up()
    assert all(not np.asarray(x).any() for x in jax.tree.leaves((engine._kv, engine._pool)))


def test_steps_transfer_nothing_by_accident(world, engine):
    engine.warm_up()
    adapter = world.add("guard", seed=60)
    rows = world.device_rows(adapter)
    requests = [ask(f"g{i}", [None, *world.adapters][i % 6], 20, 8, logprobs=2, temperature=i % 2) for i in range(10)]
    with jax.transfer_guard("disallow"):
        answers = run_all(engine, requests)
        engine.install(adapter.ref, rows)
        answers |= run_all(engine, [ask("new", adapter)])
    assert all(a.finish is FinishReason.LENGTH for a in answers.values())
    assert len(answers) == 11
