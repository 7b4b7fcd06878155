"""transformers and PEFT, for workers.py: in PyTorch's environment, which has none of our packages."""

from __future__ import annotations

import time

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.peers.lines import answer_lines

BASE = "__base__"  # PEFT's name, in a batch of several adapters, for none
TRAINED = "trained"


class Times:
    """Notes when each token of the batch is there; asked by `generate` after each, and never stops it."""

    def __init__(self) -> None:
        self.at_s: list[float] = []

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        self.at_s.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool)


class Worker:
    """A base with its adapters."""

    def __init__(self, base: str, adapters: dict[str, str], dtype: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype)).eval()
        self.model.generation_config.eos_token_id = None  # answers have their full length
        for name, folder in adapters.items():  # as they are served: in the base's dtype
            if isinstance(self.model, PeftModel):
                self.model.load_adapter(folder, name, autocast_adapter_dtype=False)
            else:
                self.model = PeftModel.from_pretrained(
                    self.model, folder, adapter_name=name, autocast_adapter_dtype=False
                )
                self.model.to(getattr(torch, dtype))
        if adapters:  # as it is trained by default: in float32
            self.model.load_adapter(next(iter(adapters.values())), TRAINED, is_trainable=True)
        self.optimizer: torch.optim.Optimizer | None = None

    def serve(self, prompts: list[list[int]], adapters: list[str | None], answer: int) -> dict:
        """Generates all answers as one batch."""
        ids, times = torch.tensor(prompts), Times()
        how = {"max_new_tokens": answer, "do_sample": False, "pad_token_id": 0, "stopping_criteria": [times]}
        how["attention_mask"] = torch.ones_like(ids)
        names = set(adapters)
        began_s = time.perf_counter()
        with torch.inference_mode():
            if names == {None} and isinstance(self.model, PeftModel):
                with self.model.disable_adapter():
                    out = self.model.generate(input_ids=ids, **how)
            elif len(names) == 1:
                if isinstance(self.model, PeftModel):
                    self.model.set_adapter(next(iter(names)))
                out = self.model.generate(input_ids=ids, **how)
            else:
                out = self.model.generate(input_ids=ids, adapter_names=[a or BASE for a in adapters], **how)
        wall_s = time.perf_counter() - began_s
        between_s = [b - a for a, b in zip(times.at_s, times.at_s[1:], strict=False)]
        new = out[:, ids.shape[1] :]
        return {
            "wall_s": wall_s,
            "tokens": new.numel(),
            "first_s": [times.at_s[0] - began_s] * len(prompts),
            "between_s": between_s * len(prompts),
            "texts": self.tokenizer.batch_decode(new, skip_special_tokens=True),
        }

    def train(self, tenants: int, lanes: int, tokens: int, steps: int, seed: int) -> dict:
        """Trains one adapter for some steps on random rows."""
        assert tenants == 1
        self.model.set_adapter(TRAINED)
        self.model.train()
        trained = [p for name, p in self.model.named_parameters() if f".{TRAINED}." in name]
        for parameter in trained:
            parameter.requires_grad_(True)
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(trained, lr=1e-4)
        source = torch.Generator().manual_seed(seed)
        ids = torch.randint(1000, self.model.config.vocab_size, (steps, lanes, tokens + 1), generator=source)
        began_s = time.perf_counter()
        for rows in ids:
            logits = self.model(rows[:, :-1]).logits.float()
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        wall_s = time.perf_counter() - began_s
        self.model.eval()
        return {"wall_s": wall_s, "tokens": steps * lanes * tokens}


if __name__ == "__main__":
    answer_lines(Worker)
