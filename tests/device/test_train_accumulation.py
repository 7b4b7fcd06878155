"""A batch that has no room in a step is accumulated over several, and is then what one large step would have been."""

import jax
import numpy as np
import pytest
from train_world import (
    BASE_HASH,
    LANE_TOKENS,
    LANES,
    SPEC,
    assert_same_bits,
    examples,
    host,
    lora,
    make_trainer,
    optimizer,
    pairs,
    small_base,
)

from jaxlora.config.training import CROSS_ENTROPY, Loss
from jaxlora.model.mesh import make_mesh
from train.trainer import Trainer

BATCH, STEPS = 25, 3  # examples that fill a lane each: three steps for a batch


def large(count=40):
    """Examples of a lane each."""
    return examples(1, count, LANE_TOKENS + 1, LANE_TOKENS - 2)


def join(trainer, data=None, *, name="large", batch_size=BATCH, loss=CROSS_ENTROPY, **changes):
    how = optimizer(lr=0.01, weight_decay=0.1, clip=0.5)
    data = large() if data is None else data
    return trainer.add(name, lora(3), how, data, batch_size=batch_size, seed=5, loss=loss, **changes)


def updates(trainer, name, count):
    """The reports of so many updates of a tenant."""
    reports = []
    while len(reports) < count:
        reports += [r for r in trainer.step() if r.tenant == name]
    return reports


@pytest.mark.fault("N5")
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cross_entropy", "dpo"])
def test_accumulated_is_what_one_large_step_is(kind):
    """Over 3 steps of 10 lanes, and in one of 32: only the rounding of another shape differs."""
    loss = CROSS_ENTROPY if kind == "cross_entropy" else Loss(name="dpo")
    data = large() if kind == "cross_entropy" else pairs(3, 40)
    batch = BATCH if kind == "cross_entropy" else 40
    small = make_trainer()
    wide = Trainer(small_base(), make_mesh(), [SPEC], lanes=32, lane_tokens=LANE_TOKENS, base_hash=BASE_HASH)
    for trainer in (small, wide):
        join(trainer, data, loss=loss, batch_size=batch)
    got, want = updates(small, "large", STEPS), updates(wide, "large", STEPS)
    for a, b in zip(got, want, strict=True):
        assert a.tokens == b.tokens > LANES * LANE_TOKENS / 2
        assert (a.loss, a.grad_norm) == pytest.approx((b.loss, b.grad_norm), rel=1e-4)
        assert a.accuracy == pytest.approx(b.accuracy, abs=0.02)
    for x, y in zip(*(jax.tree.leaves(host(t.rows("large"))) for t in (small, wide)), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5)


def test_until_its_last_lane_a_batch_is_not_reported_and_moves_nothing():
    trainer = make_trainer()
    join(trainer)
    before = host(trainer.unseat("large"))
    assert [len(trainer.step()) for _ in range(2)] == [0, 0]
    assert_same_bits(host(trainer.unseat("large")), before)
    assert trainer.tenants["large"].stream.cursor == 0
    (report,) = trainer.step()
    assert (report.step, report.tokens) == (1, trainer.trained_tokens)
    assert trainer.tenants["large"].stream.cursor == BATCH
    assert (np.abs(host(trainer.unseat("large")).moments.mu["q_proj"][1]) > 0).any()


def test_neighbours_train_meanwhile_as_without_it():
    alone, beside = make_trainer(), make_trainer()
    join(beside)
    for trainer in (alone, beside):
        join(trainer, examples(7, 9), name="small", batch_size=2)
    updates(alone, "small", 6)
    updates(beside, "small", 6)
    assert_same_bits(host(beside.unseat("small")), host(alone.unseat("small")))


@pytest.mark.fault("N5")
def test_one_that_leaves_within_a_batch_begins_it_again():
    """Its open gradients are not kept; the cursor has not moved, so nothing is lost: bit for bit as uninterrupted."""
    whole, torn = make_trainer(), make_trainer()
    join(whole)
    join(torn)
    updates(whole, "large", 2)
    updates(torn, "large", 1)
    torn.step()
    state, tenant = host(torn.unseat("large")), torn.tenants["large"]
    torn.remove("large")
    join(torn, resume=(state, tenant.step, tenant.stream.cursor))
    updates(torn, "large", 1)
    assert_same_bits(host(torn.unseat("large")), host(whole.unseat("large")))
