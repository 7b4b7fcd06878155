"""Adapters on their way to the device: a load that fails or is slow costs only those who asked for it."""

from __future__ import annotations

import threading
from collections import defaultdict
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_checks import assert_same_bits
from serve_world import SLOTS, Answer, ask, random_weights, run_all, step, with_resident

from jaxlora.core.errors import AdapterInvalid, AdapterNotFinite, AdapterNotFound, BaseMismatch
from jaxlora.core.lora import ALL_TARGETS, AdapterRef
from jaxlora.model.compile_cache import CompileCounter
from jaxlora.model.decoder import load_base
from jaxlora.model.lora_pool import host_rows
from jaxlora.model.serving_pool import read_slot
from jaxlora.model.slot_classes import row_ranks
from serve.engine import engine as engine_module
from serve.engine.adapter_loads import FAILED_S, READERS, AdapterLoads
from serve.engine.request import FinishReason

pytest_plugins = ["serve_fixtures"]


@pytest.mark.fault("R8")
def test_failing_loads_cost_nobody_a_slot(world, engine):
    """Thirty adapters that cannot be loaded, under traffic: what is on the device stays there."""
    others = [ask(f"o{i}", world.adapters[i], 4, 40) for i in range(2)]
    with_resident(engine, *world.adapters[:SLOTS])
    before = engine.slots.resident()
    foreign = world.add("foreign", seed=1, base_hash="another").ref
    bad = [foreign, *(AdapterRef("acme", f"missing{i}", 1) for i in range(29))]
    answers = run_all(engine, [*others, *(ask(f"bad{i}", a) for i, a in enumerate(bad))])
    assert sum(isinstance(a.error, AdapterNotFound | BaseMismatch) for a in answers.values()) == 30
    assert engine.slots.resident() == before
    for r in others:
        assert answers[r.id].tokens == world.greedy(r), r.id


@pytest.mark.fault("R8")
def test_a_slow_load_stops_nobody_who_runs(world, engine, monkeypatch):
    """One adapter takes as long to read as a running request takes to end."""
    gate, get = threading.Event(), engine.store.get
    slow = world.adapters[3]
    monkeypatch.setattr(
        engine.store, "get", lambda ref, *how: gate.wait(20) and get(ref, *how) if ref == slow.ref else get(ref, *how)
    )
    running, cold = ask("runs", world.adapters[0], 4, 30), ask("cold", slow, 4, 5)
    answers: dict[str, Answer] = defaultdict(Answer)
    engine.submit(running)
    while not answers["runs"].tokens:
        step(engine, answers)
    engine.submit(cold)
    while answers["runs"].finish is None:
        step(engine, answers)
        assert answers["cold"].tokens == []
    gate.set()
    assert run_all(engine)["cold"].tokens == world.greedy(cold)
    assert answers["runs"].tokens == world.greedy(running)


def test_a_cancelled_load_leaves_nothing(world, engine, monkeypatch):
    gate, get = threading.Event(), engine.store.get
    monkeypatch.setattr(engine.store, "get", lambda ref, *how: gate.wait(20) and get(ref, *how))
    engine.submit(ask("gone", world.adapters[0]))
    assert engine.step() == []
    engine.cancel("gone")
    gate.set()
    assert run_all(engine, [ask("next", None)])["next"].finish is FinishReason.LENGTH
    assert not engine._loads
    assert engine.slots.resident() == {}


def failing(world, kind: str) -> tuple[AdapterRef, type[Exception]]:
    """A version that cannot be loaded, and the error its askers get."""
    match kind:
        case "missing":
            return AdapterRef("acme", "nobody", 1), AdapterNotFound
        case "deleted":
            ref = world.add("gone", seed=1).ref
            world.store.delete("acme", "gone")
            return ref, AdapterNotFound
        case "other_base":
            return world.add("foreign", seed=1, base_hash="another").ref, BaseMismatch
        case "rank":
            return world.add("wide", seed=1, rank=9).ref, AdapterInvalid
        case "shapes":
            config = replace(world.base.config, d_ff=40)
            return world.add("misfit", seed=1, weights=random_weights(config, 3, ALL_TARGETS, 1)).ref, AdapterInvalid
    raise ValueError(kind)


