"""The trainer: who may join, what a step reports, when a tenant is done, and that a resumed run is the same run."""

import math

import jax
import numpy as np
import pytest
from train_world import (
    BASE_HASH,
    CONFIG,
    LANE_TOKENS,
    LANES,
    SPEC,
    assert_same_bits,
    examples,
    host,
    lora,
    make_trainer,
    optimizer,
    plain_loss,
    small_base,
)

from jaxlora.core.errors import (
    AdapterInvalid,
    AlreadyExists,
    DataInvalid,
    InvalidRequest,
    NotFound,
    StateInvalid,
)
from jaxlora.core.lora import ALL_TARGETS, LAYER_TARGETS, LoraSpec, ModuleException
from jaxlora.core.model_config import target_features
from jaxlora.model.lora_pool import PoolSpec, host_rows
from jaxlora.model.mesh import make_mesh
from jaxlora.storage.checkpoints import restore_state, save_state
from train.step.state import fresh_adapter
from train.trainer import Trainer


def join(trainer, name="a", seed=0, spec=None, data=None, batch_size=2, resume=None, **settings):
    data = examples(seed, 5) if data is None else data
    spec = lora(3) if spec is None else spec
    return trainer.add(name, spec, optimizer(**settings), data, batch_size=batch_size, seed=seed, resume=resume)


def outcome(trainer, name="a"):
    return host(trainer.unseat(name))


@jax.jit
def plain(weights, scale, tokens, token_weights):
    return jax.value_and_grad(plain_loss)(weights, scale, tokens, token_weights)


def by_hand(adapter, data):
    """(mean loss, gradient of it) of the plain model under a host adapter; None is the base."""
    weights = {} if adapter is None else dict(adapter.weights)
    layers = {t: 1 if t == "lm_head" else CONFIG.layers for t in weights}
    scale = {t: np.float32([adapter.spec.scale(t, i) for i in range(n)]) for t, n in layers.items()}
    got = [plain(weights, scale, e.tokens, e.weights) for e in data]
    total = sum(float(e.weights.sum()) for e in data)
    gradient = jax.tree.map(lambda *g: np.sum(g, axis=0) / total, *[g for _, g in got])
    return sum(float(loss) for loss, _ in got) / total, gradient


# joining and leaving


def test_joining_takes_the_lowest_free_slot():
    trainer = make_trainer()
    assert [join(trainer, name).slot for name in "abc"] == [0, 1, 2]
    trainer.remove("b")
    assert join(trainer, "d").slot == 1
    assert list(trainer.tenants) == ["a", "c", "d"]


