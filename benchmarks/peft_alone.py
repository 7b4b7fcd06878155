# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "transformers==5.24.0", "peft==0.21.2", "numpy", "safetensors", "gguf", "accelerate"
# ]
# ///
"""Trains one exported, untrained adapter with PyTorch and PEFT, or all weights, and says how it went: what we compare with.

    uv run --script benchmarks/peft_alone.py RECIPE.json

An environment of its own, with torch; our side writes the recipe (`peft_recipe.py`, for tenants.py, full_finetune.py and
tests/support/make_parity_fixture.py):

    base        a .gguf file                      adapter     a PEFT folder; null: every weight of the base trains
    steps       of each optimizer step {"lr", "examples"}; an example is {"tokens", "weights"}, as train.data.examples has them
    heldout     examples, asked after the last step; may be empty
    prompts     tokens, each answered greedily after the last step; may be empty
    ends        tokens that end an answer         answer      tokens of an answer at most
    optimizer   {"decay", "b1", "b2", "eps", "clip" (null: none), "b_ratio"}

Prints JSON: losses (the weighted mean over a step's target tokens, before its update), heldout (the same of the held-out
examples, or null), answers (tokens, without the one that ended them), cpu_s and tokens (of the steps, padding not counted),
peak_bytes (of the process, in memory).
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}  # before torch and transformers are imported


def mean_loss(model, examples: list[dict]):
    """The weighted mean loss of a padded batch."""
    import torch

    longest = max(len(e["tokens"]) for e in examples)
    tokens, weights, real = (
        torch.zeros(len(examples), longest, dtype=t) for t in (torch.long, torch.float32, torch.long)
    )
    for i, e in enumerate(examples):
        n = len(e["tokens"])
        tokens[i, :n], weights[i, :n], real[i, :n] = torch.tensor(e["tokens"]), torch.tensor(e["weights"]), 1
    logits = model(tokens[:, :-1], attention_mask=real[:, :-1]).logits
    wanted = weights[:, 1:] != 0
    logprob = torch.log_softmax(logits[wanted], -1).gather(1, tokens[:, 1:][wanted][:, None])[:, 0]
    return -(logprob * weights[:, 1:][wanted]).sum() / weights[:, 1:].abs().sum()


def greedy(model, prompt: list[int], ends: list[int], longest: int) -> list[int]:
    """The likeliest tokens after a prompt, without the one that ends them."""
    import torch

    asked = torch.tensor([prompt])
    options = {"attention_mask": torch.ones_like(asked), "eos_token_id": ends, "pad_token_id": ends[0]}
    made = model.generate(asked, do_sample=False, max_new_tokens=longest, **options)[0, len(prompt) :].tolist()
    return made[:-1] if made[-1] in ends else made


def main() -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    recipe = json.loads(Path(sys.argv[1]).read_text())
    path = Path(recipe["base"])
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    if recipe["adapter"] is not None:
        model = PeftModel.from_pretrained(model, recipe["adapter"], is_trainable=True)
    model.train()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    how = recipe["optimizer"]
    groups = [
        {"params": [p for name, p in trained.items() if "lora_B" not in name], "ratio": 1.0},
        {"params": [p for name, p in trained.items() if "lora_B" in name], "ratio": how["b_ratio"]},
    ]
    betas = how["b1"], how["b2"]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=how["eps"], weight_decay=how["decay"])
    losses, tokens, began = [], 0, time.process_time()
    for step in recipe["steps"]:
        loss = mean_loss(model, step["examples"])
        loss.backward()
        if how["clip"] is not None:
            torch.nn.utils.clip_grad_norm_(list(trained.values()), how["clip"])
        for group in optimizer.param_groups:
            group["lr"] = step["lr"] * group["ratio"]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        tokens += sum(len(e["tokens"]) - 1 for e in step["examples"])
    found = {"losses": losses, "heldout": None, "cpu_s": time.process_time() - began, "tokens": tokens}
    model.eval()
    with torch.no_grad():
        if recipe["heldout"]:
            found["heldout"] = mean_loss(model, recipe["heldout"]).item()
        found["answers"] = [greedy(model, prompt, recipe["ends"], recipe["answer"]) for prompt in recipe["prompts"]]
    unit = 1 if sys.platform == "darwin" else 1024
    print(json.dumps(found | {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}))


if __name__ == "__main__":
    main()