@pytest.mark.parametrize("kind", ["missing", "deleted", "other_base", "rank", "shapes"])
def test_a_failing_load_ends_only_its_askers(world, engine, kind):
    ref, wanted = failing(world, kind)
    others = [ask(f"o{i}", [None, world.adapters[0]][i % 2], 5 + i, 12) for i in range(4)]
    askers = [ask(f"bad{i}", ref, 5) for i in range(6)]  # more than there are rows: some fail while in line
    answers = run_all(engine, [*others, *askers])
    for r in askers:
        assert isinstance(answers[r.id].error, wanted), answers[r.id]
        assert answers[r.id].tokens == []
    for r in others:
        assert answers[r.id].tokens == world.greedy(r), r.id
    assert engine.slots.find(ref) is None
    again = ask("again", world.adapters[1], 4)
    assert run_all(engine, [again])["again"].tokens == world.greedy(again)


def test_an_adapter_that_is_not_finite_on_disk_is_refused_at_load(world, engine, monkeypatch):
    good = world.add("notfinite", seed=1)
    bad = replace(good, weights={"q_proj": tuple(np.full_like(x, np.nan) for x in good.weights["q_proj"])})
    get = engine.store.get
    monkeypatch.setattr(engine.store, "get", lambda ref, *how: bad if ref == good.ref else get(ref, *how))
    answers = run_all(engine, [ask("r", good), ask("o", world.adapters[0])])
    assert isinstance(answers["r"].error, AdapterNotFinite)
    assert answers["o"].error is None


@pytest.mark.fault("R8")
def test_a_failure_is_kept_for_a_moment_so_that_many_askers_cost_one_read(world, engine, monkeypatch):
    foreign = world.add("elsewhere", seed=1, base_hash="another").ref
    reads, get, now = [], engine.store.get, [100.0]
    monkeypatch.setattr(engine.store, "get", lambda ref, *how: reads.append(ref) or get(ref, *how))
    monkeypatch.setattr(engine, "clock", lambda: now[0])
    for i in range(100):  # one after the other: each finds the failure of the first
        answers = run_all(engine, [ask(f"r{i}", foreign)])
        assert isinstance(answers[f"r{i}"].error, BaseMismatch)
    assert reads == [foreign]
    now[0] += FAILED_S
    assert isinstance(run_all(engine, [ask("later", foreign)])["later"].error, BaseMismatch)
    assert reads == [foreign, foreign]


def test_a_version_that_was_not_there_is_found_when_it_is_put(world, engine):
    ref = world.store.mint("acme", "soon")
    assert isinstance(run_all(engine, [ask("early", ref)])["early"].error, AdapterNotFound)
    weights = world.adapters[0].weights
    late = replace(world.adapters[0], ref=ref, weights={t: (a.copy(), b.copy()) for t, (a, b) in weights.items()})
    world.store.put(late)
    late_ask = ask("late", late)
    assert run_all(engine, [late_ask])["late"].tokens == world.greedy(late_ask)


def test_reads_that_nobody_wants_any_more_are_not_done(world, engine, monkeypatch):
    gate, reads, get = threading.Event(), [], engine.store.get
    monkeypatch.setattr(engine.store, "get", lambda ref, *how: reads.append(ref) or (gate.wait(20) and get(ref, *how)))
    for i in range(20):
        engine.submit(ask(f"r{i}", AdapterRef("acme", f"missing{i}", 1)))
        engine.step()
        engine.cancel(f"r{i}")
    engine.step()
    gate.set()
    assert not engine._loads
    assert len(reads) <= READERS


def test_what_is_read_ahead_counts_in_the_host_budget(world, engine):
    aside = world.store.host_memory().aside
    other = world.engine()
    assert other.ahead >= min(READERS, SLOTS)
    rows = host_rows(world.base.config, world.spec, world.adapters[0])
    assert world.store.host_memory().aside - aside == other.ahead * sum(x.nbytes for x in jax.tree.leaves(rows))


