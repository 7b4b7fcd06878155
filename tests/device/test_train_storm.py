"""Everything that tenants may change, at random and all at once: nothing compiles, and device memory stays as it was."""

import gc
import random
from collections import Counter

import jax
import numpy as np
import pytest
from jobs_world import make_jobs, request
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
    rollouts,
    small_base,
)

from jaxlora.config.training import LOSSES, Loss
from jaxlora.core.errors import InvalidRequest, NotFound, StateInvalid
from jaxlora.core.lora import ALL_TARGETS, LoraSpec
from jaxlora.model.compile_cache import CompileCounter
from jaxlora.model.lora_pool import PoolSpec
from jaxlora.model.mesh import make_mesh
from train.trainer import Trainer

ACTIONS = 200
BUCKETS = [  # more jobs than these wait in line
    PoolSpec(slots=n, rank=rank, dtype="float32", targets=ALL_TARGETS) for rank, n in ((2, 3), (4, 2), (8, 2))
]


class Storm:
    """Jobs over one trainer, and what may happen to them."""

    def __init__(self, folder, seed, buckets):
        self.random = random.Random(seed)
        self.trainer = Trainer(
            small_base(), make_mesh(), buckets, lanes=LANES, lane_tokens=LANE_TOKENS, base_hash=BASE_HASH
        )
        self.trainer.warm_up()
        self.jobs, self.shelf = make_jobs(folder, self.trainer, quantum_steps=3)
        self.count = 0

    def some(self, *states):
        """A job in one of these states, or None."""
        found = [job for job in self.jobs.list(None) if job.state in states]
        return self.random.choice(found) if found else None

    def seated(self):
        """The name of a tenant that trains, or None."""
        names = [name for name, tenant in self.trainer.tenants.items() if tenant.status == "running"]
        return self.random.choice(names) if names else None

    def data(self, loss, count):
        return {"cross_entropy": examples, "dpo": pairs}.get(loss, rollouts)(self.random.randrange(10**6), count)

    def numbers(self, total_steps):
        draw = self.random
        return optimizer(
            lr=draw.choice([0.0, 1e-3, 0.05]),
            schedule=draw.choice(["constant", "linear", "cosine"]),
            warmup_steps=draw.randrange(min(3, total_steps)),
            total_steps=total_steps,
            weight_decay=draw.choice([0.0, 0.3]),
            b1=draw.choice([0.0, 0.9]),
            b2=draw.choice([0.5, 0.999]),
            eps=draw.choice([1e-8, 1e-2]),
            clip=draw.choice([None, 1e-3, 1.0]),
            loraplus_ratio=draw.choice([1.0, 16.0]),
        )

    def join(self):
        draw, self.count = self.random, self.count + 1
        name, rank = draw.choice(list(LOSSES)), draw.randint(1, 8)
        spec = LoraSpec(
            rank=rank,
            alpha=draw.uniform(0.5, 32),
            targets=tuple(draw.sample(ALL_TARGETS, draw.randint(1, len(ALL_TARGETS)))),
            rslora=draw.random() < 0.5,
            dropout=draw.choice([0.0, 0.4]),
        )
        data, heldout = self.data(name, draw.randint(1, 6)), self.data(name, 2) if draw.random() < 0.5 else None
        if name == "cross_entropy" and draw.random() < 0.3:
            data[0].weights[-1] = np.nan  # after the checks of Example, as a bug would
        loss = Loss(name=name, **{knob: value * 1.5 for knob, value in LOSSES[name].items()})
        how = {"spec": spec, "loss": loss, "heldout": heldout, "weight": draw.choice([0.5, 1.0, 3.0])}
        how |= {"optimizer": self.numbers(draw.randint(2, 12)), "batch_size": draw.randint(1, 3)}
        if heldout is not None:
            how |= {"evaluate_every": draw.randint(1, 3), "keep_best": draw.random() < 0.5}
        self.jobs.create(request(self.count, data=data, **how))
        return True

    def leave(self):
        job = self.some("queued", "running", "paused")
        return job is not None and self.jobs.cancel("acme", job.id)

    def pause(self):
        job = self.some("queued", "running")
        return job is not None and self.jobs.pause("acme", job.id)

    def resume(self):
        job = self.some("paused")
        return job is not None and self.jobs.resume("acme", job.id)

    def set_optimizer(self):
        name = self.seated()
        if name is not None:
            more = self.trainer.tenants[name].step + self.random.randint(3, 8)
            self.trainer.set_optimizer(name, self.numbers(more))
        return name

    def set_weight(self):
        name = self.seated()
        if name is not None:
            self.trainer.set_weight(name, self.random.uniform(0.1, 9))
        return name

    def evaluate(self):
        name = self.seated()
        if name is not None:
            work = [(self.data(self.trainer.tenants[name].loss.name, 4), name), (self.data("cross_entropy", 3), None)]
            self.trainer.evaluate_all(work, tuned=self.random.random() < 0.7)
        return name

    def export(self):
        name = self.seated()
        return name and self.trainer.adapter(name)


