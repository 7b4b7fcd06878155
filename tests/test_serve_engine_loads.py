"""Adapters on their way to the device: a load that fails or is slow costs only those who asked for it."""

from __future__ import annotations

import threading
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from serve_world import SLOTS, Answer, ask, random_weights, run_all, step, with_resident

from jaxlora.errors import AdapterInvalid, AdapterNotFinite, AdapterNotFound, BaseMismatch
from jaxlora.lora import ALL_TARGETS, AdapterRef
from serve.request import FinishReason

pytest_plugins = ["serve_fixtures"]


def test_failing_loads_cost_nobody_a_slot(world, engine):
    """Fifty adapters that cannot be loaded, under traffic: what is on the device stays there."""
    others = [ask(f"o{i}", world.adapters[i], 4, 40) for i in range(2)]
    with_resident(engine, *world.adapters[:SLOTS])
    before = engine.slots.resident()
    foreign = world.add("foreign", seed=1, base_hash="another").ref
    bad = [foreign, *(AdapterRef("acme", f"missing{i}", 1) for i in range(49))]
    answers = run_all(engine, [*others, *(ask(f"bad{i}", a) for i, a in enumerate(bad))])
    assert sum(isinstance(a.error, AdapterNotFound | BaseMismatch) for a in answers.values()) == 50
    assert engine.slots.resident() == before
    for r in others:
        assert answers[r.id].tokens == world.greedy(r), r.id


def test_a_slow_load_stops_nobody_who_runs(world, engine, monkeypatch):
    """One adapter takes as long to read as a running request takes to end."""
    gate, get = threading.Event(), engine.store.get
    slow = world.adapters[3]
    monkeypatch.setattr(engine.store, "get", lambda ref: gate.wait(20) and get(ref) if ref == slow.ref else get(ref))
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
    monkeypatch.setattr(engine.store, "get", lambda ref: gate.wait(20) and get(ref))
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
    monkeypatch.setattr(engine.store, "get", lambda ref: bad if ref == good.ref else get(ref))
    answers = run_all(engine, [ask("r", good), ask("o", world.adapters[0])])
    assert isinstance(answers["r"].error, AdapterNotFinite)
    assert answers["o"].error is None