def test_what_is_read_ahead_has_the_served_dtype_and_little_more_than_its_rank(world, monkeypatch):
    """As on GPUs and TPUs, where nothing compiles either, whatever rank comes; a CPU pads to the rank of the class."""
    base = load_base(world.source, world.mesh, dtype="bfloat16")
    half = replace(world, base=base, spec=replace(world.spec, dtype="bfloat16", rank=16))
    small, middle, large = (world.add(f"ahead{rank}", seed=90 + rank, rank=rank) for rank in (4, 7, 16))
    coarse = half.engine()
    assert coarse.row_ranks == (16,)
    monkeypatch.setattr(engine_module, "row_ranks", lambda classes, finely: row_ranks(classes, finely=True))
    engine = half.engine()
    assert engine.row_ranks == (4, 8, 16)
    numbers = small.nbytes // 4 // 4  # of one rank

    def held(engine, adapter):
        return sum(x.a_LSRX.nbytes + x.b_LSRY.nbytes for x in engine._read(adapter.ref).values())

    assert [held(engine, a) for a in (small, middle, large)] == [2 * numbers * rank for rank in (4, 8, 16)]
    assert held(coarse, small) == 2 * numbers * 16
    monkeypatch.setattr(engine, "shapes", list)  # no step is run
    engine.warm_up()
    with CompileCounter() as counter:
        for slot, adapter in enumerate((small, middle, large)):
            engine._write(slot, engine._read(adapter.ref))
    assert not counter.retraced
    exact = [host_rows(base.config, half.spec, a) for a in (small, middle, large)]
    for slot, rows in enumerate(exact):
        got = read_slot(engine._pool, jnp.int32(slot), 16)
        for target, wanted in rows.items():
            assert_same_bits(np.asarray(got[target].a_LSRX), wanted.a_LSRX.astype(jnp.bfloat16))
            assert_same_bits(np.asarray(got[target].b_LSRY), wanted.b_LSRY.astype(jnp.bfloat16))


@pytest.mark.parametrize("preempted", [False, True])
def test_an_adapter_that_is_deleted_answers_who_asked_before(world, engine, preempted):
    """A running, or preempted and swapped out, request ends on its version; who comes later is told that it is gone."""
    adapter = world.add("doomed", seed=70)
    request = ask("before", adapter, 5, 20)
    expected, aside = world.greedy(request), world.store.host_memory().aside
    answers: dict[str, Answer] = defaultdict(Answer)
    engine.submit(request)
    while len(answers["before"].tokens) < 3:
        step(engine, answers)
    if preempted:
        engine.scheduler._preempt(engine._sequences["before"], engine.clock())
        del engine.scheduler.active.entered[adapter.ref]
        engine.slots.unpin(engine.slots.find(adapter.ref))
        engine.slots.drop(adapter.ref)
    world.store.flush()
    with world.store._state:
        world.store._ram.forget(adapter.ref)
    world.store.delete("acme", "doomed")
    assert world.store.host_memory().aside == aside + adapter.nbytes
    while engine.has_work:
        step(engine, answers)
    assert answers["before"].tokens == expected
    assert world.store.host_memory().aside == aside
    with_resident(engine, *world.adapters[:SLOTS])
    assert isinstance(run_all(engine, [ask("late", adapter)])["late"].error, AdapterNotFound)


def test_loads_that_hang_in_object_storage_hold_up_none_from_the_disk():
    """As many as there are threads, and more; those from the disk are read all the same, in the order of their coming."""
    held, near = threading.Event(), [AdapterRef("acme", f"near{i}", 1) for i in range(3)]
    far = [AdapterRef("acme", f"far{i}", 1) for i in range(2 * READERS)]
    loads = AdapterLoads(lambda ref: ref in near or held.wait(30), lambda ref: ref in near, lambda: 0.0)
    try:
        loads.want([*far, *near])
        while len(loads.ready()) < len(near):
            loads.wait()
        assert loads.ready() == near
    finally:
        held.set()