def live_bytes():
    """Of all arrays on the device that somebody holds."""
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays())


@pytest.mark.fault("R10")
@pytest.mark.parametrize(
    ("seed", "buckets"),
    [
        pytest.param(0, [SPEC], id="one bucket", marks=pytest.mark.slow),  # the programs of the other tests
        pytest.param(0, BUCKETS, id="three buckets", marks=pytest.mark.soak),
        pytest.param(1, BUCKETS, id="another draw", marks=pytest.mark.soak),
    ],
)
def test_a_storm_compiles_nothing_and_leaves_memory_flat(tmp_path, seed, buckets):
    storm = Storm(tmp_path, seed, buckets)
    kinds = [storm.join] * 3 + [storm.leave, storm.pause, storm.resume, storm.set_optimizer, storm.set_weight]
    kinds += [storm.evaluate, storm.export]
    done, states, before = Counter(), set(), live_bytes()
    with CompileCounter() as counter:
        while done.total() < ACTIONS:
            act = storm.random.choice(kinds)
            done[act.__name__] += bool(act())
            if storm.jobs.has_work and storm.random.random() < 0.7:
                storm.jobs.step()
            states |= {(job.state, job.code) for job in storm.jobs.list(None)}
            if done.total() % 20 == 0:
                assert live_bytes() == before
        for job in storm.jobs.list(None):
            if not job.final:
                storm.jobs.cancel("acme", job.id)
    assert not counter.retraced, counter
    assert live_bytes() == before
    assert min(done.values()) >= 8, done  # each of the eight kinds really happened
    assert len(done) == 8
    assert {"queued", "running", "paused", "succeeded", "cancelled"} <= {state for state, _ in states}
    assert storm.trainer.trained_tokens > 0
    assert not storm.trainer.tenants
    assert storm.jobs._parking.ram_bytes == 0


# other settings for a tenant that runs


NEW = {"lr": 0.2, "schedule": "linear", "total_steps": 9, "weight_decay": 0.5, "b1": 0.5, "clip": 0.1, "eps": 1e-3}


def test_new_settings_hold_from_the_next_step_on_and_touch_nobody_else():
    """As if the tenant had left and come back with them; the neighbour as without any of that."""
    one, other, undisturbed = make_trainer(), make_trainer(), make_trainer()
    for trainer in (one, other, undisturbed):
        for seed, name in enumerate(("a", "b")):
            trainer.add(name, lora(3), optimizer(weight_decay=0.1), examples(seed, 5), batch_size=2, seed=seed)
        for _ in range(3):
            trainer.step()
    one.set_optimizer("a", optimizer(**NEW))
    state, cursor = host(other.unseat("a")), other.tenants["a"].stream.cursor
    other.remove("a")
    other.add("a", lora(3), optimizer(**NEW), examples(0, 5), batch_size=2, seed=0, resume=(state, 3, cursor))
    for _ in range(6):
        reports = [{r.tenant: r for r in trainer.step()} for trainer in (one, other, undisturbed)]
        assert reports[0]["a"] == reports[1]["a"] != reports[2]["a"]
    for name, same in (("a", other), ("b", undisturbed)):
        assert_same_bits(host(one.unseat(name)), host(same.unseat(name)))
    assert (one.tenants["a"].status, one.tenants["b"].status) == ("done", "running")


def test_settings_that_come_too_late_are_refused():
    trainer = make_trainer()
    trainer.add("a", lora(1), optimizer(total_steps=3), examples(0, 2), batch_size=1, seed=0)
    for _ in range(2):
        trainer.step()
    with pytest.raises(InvalidRequest, match="more than the 2 steps that tenant a has done, got 2; remove the tenant"):
        trainer.set_optimizer("a", optimizer(total_steps=2))
    with pytest.raises(NotFound, match="no tenant b"):
        trainer.set_optimizer("b", optimizer())
    trainer.step()
    with pytest.raises(StateInvalid, match="tenant a is done and trains no more"):
        trainer.set_optimizer("a", optimizer())
