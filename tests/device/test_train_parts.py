"""A step in parts is the step: the same adapters, whoever joins or leaves between two parts."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from train_world import (
    BASE_HASH,
    LANE_TOKENS,
    SPEC,
    assert_same_bits,
    examples,
    host,
    lora,
    optimizer,
    pairs,
    rollouts,
    small_base,
)

from jaxlora.config.training import Loss
from jaxlora.core.errors import ConfigInvalid, DataInvalid, StateInvalid
from jaxlora.core.lora import ALL_TARGETS
from jaxlora.model.compile_cache import CompileCounter
from jaxlora.model.lora_pool import PoolSpec
from jaxlora.model.mesh import make_mesh
from train.step.microsteps import MicrostepSizes
from train.trainer import FIRST_PART, StepReport, Trainer

LANES = 4
SIZES = MicrostepSizes(lanes=1, layers=1, targets=16)
BUCKETS = [PoolSpec(slots=3, rank=4, dtype="float32", targets=ALL_TARGETS), SPEC]
KINDS = {"forward", "head", "head back", "backward", "update"}


def trainer_of(parts: MicrostepSizes | None, remat="products") -> Trainer:
    return Trainer(
        small_base(),
        make_mesh(),
        BUCKETS,
        lanes=LANES,
        lane_tokens=LANE_TOKENS,
        base_hash=BASE_HASH,
        parts=parts,
        remat=remat,
    )


def ant(trainer: Trainer, **changes) -> None:
    trainer.add("ant", lora(3), optimizer(**changes), examples(1, 6, 20), batch_size=3, seed=1)


def bee(trainer: Trainer, **changes) -> None:
    """Its batch needs more lanes than a step has, and its targets are few."""
    trainer.add(
        "bee",
        lora(8, ("q_proj", "lm_head")),
        optimizer(clip=0.1, **changes),
        examples(2, 40, 20),
        batch_size=20,
        seed=2,
    )


def cat(trainer: Trainer, **changes) -> None:
    loss = Loss(name="dpo")
    trainer.add("cat", lora(2), optimizer(**changes), pairs(3, 4), batch_size=2, seed=3, loss=loss)


def dog(trainer: Trainer, **changes) -> None:
    trainer.add(
        "dog",
        lora(5, ("down_proj",)),
        optimizer(**changes),
        rollouts(4, 4),
        batch_size=2,
        seed=4,
        loss=Loss(name="gspo"),
    )


def go_to(trainer: Trainer, part: str) -> None:
    """Runs a step up to this part."""
    for _ in range(100):
        if trainer.part == part:
            return
        trainer.advance()
    pytest.fail(f"no part {part}")


@pytest.fixture(scope="module")
def whole():
    """What whole steps make of all four."""
    trainer = trainer_of(None)
    return trainer, run_together(trainer)


def run_together(trainer: Trainer) -> list[StepReport]:
    """The reports of some steps of all four; with such an eps an update follows its gradient, and no sign is a leap."""
    for join in (ant, bee, cat, dog):
        join(trainer, eps=1.0, lr=1.0)
    return [report for _ in range(12) for report in trainer.step()]


@pytest.mark.parametrize(
    ("sizes", "remat"),
    [
        (SIZES, "products"),
        pytest.param(MicrostepSizes(lanes=2, layers=2, targets=8), "everything", marks=pytest.mark.slow),
        pytest.param(MicrostepSizes(lanes=4, layers=1, targets=32), "nothing", marks=pytest.mark.slow),
    ],
    ids=["small", "middle", "large"],
)
def test_parts_give_the_adapters_of_the_whole_step(whole, sizes, remat):
    """The sums are those of the whole step in float32, over other numbers of rows: XLA may order them otherwise."""
    reference, wanted = whole
    trainer = trainer_of(sizes, remat)
    got = run_together(trainer)
    numbers = [[(r.loss, r.accuracy, r.grad_norm) for r in reports] for reports in (got, wanted)]
    np.testing.assert_allclose(*numbers, rtol=2e-5, atol=1e-6)
    assert [(r.tenant, r.step, r.tokens) for r in got] == [(r.tenant, r.step, r.tokens) for r in wanted]
    for name in trainer.tenants:
        start = trainer.fresh(trainer.tenants[name].spec, trainer.tenants[name].stream.seed)
        mine, its = host(trainer.unseat(name)), host(reference.unseat(name))
        assert int(mine.moments.count) == int(its.moments.count) > 0
        for first, a, b in zip(*map(jax.tree.leaves, (start.rows, mine.rows, its.rows)), strict=True):
            assert np.abs(a - b).max() <= 1e-4 * np.abs(b - first).max()


def test_a_part_is_named_before_it_runs_and_reports_come_with_their_update():
    trainer = trainer_of(SIZES)
    ant(trainer)
    dog(trainer)
    seen = []
    while True:
        part = trainer.part
        reports = trainer.advance()
        assert bool(reports) == (part == "update")
        seen.append((part, [r.tenant for r in reports]))
        if trainer.part == FIRST_PART:
            break
    names = [part for part, _ in seen]
    assert (names[0], set(names[1:])) == (FIRST_PART, KINDS)
    assert [who for part, who in seen if part == "update"] == [["ant"], ["dog"]]
    assert names.count("forward") == names.count("backward") == 2 * 2  # passes of one lane, groups of one layer


def test_a_neighbour_changes_no_bit():
    alone, both = trainer_of(SIZES), trainer_of(SIZES)
    ant(alone)
    dog(both)
    ant(both)
    for trainer in (alone, both):
        while trainer.tenants["ant"].step < 3:
            trainer.step()
    assert_same_bits(host(both.unseat("ant")), host(alone.unseat("ant")))


@pytest.mark.parametrize("part", ["head", "backward", "update"])
def test_who_leaves_between_two_parts_disturbs_nobody(part):
    """Its slot goes to somebody new at once, who starts with nothing of what was under way."""
    quiet, stormy = trainer_of(SIZES), trainer_of(SIZES)
    for trainer in (quiet, stormy):
        dog(trainer)
        ant(trainer)
    go_to(stormy, part)
    stormy.remove("ant")
    slot = stormy.add("new", lora(3), optimizer(), examples(9, 6, 20), batch_size=3, seed=9).slot
    fresh = host(stormy.unseat("new"))
    stormy.step()
    quiet.step()
    assert_same_bits(host(stormy.unseat("dog")), host(quiet.unseat("dog")))
    assert_same_bits(host(stormy.unseat("new")), fresh)
    alone = trainer_of(SIZES)
    assert alone.add("new", lora(3), optimizer(), examples(9, 6, 20), batch_size=3, seed=9).slot == slot
    for trainer in (alone, stormy):
        while trainer.tenants["new"].step < 2:
            trainer.step()
    assert_same_bits(host(stormy.unseat("new")), host(alone.unseat("new")))


@pytest.mark.parametrize("part", ["forward", "head back", "update"])
def test_who_fails_between_two_parts_keeps_what_it_had(part):
    trainer = trainer_of(SIZES)
    dog(trainer)
    ant(trainer)
    trainer.step()
    before = host(trainer.unseat("ant"))
    go_to(trainer, part)
    trainer.fail("ant", "told to")
    reports = []
    while trainer.part != FIRST_PART:
        reports += trainer.advance()
    assert [r.tenant for r in reports] == ["dog"]
    assert_same_bits(host(trainer.unseat("ant")), before)


def test_a_state_is_of_the_last_update_whenever_it_is_taken():
    trainer = trainer_of(SIZES)
    ant(trainer)
    dog(trainer)
    trainer.step()
    states = [host(trainer.unseat("ant"))]
    while trainer.tenants["ant"].step == 1:
        assert_same_bits(host(trainer.unseat("ant")), states[0])
        trainer.advance()
    after = host(trainer.unseat("ant"))
    assert int(after.moments.count) == trainer.tenants["ant"].step == 2
    while trainer.part != FIRST_PART:
        trainer.advance()
    assert_same_bits(host(trainer.unseat("ant")), after)


def test_when_the_last_tenant_leaves_the_step_is_dropped():
    trainer = trainer_of(SIZES)
    ant(trainer)
    go_to(trainer, "backward")
    trainer.remove("ant")
    assert not trainer.has_work
    bee(trainer)
    assert [r.tenant for r in trainer.advance()] == []
    dog(trainer)
    trainer.step()
    assert trainer.part == FIRST_PART
    trainer.remove("bee")
    trainer.remove("dog")
    with pytest.raises(StateInvalid):
        trainer.advance()
    assert trainer.part == FIRST_PART


def test_nothing_compiles_after_the_warm_up():
    trainer = trainer_of(SIZES)
    begun = []
    trainer.warm_up(lambda *told: begun.append(told))
    assert len(begun) == 4 + 1 + len(trainer.seats.buckets) + 1  # microsteps, update, slots, evaluation
    assert begun == [(i + 1, len(begun)) for i in range(len(begun))]
    ant(trainer)  # uploads what is new in NumPy, once
    trainer.step()
    with CompileCounter() as counter:
        for join in (bee, cat, dog):
            join(trainer)
        for _ in range(4):
            trainer.step()
        go_to(trainer, "head")
        trainer.remove("ant")
        trainer.step()
        trainer.evaluate(examples(5, 3), "bee")
        jax.block_until_ready(trainer.rows("dog"))
    assert (counter.compiles, counter.traces) == (0, 0)


def test_the_base_is_not_copied_for_a_gradient_that_waits():
    """What waits between forward and backward is of the tokens; the weights in it are the base's own arrays."""
    trainer = trainer_of(SIZES)
    ant(trainer)
    trainer.step()
    live = sum(x.nbytes for x in jax.live_arrays())
    go_to(trainer, "backward")
    tokens, layers = LANE_TOKENS, trainer.base.config.layers
    c = trainer.base.config
    kept = 2 * (c.heads * c.head_dim) + 2 * (c.kv_heads * c.head_dim) + 3 * c.d_model + 2 * c.d_ff + c.heads
    rows = sum(x.nbytes for x in jax.tree.leaves(trainer.unseat("ant").rows)) * SPEC.rank // 4
    added = sum(x.nbytes for x in jax.live_arrays()) - live
    assert added < 1.5 * 4 * tokens * layers * kept + 3 * rows


