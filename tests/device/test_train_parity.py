"""Each step's loss on the real model is PyTorch's and PEFT's, of tenants that train together here and alone there."""

import json

import numpy as np
import pytest
from parity_world import FIXTURE, RECIPES, STEPS, opened, trainer_of

LIMIT = 1e-3  # nats; both are float32, and 50 steps of AdamW carry each rounding on


@pytest.mark.parametrize(
    "steps", [pytest.param(15, marks=pytest.mark.slow), pytest.param(STEPS, marks=pytest.mark.soak)]
)
def test_losses_of_two_tenants_are_those_of_peft(steps):
    trainer = trainer_of(opened())
    for _ in range(steps):
        trainer.step()
    expected = json.loads(FIXTURE.read_text())
    for name in RECIPES:
        got, want = np.array(trainer.tenants[name].losses), np.array(expected[name])
        assert (len(got), len(want)) == (steps, STEPS)
        assert want[-1] < 0.5 * want[0], "a recipe that learns nothing proves nothing"
        np.testing.assert_allclose(got, want[:steps], rtol=0, atol=LIMIT, err_msg=name)
