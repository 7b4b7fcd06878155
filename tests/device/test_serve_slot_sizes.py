"""Slots and KV pages change while a server runs: no answer changes, nothing compiles, no more memory is taken."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace

import jax
import numpy as np
import pytest
from base_shapes import LARGE, sized
from serve_world import BASE, CONFIG, RANK, Answer, World, ask, check_engine, check_idle, read_all, run_all, step

from jaxlora.config.base import ModelSection
from jaxlora.config.serving import ServeConfig, SlotSize, Tuning
from jaxlora.core.errors import InvalidRequest
from jaxlora.model.compile_cache import CompileCounter
from jaxlora.model.decoder import load_base
from jaxlora.model.memory_needs import BaseShape
from jaxlora.model.memory_plan import slot_sizes
from pallas_kernels.dispatch import SHAPE_INDEPENDENT
from pallas_kernels.native.library import instruction_set
from serve.engine import engine as engine_module
from serve.engine.engine import Engine, EngineConfig
from serve.engine.request import FinishReason, Request
from serve.engine.slots import REST_S
from serve.runtime.device_thread import DeviceThread

pytest_plugins = ["serve_fixtures"]
SERVING = ("product", "gathered_lora", "segmented_lora", "paged_attention")  # what a step computes with
# Whether an answer's bits depend on the programs that computed it: prompts may be computed again.
BITS = instruction_set() is not None or all(SHAPE_INDEPENDENT[op]["cpu"]["xla"] for op in SERVING)
SLOTS, PAGES = (2, 4, 8), 400  # pages beside 4 slots


def planned(world: World, slots: tuple[int, ...] = SLOTS, pages: int = PAGES) -> tuple[SlotSize, ...]:
    """The sizes that a plan gives this base, started with the second."""
    shape = BaseShape(config=world.base.config, dtype="float32", kv_dtype="float32", name="tiny")
    config = ServeConfig(
        model=ModelSection(path="tiny"), slots=slots[1], max_rank=RANK, rows=CONFIG.rows, kv_pages=pages, page_tokens=4
    )
    return slot_sizes(replace(sized(config), slot_sizes=slots), shape, LARGE)


@pytest.fixture(scope="module")
def sizes(world) -> tuple[SlotSize, ...]:
    return planned(world)


def engine_of(world: World, sizes: tuple[SlotSize, ...], config: EngineConfig = CONFIG, *, at: int = 1) -> Engine:
    """An engine that starts with this one of the sizes."""
    world = replace(world, spec=replace(world.spec, slots=sizes[at].slots))
    return world.engine(replace(config, sizes=sizes, pages=sizes[at].pages))


# --- answers


def mixed(world: World) -> list[Request]:
    """Greedy and sampled, base and adapters, alike beginnings, scored prompts, more of them than rows."""
    asked = []
    for i in range(14):
        adapter = [*world.adapters, None][i % 6]
        params = {"logprobs": 3, "temperature": [0.0, 0.9][i % 2], "seed": i}
        if i == 5:
            params["prompt_logprobs"] = 2
        prompt = [*range(60, 72), *range(100 + 7 * i, 100 + 7 * i + 2 + 3 * i)]
        asked.append(ask(f"m{i}", adapter, prompt[:40], 6 + i, **params))
    return asked


def bits(answer: Answer) -> tuple:
    return answer.tokens, answer.text, answer.finish, answer.logprobs, answer.prompt_logprobs


def known(answer: Answer) -> tuple:
    """What may not depend on the programs."""
    return bits(answer) if BITS else bits(answer)[:3]


@pytest.fixture(scope="module")
def unchanged(world, sizes) -> dict[str, Answer]:
    """The answers of a server that always has as many slots."""
    return run_all(engine_of(world, sizes[1:2], at=0), mixed(world))


@pytest.mark.parametrize("at", [0, 2])
def test_answers_do_not_depend_on_the_size(world, sizes, unchanged, at):
    engine = engine_of(world, sizes)
    engine.resize(sizes[at])
    answers = run_all(engine, mixed(world))
    assert {id: known(a) for id, a in answers.items()} == {id: known(a) for id, a in unchanged.items()}


@pytest.mark.parametrize("host_bytes", [10**8, 40_000, 0], ids=["KV goes to the host", "some of it", "none of it"])
@pytest.mark.parametrize("every", [2, 5])
def test_changes_in_the_middle_change_no_answer(world, sizes, unchanged, host_bytes, every):
    engine = engine_of(world, sizes, replace(CONFIG, host_bytes=host_bytes, quantum_s=1e-9 if every == 2 else 1000.0))
    rng = np.random.default_rng(every)

    def between(count: int) -> None:
        if count % every == 0 and count < 60:  # then everybody may end
            engine.resize(sizes[rng.integers(3)])
            check_engine(engine)

    answers = run_all(engine, mixed(world), between)
    assert engine.resizes > 5
    assert (engine.scheduler.recomputed_tokens > 0) == (host_bytes < 10**8)
    assert {id: known(a) for id, a in answers.items()} == {id: known(a) for id, a in unchanged.items()}


def test_a_resident_adapter_keeps_its_bits_and_is_not_read_again(world, sizes):
    engine = engine_of(world, sizes)
    run_all(engine, [ask(f"r{i}", a, 3, 2) for i, a in enumerate(world.adapters[:4])])

    def rows() -> dict:
        return {ref: jax.device_get(engine._copy(s)) for ref, s in engine.slots.resident().items()}

    before, loads = rows(), engine.telemetry.loads
    assert len(before) == 4
    for at, count in ((2, 4), (0, 2), (1, 2)):
        engine.resize(sizes[at])
        now = rows()
        assert len(now) == count
        for ref, kept in now.items():
            for x, y in zip(jax.tree.leaves(kept), jax.tree.leaves(before[ref]), strict=True):
                np.testing.assert_array_equal(x, y)
    # Which two were used last depends on whose rows were read first.
    asked = [ask(f"again{i}", a, 3, 8) for i, a in enumerate(engine.slots.resident())]
    answers = run_all(engine, asked)
    assert [answers[r.id].tokens for r in asked] == [world.greedy(r) for r in asked]
    assert engine.telemetry.loads == loads


def test_a_version_that_is_gone_from_the_store_answers_to_its_end(world, sizes):
    """It lies in its slot: a change asks no disk for it."""
    engine = engine_of(world, sizes)
    adapter = world.add("leaving", seed=70)
    request = ask("r", adapter, 5, 12)
    expected, answers = world.greedy(request), defaultdict(Answer)
    engine.submit(request)
    while len(answers["r"].tokens) < 3:
        step(engine, answers)
    engine._read = lambda ref: pytest.fail(f"{ref} is read again")
    for size in (sizes[2], sizes[0]):
        engine.resize(size)
        step(engine, answers)
    while engine.has_work:
        step(engine, answers)
    assert answers["r"].tokens == expected


def test_a_follower_keeps_the_kv_of_older_versions(world, sizes):
    """It goes to the host first, as nobody can compute it again."""

    def followed(change: Callable[[Engine], None]) -> list[int]:
        first = world.add("followed", seed=71)
        second = world.add("followed", seed=72)
        engine = engine_of(world, sizes, replace(CONFIG, host_bytes=13_000))
        answers = defaultdict(Answer)
        for i in range(4):
            engine.submit(ask(f"o{i}", None, 30, 20))
        engine.submit(replace(ask("f", first.ref, 9, 12), follow=False))
        sequence = engine._sequences["f"]
        sequence.request = replace(sequence.request, follow=True)
        while len(answers["f"].tokens) < 4:
            step(engine, answers)
        engine.announce(second.ref)
        while len(answers["f"].tokens) < 7:
            step(engine, answers)
        change(engine)
        while engine.has_work:
            step(engine, answers)
        check_idle(engine)
        world.store.delete("acme", "followed")
        return answers["f"].tokens

    assert followed(lambda engine: engine.resize(sizes[0])) == followed(lambda engine: None)


# --- programs


@pytest.fixture(scope="module")
def warmed(world) -> tuple[DeviceThread, list]:
    """A runner, stepped by hand, and rows that a trainer would publish.

    In bfloat16, so that a slot's own rows are not of the dtype of those that are read or published.
    """
    adapters = [world.add(f"grown{i}", seed=80 + i) for i in range(3)]
    rows = [world.device_rows(a) for a in adapters]
    jax.block_until_ready(rows)
    shapes = replace(CONFIG, rows=3, prefill_lanes=2, prefill_tokens=7, host_bytes=10**8, quantum_s=1e-9)
    base = load_base(world.source, world.mesh, dtype="bfloat16")
    half = replace(world, base=base, spec=replace(world.spec, dtype="bfloat16"))
    engine = engine_of(half, planned(world, (2, 3, 5), 300), shapes)  # which no other test has compiled
    begun = []
    engine.warm_up(lambda *told: begun.append(told))
    programs = 3 * (len(engine.shapes()) + 1)
    assert begun == [(i + 1, programs) for i in range(programs)]
    assert engine.size == engine.sizes[1]
    engine.rehearse_install(rows[0])
    assert engine.size == engine.sizes[1]
    assert engine.resizes == 0
    runner = DeviceThread(engine, base_name=BASE)
    return runner, [(a.ref, r) for a, r in zip(adapters, rows, strict=True)]


@pytest.fixture
def warm(warmed) -> Iterator[tuple[DeviceThread, list]]:
    """The same; nothing compiles while it is used."""
    with CompileCounter() as counter:
        yield warmed
    assert not counter.retraced, counter


def test_a_storm_of_changes_compiles_nothing_and_transfers_nothing_by_accident(world, warm):
    runner, published = warm
    engine, rng = runner.engine, np.random.default_rng(3)
    refs = [None, *(a.ref for a in world.adapters), *(ref for ref, _ in published)]

    def between(count: int) -> None:
        if count < 120 and count % 3 == 0:
            adapter = refs[int(rng.integers(len(refs)))]
            params = {"temperature": float(rng.choice([0.0, 1.0])), "logprobs": [None, 5][count % 2]}
            engine.submit(ask(f"s{count}", adapter, int(rng.integers(1, 40)), int(rng.integers(1, 20)), **params))
        if count < 120 and count % 7 == 0:
            engine.resize(engine.sizes[rng.integers(3)])
        if count in (20, 50, 80):
            engine.install(*published[count // 30])

    with jax.transfer_guard("disallow"):
        answers = run_all(engine, [ask("first", None, 3, 4)], between)
    assert len(answers) > 30
    assert all(a.finish is FinishReason.LENGTH for a in answers.values())
    assert engine.resizes > 12
    assert engine.scheduler.active.swaps > 5


def test_an_operator_may_set_the_number_of_slots_and_what_there_is_not_is_refused(world, warm):
    runner, _ = warm
    engine, answers = runner.engine, defaultdict(Answer)
    for i, adapter in enumerate(world.adapters):
        engine.submit(ask(f"t{i}", adapter, 5, 20))
    for slots in (5, 2, 3):
        runner.tune(Tuning(quantum_ms=1e9, slots=slots))
        assert (engine.slots.count, engine.scheduler.active.limit) == (slots, slots)
        runner.watch.rest()
        told = runner.watch.snapshot
        assert (len(told.slots), told.pages, told.resizes) == (slots, engine.size.pages, engine.resizes)
        for _ in range(4):
            step(engine, answers)
        assert len(engine.scheduler.active.entered) == slots
    runner.tune(Tuning(quantum_ms=1e9, slots=5, active_slots=4))
    assert (engine.slots.count, engine.scheduler.active.limit) == (5, 4)
    runner.tune(Tuning(quantum_ms=1e9, slots=2, active_slots=4))
    assert (engine.slots.count, engine.scheduler.active.limit) == (2, 2)
    for wrong, message in (
        ({"slots": 4}, r"slots must be one of slot_sizes = [2, 3, 5], got 4"),
        ({"active_slots": 6}, "active_slots must be in [1, 5], got 6"),
        ({"pin": ("bot0", "bot1")}, "pin takes at most 1 adapters of 2 active slots, got 2"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            runner.tune(replace(Tuning(quantum_ms=1e9), **wrong))
        assert caught.value.message == message
        assert engine.slots.count == 2
    runner.tune(Tuning(quantum_ms=1e-6, pin=("bot3",)))
    while engine.has_work:
        step(engine, answers)
    assert len(answers) == 5
    assert all(a.finish is FinishReason.LENGTH for a in answers.values())
    runner.tune(Tuning(quantum_ms=1e-6))


# --- memory


def test_no_more_is_held_at_any_time_than_the_plan_gave(world, sizes, monkeypatch):
    engine = engine_of(world, sizes)
    run_all(engine, [ask(f"r{i}", a, 9, 4) for i, a in enumerate(world.adapters)])  # slots are full of adapters
    run_all(engine, [ask("one", world.adapters[0], 20, 2)])  # what a batch of few rows keeps on the device is there too
    slot, page = engine.slot_bytes[RANK], engine_module.page_bytes(engine._kv)
    plan = sizes[1].slots * slot + sizes[1].pages * page
    held: list[int] = []

    def live() -> int:
        return sum(x.nbytes for x in jax.live_arrays())

    def own() -> int:
        return sum(x.nbytes for x in jax.tree.leaves((engine._pool, engine._kv)))

    def watched[**P, R](call: Callable[P, R]) -> Callable[P, R]:
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            result = call(*args, **kwargs)
            held.append(live() - others)
            return result

        return run

    assert own() == plan
    others = live() - own()
    for module, name in ((engine_module, "empty_serving_pool"), (engine_module, "empty_pages"), (engine, "_read_slot")):
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    monkeypatch.setattr(engine, "_write_slot", watched(engine._write_slot))
    for size in (sizes[2], sizes[0], sizes[1], sizes[0], sizes[2], sizes[1]):
        engine.submit(ask(f"busy{size.slots}", world.adapters[0], 20, 2))
        engine.step()
        engine.resize(size)
        rest = own() - size.slots * slot - size.pages * page
        assert own() <= plan
        assert 0 <= rest < 2 * slot  # of the last tile of eight rows; a slot has six
        assert plan - own() < page
    assert len(held) > 12
    slack = 1024  # indices of slots
    assert max(held) <= plan + slack
    assert min(held) < plan / 2  # the KV is freed before slots move
    run_all(engine)


# --- under load


def test_under_load_slots_follow_the_adapters_and_then_the_pages(world, caplog):
    """4 → 8 → 16 slots while many adapters ask, and back to 4 when a few ask for much."""
    sizes = (SlotSize(slots=4, pages=200), SlotSize(slots=8, pages=90), SlotSize(slots=16, pages=85))
    engine = engine_of(world, sizes, replace(CONFIG, quantum_s=1.0, host_bytes=10**8), at=0)
    crowd = [world.add(f"crowd{i}", seed=200 + i, rank=1) for i in range(28)]
    answers: dict[str, Answer] = defaultdict(Answer)
    asked: list[Request] = []
    seen: list[int] = [4]
    now = 1000.0
    engine.clock = lambda: now

    def load(seconds: float, adapters: list, *, at_once: int, prompt: int, tokens: int) -> None:
        nonlocal now
        end = now + seconds
        while now < end:
            while len(engine._sequences) < at_once:
                adapter = adapters[len(asked) % len(adapters)]
                asked.append(
                    ask(f"l{len(asked)}", adapter, prompt, tokens, seed=len(asked), temperature=len(asked) % 2)
                )
                engine.submit(asked[-1])
            read_all(engine)
            step(engine, answers)
            now += 0.25
            if engine.slots.count != seen[-1]:
                seen.append(engine.slots.count)

    caplog.set_level("INFO", "serve")
    load(2.5 * REST_S, crowd, at_once=28, prompt=3, tokens=5)
    assert seen == [4, 8, 16]
    load(3 * REST_S, [None, crowd[0], crowd[1]], at_once=16, prompt=44, tokens=16)
    assert seen == [4, 8, 16, 8, 4]
    while engine.has_work:
        step(engine, answers)
    check_idle(engine)
    assert caplog.text.count("slots ") == 4
    assert all(answers[r.id].finish is FinishReason.LENGTH for r in asked)
    patient = replace(CONFIG, max_waiting=10_000, max_waiting_tokens=10**6)
    always = run_all(engine_of(world, sizes[:1], patient, at=0), asked[::6])
    assert {id: bits(a)[:3] for id, a in always.items()} == {id: bits(answers[id])[:3] for id in always}