@pytest.mark.parametrize(
    "sizes",
    [
        MicrostepSizes(lanes=3, layers=1, targets=16),
        MicrostepSizes(lanes=1, layers=3, targets=16),
        MicrostepSizes(lanes=1, layers=0, targets=16),
        MicrostepSizes(lanes=1, layers=1, targets=0),
        MicrostepSizes(lanes=1, layers=1, targets=48),
    ],
)
def test_sizes_that_do_not_divide_are_refused(sizes):
    with pytest.raises(ConfigInvalid, match="a microstep needs"):
        trainer_of(sizes)


def test_lanes_without_a_target_and_a_whole_step_that_loses_a_tenant():
    trainer = trainer_of(None)
    dog(trainer)
    ant(trainer)
    go_to(trainer, "step")
    before = host(trainer.unseat("dog"))
    trainer.fail("dog", "told to")
    assert [r.tenant for r in trainer.advance()] == ["ant"]
    assert_same_bits(host(trainer.unseat("dog")), before)
    assert np.isfinite(trainer.tenants["ant"].losses).all()


# ---- lanes of several lengths


LENGTHS = (LANE_TOKENS // 2, LANE_TOKENS)


def lengths_of(lane_tokens: int | tuple[int, ...], lanes: int = 1) -> Trainer:
    """A trainer with slots for four, and passes of so many lanes."""
    sizes = MicrostepSizes(lanes=lanes, layers=1, targets=16)
    return Trainer(
        small_base(), make_mesh(), BUCKETS, lanes=LANES, lane_tokens=lane_tokens, base_hash=BASE_HASH, parts=sizes
    )


def short(trainer: Trainer) -> None:
    trainer.add("short", lora(3), optimizer(), examples(1, 6, LENGTHS[0] // 2), batch_size=3, seed=1)


def long(trainer: Trainer) -> None:
    trainer.add("long", lora(4), optimizer(), examples(2, 4, LANE_TOKENS + 1, LANE_TOKENS - 4), batch_size=2, seed=2)


def short_pairs(trainer: Trainer) -> None:
    trainer.add("pairs", lora(2), optimizer(), pairs(3, 4), batch_size=2, seed=3, loss=Loss(name="dpo"))


@pytest.mark.parametrize("lanes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_tenant_has_the_shortest_lanes_that_hold_its_examples_whoever_trains_beside_it(lanes):
    """What it becomes is what a trainer with lanes of that length alone makes of it, to the bit."""
    together = lengths_of(LENGTHS, lanes)
    together.warm_up()
    with CompileCounter() as compiles:
        for join in (short, long, short_pairs):
            join(together)
        held = {"short": examples(7, 5, LENGTHS[0] // 2), "long": examples(8, 3, LANE_TOKENS + 1, LANE_TOKENS - 4)}
        for _ in range(4):
            together.step()
        got = together.evaluate_all([(units, name) for name, units in held.items()])
    assert compiles.compiles == 0
    for join, name, length in ((short, "short", LENGTHS[0]), (long, "long", LENGTHS[1])):
        alone = lengths_of(length, lanes)
        join(alone)
        while alone.tenants[name].step < together.tenants[name].step:
            alone.step()
        assert alone.tenants[name].losses == together.tenants[name].losses
        assert_same_bits(host(alone.unseat(name)), host(together.unseat(name)))
        assert alone.evaluate(held[name], name) == got[[*held].index(name)]
    names, step = set(), together.tenants["long"].step
    while together.tenants["long"].step == step:
        together.advance()
        names.add(together.part)
    assert {name for name in names if name.endswith(f" {LANE_TOKENS}")} == {
        f"{name} {LANE_TOKENS}" for name in KINDS - {"update"}
    }


def test_an_example_longer_than_the_longest_lanes_is_refused_and_a_whole_step_has_one_length():
    trainer = lengths_of(LENGTHS)
    with pytest.raises(DataInvalid, match=f"a lane of {LANE_TOKENS} positions"):
        trainer.add("x", lora(3), optimizer(), examples(1, 1, LANE_TOKENS + 2, LANE_TOKENS + 2), batch_size=1, seed=1)
    shape = {"lanes": LANES, "base_hash": BASE_HASH}
    with pytest.raises(ConfigInvalid, match="lanes of one length"):
        Trainer(small_base(), make_mesh(), BUCKETS, lane_tokens=LENGTHS, **shape)
