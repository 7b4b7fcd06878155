"""SkyRL's JAX backend, for workers.py: in its own environment, which has none of our packages.

The engine alone, called as SkyRL's server calls it, without that server: its newest release takes no current client.
It has 32 adapters at most, of which the base is one.  Adapters that are served get no optimizer here, and training has an
engine of its own: an optimizer of theirs holds moments for all adapters of its engine.
"""

from __future__ import annotations

import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from skyrl.backends.jax import JaxBackend, JaxBackendConfig
from skyrl.tinker import types

from benchmarks.peers.lines import answer_lines

RANK, ALPHA, MOST = 16, 32.0, 31
TRAINED = "trained"
ADAM = types.AdamParams(learning_rate=1e-4, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)


class Worker:
    """The engine with its adapters."""

    def __init__(self, base: str, adapters: dict[str, str]) -> None:
        self.folder = Path(tempfile.mkdtemp())
        slots = min(len(adapters), MOST) + 1
        self.base = base
        self.engine = JaxBackend(base, JaxBackendConfig(max_lora_adapters=slots, max_lora_rank=RANK))
        self.trainer: JaxBackend | None = None
        for place, (name, folder) in enumerate(list(adapters.items())[:MOST]):
            how = types.LoraConfig(rank=RANK, alpha=ALPHA, seed=0)
            self.engine.models[name] = types.ModelMetadata(adapter_index=place + 1, lora_config=how)
            archive = self.folder / f"{name}.tar.gz"
            with tarfile.open(archive, "w:gz", compresslevel=1) as out:
                out.add(Path(folder) / "adapter_model.safetensors", "adapter_model.safetensors")
                out.add(Path(folder) / "adapter_config.json", "adapter_config.json")
            self.engine.load_sampler_checkpoint(name, name, archive)

    def serve(self, prompts: list[list[int]], adapters: list[str | None], answer: int) -> dict:
        """Generates all answers as one batch."""
        count = len(prompts)
        batch = types.PreparedSampleBatch(
            all_model_inputs=[_input(tokens) for tokens in prompts],
            all_sampling_params=[types.SamplingParams(temperature=0.0, max_tokens=answer, seed=0)] * count,
            all_model_ids=[name or "" for name in adapters],
            all_checkpoint_ids=[name or "" for name in adapters],
            all_checkpoint_paths=[""] * count,
            all_session_ids=[None] * count,
            needs_prompt_logprobs=False,
            request_batch_slices=[(str(n), adapters[n] or "", n, n + 1, False, 0) for n in range(count)],
        )
        began_s = time.perf_counter()
        done = self.engine.sample(batch)
        wall_s = time.perf_counter() - began_s
        tokens = [done[str(n)].sequences[0].tokens for n in range(count)]
        texts = self.engine.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return {"wall_s": wall_s, "tokens": sum(map(len, tokens)), "first_s": [], "between_s": [], "texts": texts}

    def train(self, tenants: int, lanes: int, tokens: int, steps: int, seed: int) -> dict:
        """Trains one model for some steps on random rows."""
        assert tenants == 1
        if self.trainer is None:
            self.trainer = JaxBackend(self.base, JaxBackendConfig(max_lora_adapters=2, max_lora_rank=RANK))
            self.trainer.create_model(TRAINED, types.LoraConfig(rank=RANK, alpha=ALPHA, seed=0))
        random = np.random.default_rng(seed)
        rows = random.integers(1000, self.trainer.model_config.vocab_size, (steps, lanes, tokens + 1)).tolist()
        nothing = [[0.0] * tokens] * lanes
        began_s = time.perf_counter()
        for step in rows:
            batch = types.PreparedModelPassBatch(
                all_model_inputs=[_input(row[:-1]) for row in step],
                all_targets=[row[1:] for row in step],
                all_token_weights=[[1.0] * tokens] * lanes,
                all_sampling_logprobs=nothing,
                all_advantages=nothing,
                all_values=nothing,
                all_returns=nothing,
                all_model_ids=[TRAINED] * lanes,
                all_loss_fns=["cross_entropy"] * lanes,
                all_loss_fn_configs=[None] * lanes,
                request_batch_slices=[("pass", TRAINED, 0, lanes)],
            )
            self.trainer.forward_backward(batch)
            self.trainer.optim_step(TRAINED, types.OptimStepInput(adam_params=ADAM))
        return {"wall_s": time.perf_counter() - began_s, "tokens": steps * lanes * tokens}


def _input(tokens: list[int]) -> types.ModelInput:
    return types.ModelInput(chunks=[types.EncodedTextChunk(tokens=tokens)])


if __name__ == "__main__":
    answer_lines(Worker)