REFUSALS = {
    "known name": (AlreadyExists, "already training", {"name": "a"}),
    "no examples": (DataInvalid, "no examples to train on", {"data": []}),
    "rank too large": (AdapterInvalid, "rank 9 exceeds", {"spec": lora(9)}),
    "example too long": (DataInvalid, "a lane of 32 positions", {"data": examples(0, 1, 34, 34)}),
    "no batch": (InvalidRequest, "batch_size must be", {"batch_size": 0}),
    "batch too large": (InvalidRequest, "batch_size must be", {"batch_size": 4097}),
    "negative seed": (DataInvalid, "must not be negative", {"seed": -1, "data": examples(0, 1), "resume": "state"}),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refused_tenant_leaves_no_trace(case):
    """Same tenants, same state, and the next one takes the slot it would have had."""
    error, message, changes = REFUSALS[case]
    trainer = make_trainer()
    join(trainer, "a")
    trainer.step()
    before = host(trainer.states)
    if changes.get("resume") == "state":
        changes = changes | {"resume": (outcome(trainer), 1, 0)}
    with pytest.raises(error, match=message):
        join(trainer, **{"name": "b"} | changes)
    assert list(trainer.tenants) == ["a"]
    assert_same_bits(host(trainer.states), before)
    assert [r.tenant for r in trainer.step()] == ["a"]
    assert join(trainer, "b").slot == 1


def test_a_full_trainer_refuses_and_a_leaving_tenant_makes_room():
    trainer = make_trainer()
    for i in range(SPEC.slots):
        assert trainer.free_slots(lora(2)) == SPEC.slots - i
        join(trainer, f"t{i}", total_steps=1)
    assert trainer.free_slots(lora(2)) == 0
    with pytest.raises(StateInvalid, match="all 9 training slots are taken"):
        join(trainer, "late")
    trainer.step()
    assert {t.status for t in trainer.tenants.values()} == {"done"}
    with pytest.raises(StateInvalid, match="all 9 training slots are taken"):  # done, but its weights are still there
        join(trainer, "late")
    trainer.remove("t4")
    assert join(trainer, "late").slot == 4


def test_a_target_the_pool_lacks_is_refused():
    spec = PoolSpec(slots=1, rank=2, dtype="float32", targets=LAYER_TARGETS)
    trainer = Trainer(small_base(), make_mesh(), [spec], lanes=2, lane_tokens=8, base_hash=BASE_HASH)
    with pytest.raises(AdapterInvalid, match="LoRA on lm_head is not supported"):
        join(trainer, spec=lora(2))
    with pytest.raises(InvalidRequest):
        Trainer(small_base(), make_mesh(), [spec], lanes=0, lane_tokens=8, base_hash=BASE_HASH)


def test_unknown_tenants_are_not_found():
    trainer = make_trainer()
    for call in (trainer.remove, trainer.unseat, trainer.rows, trainer.adapter):
        with pytest.raises(NotFound, match="no tenant ghost"):
            call("ghost")
    with pytest.raises(NotFound, match="no tenant ghost"):
        trainer.evaluate(examples(0, 1), "ghost")
    with pytest.raises(StateInvalid):
        trainer.step()


@pytest.mark.fault("N2")
@pytest.mark.parametrize("after", ["a bigger tenant", "nobody"])
def test_a_name_and_a_slot_are_as_new_after_someone_left(after):
    """No weight, moment, count, scale or shuffle of the last tenant in the slot remains."""
    fresh, used = make_trainer(), make_trainer()
    if after == "a bigger tenant":
        join(used, "a", seed=8, spec=lora(8), lr=0.5, weight_decay=0.1)
        for _ in range(3):
            used.step()
        used.remove("a")
    for trainer in (fresh, used):
        assert join(trainer, spec=lora(2, ("q_proj",))).slot == 0
        trainer.step()
        trainer.step()
    assert_same_bits(outcome(used), outcome(fresh))
    assert used.tenants["a"].losses == fresh.tenants["a"].losses


# steps


def test_a_step_reports_the_mean_loss_and_gradient_of_its_batch():
    """The whole data is one batch, so evaluation before the step, and the plain model, know what it must say."""
    trainer, data = make_trainer(), examples(3, 5, 9, 9)
    join(trainer, data=data, batch_size=5, lr=0.05, schedule="linear", total_steps=4, clip=1e-3)
    for n in range(1, 4):
        evaluation = trainer.evaluate(data, "a")
        loss, gradient = by_hand(trainer.adapter("a"), data)
        (report,) = trainer.step()
        assert (report.tenant, report.step, report.finite) == ("a", n, True)
        assert report.loss == pytest.approx(loss, rel=1e-5)
        assert report.loss == pytest.approx(evaluation.nll, rel=1e-6)
        assert report.accuracy == pytest.approx(evaluation.accuracy, rel=1e-6)
        assert report.lr == 0.05 * (5 - n) / 4
        assert report.tokens == sum(e.predictions for e in data) == 40
        norm = math.sqrt(sum(float((g.astype("f8") ** 2).sum()) for g in jax.tree.leaves(gradient)))
        assert report.grad_norm == pytest.approx(norm, rel=1e-5)  # of the mean, before clipping
        assert evaluation.tokens == sum(int((e.weights != 0).sum()) for e in data)
    assert trainer.trained_tokens == 120
    assert trainer.tenants["a"].losses[-1] == report.loss


@pytest.mark.slow
def test_a_pool_without_the_head_trains_the_layers():
    spec = PoolSpec(slots=1, rank=4, dtype="float32", targets=LAYER_TARGETS)
    trainer = Trainer(small_base(), make_mesh(), [spec], lanes=1, lane_tokens=LANE_TOKENS, base_hash=BASE_HASH)
    data = examples(3, 3, 9, 9)
    join(trainer, spec=lora(4, LAYER_TARGETS), data=data, batch_size=3)
    for _ in range(2):
        loss, gradient = by_hand(trainer.adapter("a"), data)
        norm = math.sqrt(sum(float((g.astype("f8") ** 2).sum()) for g in jax.tree.leaves(gradient)))
        (report,) = trainer.step()
        assert (report.loss, report.grad_norm) == (pytest.approx(loss, rel=1e-5), pytest.approx(norm, rel=1e-5))


def test_training_learns_its_examples():
    trainer, data = make_trainer(), examples(3, 3)
    join(trainer, spec=lora(8), data=data, batch_size=3, lr=0.02, total_steps=60)
    before = trainer.evaluate(data, "a")
    while trainer.has_work:
        trainer.step()
    after, base = trainer.evaluate(data, "a"), trainer.evaluate(data, None)
    assert before == base  # B starts at zero
    assert after.nll < 0.1 < 2 < base.nll
    assert after.accuracy == 1


@pytest.mark.fault("N4")
def test_every_target_moves_and_nothing_else():
    """B from the first step, A from the second, since B starts at zero; rows past the rank never."""
    trainer = make_trainer()
    targets = ALL_TARGETS[::2]
    join(trainer, spec=lora(3, targets), lr=0.01)
    states = [outcome(trainer)]
    for _ in range(2):
        trainer.step()
        states.append(outcome(trainer))
    for target in ALL_TARGETS:
        a, b = ([getattr(s.rows[target], key) for s in states] for key in ("a_LSRX", "b_LSRY"))
        rank = 3 if target in targets else 0
        np.testing.assert_array_equal(a[0], a[1])
        assert not b[0].any()
        for before, after in ((b[0], b[1]), (b[1], b[2]), (a[1], a[2])):
            assert ((before != after)[:, :rank].any((0, 2))).all()
            assert not (before != after)[:, rank:].any()


def test_a_tenant_is_done_after_its_last_step_and_keeps_its_seat():
    trainer = make_trainer()
    join(trainer, "short", total_steps=2)
    join(trainer, "long", seed=1, total_steps=3)
    assert [len(trainer.step()) for _ in range(3)] == [2, 2, 1]
    assert {n: (t.status, t.step) for n, t in trainer.tenants.items()} == {"short": ("done", 2), "long": ("done", 3)}
    assert not trainer.has_work
    with pytest.raises(StateInvalid):
        trainer.step()
    assert int(outcome(trainer, "short").moments.count) == 2
    assert trainer.evaluate(examples(0, 2), "short").tokens > 0
    trainer.remove("short")
    assert list(trainer.tenants) == ["long"]


# resuming


@pytest.mark.parametrize("stop_after", [1, 3])
def test_a_resumed_run_is_the_uninterrupted_run(tmp_path, stop_after):
    """Through the checkpoint files, into another slot beside other neighbours, in the middle of an epoch and schedule."""
    settings = {"schedule": "cosine", "warmup_steps": 1, "total_steps": 6, "weight_decay": 0.1, "lr": 0.05}
    data = examples(4, 7)
    whole = make_trainer()
    join(whole, data=data, **settings)
    expected = []
    while whole.has_work:
        expected += whole.step()

    first = make_trainer()
    tenant = join(first, data=data, **settings)
    got = [r for _ in range(stop_after) for r in first.step()]
    save_state(tmp_path / "a", tenant.step, host(first.unseat("a")), {"cursor": tenant.stream.cursor})

    second = make_trainer()
    join(second, "other", seed=9, total_steps=50)
    second.step()
    join(second, "a", spec=lora(1), seed=2)
    found = restore_state(tmp_path / "a", second.unseat("a"))
    second.remove("a")
    resume = (found.arrays, found.step, found.meta["cursor"])
    tenant = join(second, data=data, resume=resume, **settings)
    assert (tenant.slot, tenant.step, tenant.status) == (1, stop_after, "running")
    while tenant.status == "running":
        got += [r for r in second.step() if r.tenant == "a"]
    assert got == expected
    assert_same_bits(outcome(second), outcome(whole))


def test_a_tenant_that_had_its_last_step_is_done_when_it_comes_back():
    """It trains no step more, and can be read."""
    trainer = make_trainer()
    join(trainer, total_steps=2)
    while trainer.has_work:
        trainer.step()
    state = outcome(trainer)
    again = make_trainer()
    tenant = join(again, total_steps=2, resume=(state, 2, 4))
    assert (tenant.status, tenant.step, again.has_work) == ("done", 2, False)
    assert_same_bits(outcome(again), state)
    again.remove("a")
    assert join(again, total_steps=3, resume=(state, 2, 4)).status == "running"


# adapters


def test_the_adapter_is_what_the_forward_pass_used():
    """Merged into the plain model it has the trainer's loss; seated again it has the same bits."""
    trainer, data = make_trainer(), examples(5, 4, 9, 9)
    spec = lora(5, ("q_proj", "down_proj", "lm_head"))
    join(trainer, spec=spec, data=data, batch_size=4, lr=0.1)
    for _ in range(3):
        trainer.step()
    adapter = trainer.adapter("a")
    assert (adapter.spec, adapter.base_hash) == (spec, BASE_HASH)
    assert {t: a.shape[1] for t, (a, _) in adapter.weights.items()} == dict.fromkeys(spec.targets, 5)
    tuned, base = by_hand(adapter, data)[0], by_hand(None, data)[0]
    assert trainer.evaluate(data, "a").nll == pytest.approx(tuned, rel=1e-5)
    assert trainer.evaluate(data, None).nll == pytest.approx(base, rel=1e-5)
    assert tuned < base - 0.5
    assert_same_bits(host_rows(CONFIG, SPEC, adapter), host(trainer.rows("a")))
    trainer.step()
    assert trainer.evaluate(data, "a").nll != pytest.approx(tuned, rel=1e-3)
    assert by_hand(adapter, data)[0] == tuned  # the copy stayed


def test_evaluation_of_more_lanes_than_a_step_has_is_the_mean_of_all():
    trainer, data = make_trainer(), examples(6, 2 * LANES + 3, 25, 20)  # one example fills a lane
    got = trainer.evaluate(data, None)
    parts = [trainer.evaluate([e], None) for e in data]
    weights = [float(e.weights.sum()) for e in data]
    mean = sum(p.nll * w for p, w in zip(parts, weights, strict=True)) / sum(weights)
    assert got.nll == pytest.approx(mean, rel=1e-6)
    assert got.tokens == sum(p.tokens for p in parts)
    assert got.accuracy == pytest.approx(sum(p.accuracy * p.tokens for p in parts) / got.tokens)
    with pytest.raises(DataInvalid, match="a lane of 32 positions"):
        trainer.evaluate(examples(0, 1, LANE_TOKENS + 2, LANE_TOKENS + 2), None)


def test_a_fresh_adapter_is_a_bounded_draw_of_its_seed():
    """A row depends on seed, target and layer alone: a smaller rank is the start of a larger one."""
    spec = lora(8)
    large = fresh_adapter(CONFIG, spec, 7, "h").weights
    small = fresh_adapter(CONFIG, lora(3, ("up_proj", "q_proj")), 7, "h").weights
    other = fresh_adapter(CONFIG, spec, 8, "h").weights
    for target, (a, b) in large.items():
        x, y = target_features(CONFIG, target)
        layers = 1 if target == "lm_head" else CONFIG.layers
        assert (a.shape, b.shape) == ((layers, 8, x), (layers, 8, y))
        assert a.dtype == b.dtype == np.float32
        assert not b.any()
        limit = 1 / math.sqrt(x)
        assert np.abs(a).max() <= limit
        assert a.min() < -0.9 * limit < 0.9 * limit < a.max()
        assert abs(a.mean()) < 0.15 * limit
        assert not np.array_equal(a, other[target][0])
        if target in small:
            np.testing.assert_array_equal(small[target][0], a[:, :3])
    draws = [layer.tobytes() for a, _ in large.values() for layer in a]
    assert len(set(draws)) == len(draws)


def test_a_module_of_another_rank_has_zero_rows_past_it():
    odd = (
        ModuleException(target="q_proj", layer=1, rank=2, alpha=4.0),
        ModuleException(target="up_proj", layer=0, rank=0, alpha=1.0),
    )
    spec = LoraSpec(rank=4, alpha=8.0, targets=("q_proj", "up_proj"), exceptions=odd)
    trainer = make_trainer()
    join(trainer, spec=spec, lr=0.1)
    trainer.step()
    trainer.step()
    weights = trainer.adapter("a").weights
    for half in (0, 1):
        assert not weights["q_proj"][half][1, 2:].any()
        assert weights["q_proj"][half][1, :2].any(1).all()
        assert weights["q_proj"][half][0].any(1).all()
        assert not weights["up_proj"][half][0].any()
        assert weights["up_proj"][half][1].any(1).all()
