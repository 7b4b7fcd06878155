"""Very many jobs over few slots: all finish, owners get equal shares, nothing compiles, and who waits holds nothing."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from jobs_world import make_jobs, request, trainer_of
from train_world import CONFIG, lora, optimizer

from jaxlora.core.lora import LAYER_TARGETS, AdapterRef, AdapterWeights
from jaxlora.model.compile_cache import CompileCounter
from train.data.examples import Example

SLOTS, TOKENS, STEPS = 16, 64, 2
SMALL_OWNERS, EACH = 4, 9  # the last owner has all other jobs: about 100 times as many as each of these


class CountingShelf:
    """Counts what is delivered and keeps none of it."""

    def __init__(self) -> None:
        self.delivered = Counter()

    def add(self, tenant: str, name: str, weights: AdapterWeights) -> AdapterRef:
        weights.check_finite()
        assert all(b.any() for _, b in weights.weights.values())  # it learned something
        self.delivered[tenant] += 1
        return AdapterRef(tenant, name, 1)


def sequence(seed: int) -> list[Example]:
    """One example of 64 predictions."""
    tokens = np.random.default_rng(seed).integers(0, CONFIG.vocab, TOKENS + 1).astype(np.int32)
    return [Example(tokens, np.r_[0, np.ones(TOKENS)].astype(np.float32))]


def jain(shares: list[float]) -> float:
    """1 when all are equal, 1/n when one has everything.  Source: Jain, Chiu and Hawe 1984."""
    return sum(shares) ** 2 / (len(shares) * sum(x * x for x in shares))


@pytest.mark.parametrize(
    ("total", "quantum"),
    [pytest.param(1000, None, marks=pytest.mark.soak), pytest.param(200, 1, marks=pytest.mark.slow)],
    ids=["1000 jobs", "200 jobs in slices"],
)
def test_a_flood_of_jobs_finishes_and_shares_stay_equal(tmp_path, total, quantum):
    """One owner has all but a few; shares are compared until the first of the small owners has no job in line."""
    trainer = trainer_of(SLOTS, lanes=SLOTS, lane_tokens=TOKENS)
    trainer.warm_up()
    shelf = CountingShelf()
    jobs, _ = make_jobs(tmp_path, trainer, shelf=shelf, quantum_steps=quantum)
    counts = {"flood": total - SMALL_OWNERS * EACH} | {f"small{i}": EACH for i in range(SMALL_OWNERS)}
    spec, how = lora(4, LAYER_TARGETS), optimizer(total_steps=STEPS)
    with CompileCounter() as counter:
        made = [
            jobs.create(request(i, owner=owner, spec=spec, optimizer=how, batch_size=1, data=sequence(i)))
            for owner, count in counts.items()
            for i in range(count)
        ]
        tokens, shares, most = Counter(), None, 0
        while jobs.has_work:
            for report in jobs.step():
                tokens[jobs._jobs[report.tenant].request.owner] += report.tokens
            most = max(most, len(trainer.tenants))
            waiting = {j.request.owner for j in made if j.state == "queued"}
            if shares is None and waiting != counts.keys():
                shares = dict(tokens)
    assert {j.state for j in made} == {"succeeded"}
    assert shelf.delivered == counts
    assert tokens == {owner: count * STEPS * TOKENS for owner, count in counts.items()}
    assert most <= SLOTS
    assert shares is not None
    assert jain(list(shares.values())) >= 0.95, shares
    assert not counter.retraced, counter


def test_who_waits_holds_neither_slot_nor_state(tmp_path):
    jobs, _ = make_jobs(tmp_path, trainer_of(SLOTS, lanes=SLOTS, lane_tokens=TOKENS))
    for i in range(3 * SLOTS):
        jobs.create(request(i, data=sequence(i), batch_size=1))
    jobs.step()
    assert len(jobs.trainer.tenants) == SLOTS
    assert len(jobs._queue) == 2 * SLOTS
    assert (len(jobs._parking), jobs._parking.ram_bytes) == (0, 0)
    assert not any(live.heldout for live in jobs._live.values())
