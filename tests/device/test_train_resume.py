"""A tenant that resumes joins like a fresh one: nothing compiles, wherever its arrays come from."""

from __future__ import annotations

import jax
import pytest
from train_world import examples, lora, make_trainer, optimizer

from jaxlora.model.compile_cache import CompileCounter
from jaxlora.storage.checkpoints import restore_state, save_state


@pytest.mark.parametrize("source", ["device", "checkpoint"])
def test_resuming_after_warm_up_compiles_nothing(tmp_path, source):
    trainer = make_trainer()
    trainer.warm_up()
    trainer.add("ant", lora(2), optimizer(), examples(1, 3), batch_size=2, seed=1)
    trainer.step()
    state = jax.block_until_ready(trainer.unseat("ant"))  # committed to the mesh
    if source == "checkpoint":
        save_state(tmp_path / "state", 1, jax.device_get(state), {})
        state = restore_state(tmp_path / "state", state).arrays
    trainer.remove("ant")
    with CompileCounter() as counter:
        trainer.add("ant", lora(2), optimizer(), examples(1, 3), batch_size=2, seed=1, resume=(state, 1, 2))
        trainer.step()
    assert not counter.retraced, counter
