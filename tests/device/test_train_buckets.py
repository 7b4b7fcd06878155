"""Slots in buckets of several ranks: where a tenant sits and what memory it costs."""

import gc

import jax
import numpy as np
import pytest
from train_world import (
    BASE_HASH,
    LANE_TOKENS,
    LANES,
    examples,
    host,
    lora,
    optimizer,
    small_base,
)

from jaxlora.core.errors import AdapterInvalid, ConfigInvalid, StateInvalid
from jaxlora.core.lora import ALL_TARGETS
from jaxlora.core.model_config import layer_count, target_features
from jaxlora.model.lora_pool import PoolSpec
from jaxlora.model.mesh import make_mesh
from train.trainer import Trainer

RANKS = {2: 3, 4: 2, 8: 1}  # slots by rank
TENANTS = {"one": 1, "two": 2, "three": 3, "four": 4, "eight": 8}  # rank by name


def bucket(rank, slots, **changes):
    return PoolSpec(**{"slots": slots, "rank": rank, "dtype": "float32", "targets": ALL_TARGETS} | changes)


def trainer_of(ranks=RANKS):
    buckets = [bucket(rank, slots) for rank, slots in ranks.items()]
    return Trainer(small_base(), make_mesh(), buckets, lanes=LANES, lane_tokens=LANE_TOKENS, base_hash=BASE_HASH)


def join(trainer, name, **changes):
    seed = sorted(TENANTS).index(name)
    how = optimizer(lr=0.02, weight_decay=0.1, clip=0.5, loraplus_ratio=1.0 + seed)
    return trainer.add(name, lora(TENANTS[name]), how, examples(seed, 9), batch_size=2 + seed % 2, seed=seed, **changes)


def outcome(trainer, name):
    return host(trainer.unseat(name))


def test_a_tenant_sits_in_the_first_bucket_that_its_rank_fits():
    trainer = trainer_of()
    assert {name: join(trainer, name).slot for name in TENANTS} == {
        "one": 0,
        "two": 1,
        "three": 3,
        "four": 4,
        "eight": 5,
    }
    ranks = {name: outcome(trainer, name).rows["q_proj"].a_LSRX.shape[1] for name in TENANTS}
    assert ranks == {"one": 2, "two": 2, "three": 4, "four": 4, "eight": 8}


def test_a_full_bucket_is_refused_and_other_buckets_are_not_taken():
    trainer = trainer_of()
    for name in ("three", "four"):
        join(trainer, name)
    with pytest.raises(StateInvalid, match="all 2 training slots of rank 4 are taken"):
        trainer.add("more", lora(3), optimizer(), examples(9, 3), batch_size=1, seed=0)
    assert join(trainer, "one").slot == 0
    trainer.remove("three")
    assert trainer.add("more", lora(3), optimizer(), examples(9, 3), batch_size=1, seed=0).slot == 3


def test_too_large_a_rank_is_refused():
    with pytest.raises(AdapterInvalid, match="rank 9 exceeds the limit 8"):
        trainer_of().add("nine", lora(9), optimizer(), examples(0, 3), batch_size=1, seed=0)


@pytest.mark.parametrize(
    "buckets",
    [
        [],
        [bucket(4, 1), bucket(2, 1)],
        [bucket(4, 1), bucket(4, 2)],
        [bucket(2, 1), bucket(4, 1, targets=("q_proj",))],
        [bucket(2, 1), bucket(4, 1, dtype="bfloat16")],
    ],
)
def test_buckets_that_do_not_go_together_are_refused(buckets):
    with pytest.raises(ConfigInvalid, match="buckets of growing rank"):
        Trainer(small_base(), make_mesh(), buckets, lanes=2, lane_tokens=8, base_hash="")


@pytest.mark.slow
def test_evaluation_in_a_bucket_is_that_of_the_exported_adapter():
    """The same weights in one bucket of rank 8 predict the same."""
    trainer, wide = trainer_of(), trainer_of({8: 5})
    for name in TENANTS:
        join(trainer, name)
    for _ in range(3):
        trainer.step()
    heldout = examples(77, 6)
    for name, rank in TENANTS.items():
        weights = trainer.adapter(name).weights
        assert all(a.shape[1] == rank == b.shape[1] for a, b in weights.values())
        state = outcome(trainer, name)

        def to_rank_8(x, state=state):
            return x if x.ndim < 3 else np.pad(x, ((0, 0), (0, 8 - x.shape[1]), (0, 0)))

        join(wide, name, resume=(jax.tree.map(to_rank_8, state), 3, 0))
        got, want = trainer.evaluate(heldout, name), wide.evaluate(heldout, name)
        assert got.nll == pytest.approx(want.nll, rel=1e-6)
        assert got.accuracy == want.accuracy


def test_memory_of_a_slot_is_the_formula():
    """Weights, open gradients and two moments in float32: 16 bytes a parameter of the slot's bucket, scales and a count.

    Of all that is live on the device because of a trainer.  On a mesh: test_house_mesh.
    """

    def live(ranks):
        gc.collect()
        before = sum(x.nbytes for x in jax.live_arrays())
        trainer = trainer_of(ranks)
        found = sum(x.nbytes for x in jax.live_arrays()) - before
        assert found == sum(x.nbytes for x in jax.tree.leaves(trainer.states))
        return found

    config = small_base().config
    features = sum(layer_count(config, t) * sum(target_features(config, t)) for t in ALL_TARGETS)
    scales = 4 * sum(layer_count(config, t) for t in ALL_TARGETS)
    for rank in (2, 8):
        added = live({rank: 5}) - live({rank: 4})
        assert added == 16 * rank * features + scales + 4
    assert live({2: 3, 8: 1}) == live({2: 3}) + live({8: 1})
