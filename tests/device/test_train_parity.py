"""Each step's loss on the real model is PyTorch's and PEFT's, of tenants that train together here and alone there."""

import json

import numpy as np
import pytest
from parity_world import FIXTURE, RECIPES, STEPS, opened, trainer_of

LIMIT = 1e-3  # nats; both are float32, and 50 steps of AdamW carry each rounding on


@pytest.mark.slow
def test_fifty_losses_of_two_tenants_are_those_of_peft():
    trainer = trainer_of(opened())
    while trainer.has_work:
        trainer.step()
    expected = json.loads(FIXTURE.read_text())
    for name in RECIPES:
        got, want = np.array(trainer.tenants[name].losses), np.array(expected[name])
        assert len(got) == len(want) == STEPS
        assert want[-1] < 0.5 * want[0], "a recipe that learns nothing proves nothing"
        np.testing.assert_allclose(got, want, rtol=0, atol=LIMIT, err_msg=name)
