# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "transformers==5.24.0", "peft==0.21.2", "numpy", "scipy", "safetensors", "gguf", "accelerate"
# ]
# ///
"""Writes tests/fixtures/peft with real PEFT, and checks our exports against it.  The suite itself needs no torch.

    uv run --script tests/support/make_peft_fixtures.py                                   writes the fixtures anew (2 minutes)
    uv run --script tests/support/make_peft_fixtures.py --check FOLDER --base CHECKPOINT  loads one exported adapter into PEFT

The script has an environment of its own, with torch; any Python that torch 2.13 supports will do (`--python`).

`--check` wants FOLDER to hold what `export_peft` wrote, plus logits.npz with our own float32 logits:

    tokens_0, tokens_1, …    int, [T]
    logits_0, logits_1, …    float32, [T, V]

and CHECKPOINT to be the base in Hugging Face form.  It prints the largest difference of each sequence and how far the
adapter moves the base, and fails when a difference exceeds `--atol` (default 1e-4), when the adapter moves nothing, and when
PEFT warns that it drops something.

`--logits FOLDER --tokens FILE` is for make_export_fixtures.py: writes what PEFT computes for an exported adapter into
FOLDER/logits.npz, in the form above; FILE is JSON {"sequences": [[id, ...], ...], "columns": the ids to keep, or null}.

What is written:

    bases/NAME        tiny random checkpoints, logits.npz of the base alone
    accepted/NAME     PEFT folders with random A and B; truth.json (base; rank and scale of each module as PEFT has
                      them) and logits.npz as PEFT computes them after loading the folder again
    refused/NAME      PEFT folders with a feature we refuse
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}  # before torch and transformers are imported

FIXTURES = Path(__file__).parents[1] / "fixtures" / "peft"
SEQUENCES = ([5, 17, 99, 3, 64, 127, 0, 42], [1, 2, 3], [88, 88, 7, 31, 120, 11, 11, 90, 56, 4, 73, 29])
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# name → (base, LoraConfig arguments, dtype the tensors are saved in)
ACCEPTED = {
    "plain": ("llama", {"r": 4, "lora_alpha": 8, "target_modules": list(SEVEN)}, "float32"),
    "rslora": ("llama", {"r": 4, "lora_alpha": 8, "target_modules": list(SEVEN), "use_rslora": True}, "float32"),
    "rank-pattern": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": list(SEVEN),
            "rank_pattern": {r"layers\.1.*q_proj": 2, "down_proj": 6},
        },
        "float32",
    ),
    "alpha-pattern": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 16,
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"model.layers.1.self_attn.q_proj": 2},
            "alpha_pattern": {"model.layers.0.self_attn.v_proj": 7.5, "v_proj": 2},
        },
        "float32",
    ),
    "layers": (
        "llama",
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj", "gate_proj"], "layers_to_transform": [1]},
        "float32",
    ),
    "layers-pattern": (
        "llama",
        {"r": 2, "target_modules": ["k_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
        "float32",
    ),
    "exclude": (
        "llama",
        {"r": 4, "target_modules": list(SEVEN), "exclude_modules": ["layers.0.mlp.down_proj", "k_proj"]},
        "float32",
    ),
    "regex": (
        "llama",
        {"r": 4, "target_modules": r".*\.(0\.self_attn\.[qk]_proj|1\.mlp\.(up|down)_proj)", "lora_alpha": 12},
        "float32",
    ),
    "all-linear": ("llama", {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.1}, "float32"),
    "float-alpha": ("llama", {"r": 4, "lora_alpha": 8.5, "target_modules": ["q_proj", "v_proj"]}, "float32"),
    "bfloat16": ("llama", {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}, "bfloat16"),
    "float16": ("llama", {"r": 4, "target_modules": ["o_proj"]}, "float16"),
    "partial": ("llama", {"r": 1, "lora_alpha": 3, "target_modules": ["v_proj", "gate_proj"]}, "float32"),
    "lm-head": ("llama", {"r": 4, "lora_alpha": 8, "target_modules": ["lm_head", "q_proj"]}, "float32"),
    "lm-head-tied": ("llama-tied", {"r": 4, "lora_alpha": 8, "target_modules": ["lm_head", "q_proj"]}, "float32"),
    "tied": ("llama-tied", {"r": 4, "lora_alpha": 8, "target_modules": list(SEVEN)}, "float32"),
    "qwen3": ("qwen3", {"r": 4, "lora_alpha": 8, "target_modules": list(SEVEN)}, "float32"),
    "orthogonal": ("llama", {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}, "float32"),
}
# name → LoraConfig arguments over the llama base; the folder is what PEFT saves
REFUSED = {
    "dora": {"use_dora": True},
    "lora-bias": {"lora_bias": True},
    "bias": {"bias": "lora_only"},
    "modules-to-save": {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "trainable-tokens": {"trainable_token_indices": [1, 5]},
    "target-parameters": {"target_parameters": ["mlp.gate_proj.weight"]},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa-niter": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "layer-replication": {"layer_replication": [[0, 2], [1, 2]]},
    "alora": {"alora_invocation_tokens": [3, 4]},
    "bdlora": {"use_bdlora": {"target_modules_bd_a": ["q_proj"], "nblocks": 2}},
    "kasa": {"kasa_config": {}},
    "velora": {"velora_config": {}},
    "monteclora": {"monteclora_config": {}},
    "qalora": {"use_qalora": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", type=Path, metavar="FOLDER", help="an exported adapter with logits.npz beside it")
    parser.add_argument("--base", type=Path, metavar="CHECKPOINT", help="its base in Hugging Face form")
    parser.add_argument("--atol", type=float, default=1e-4, help="largest difference of a logit that passes")
    parser.add_argument("--logits", type=Path, metavar="FOLDER", help="an exported adapter that gets a logits.npz")
    parser.add_argument("--tokens", type=Path, metavar="FILE", help="what to compute them for")
    args = parser.parse_args()
    if (args.check or args.logits) and not args.base:
        parser.error("--check and --logits need --base")
    if args.check:
        sys.exit(check(args.check, args.base, args.atol))
    elif args.logits:
        write_logits(args.logits, args.base, json.loads(args.tokens.read_text()))
    else:
        write()


def make_base(name: str, attention_bias: bool = False):
    """A tiny random model whose logits are of order one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 128,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "tie_word_embeddings": name == "llama-tied",
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(sum(name.encode()))
    if name == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=16)).eval()
    return LlamaForCausalLM(LlamaConfig(**sizes, attention_bias=attention_bias)).eval()


def load_base(path: Path):
    """A checkpoint in Hugging Face form, or a GGUF file dequantised."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    how = {"dtype": torch.float32, "attn_implementation": "eager"}
    if path.suffix == ".gguf":
        how |= {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)}
        path = path.parent
    return AutoModelForCausalLM.from_pretrained(path, **how).eval()


def logits_of(model, sequences) -> list:
    import torch

    with torch.no_grad():
        return [model(torch.tensor([list(map(int, s))])).logits[0].float().numpy() for s in sequences]


def save_logits(path: Path, logits: list, sequences=SEQUENCES) -> None:
    import numpy as np

    tokens = {f"tokens_{i}": np.array(s, np.int32) for i, s in enumerate(sequences)}
    np.savez_compressed(path, **tokens, **{f"logits_{i}": values for i, values in enumerate(logits)})


def randomise(model) -> None:
    """Random A and B, so that the adapter moves the logits."""
    import torch

    generator = torch.Generator().manual_seed(7)
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data.copy_(torch.randn(value.shape, generator=generator) * 0.15)


def save_adapter(model, folder: Path, base: str) -> None:
    """What PEFT saves, without the model card, with a base name that is no path of this machine."""
    model.peft_config["default"].base_model_name_or_path = f"fixtures/{base}"
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)


def write() -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    shutil.rmtree(FIXTURES, ignore_errors=True)
    for base in ("llama", "llama-tied", "qwen3"):
        folder = FIXTURES / "bases" / base
        make_base(base).save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        save_logits(folder / "logits.npz", logits_of(load_base(folder), SEQUENCES))
    for name, (base, arguments, dtype) in ACCEPTED.items():
        folder = FIXTURES / "accepted" / name
        model = get_peft_model(load_base(FIXTURES / "bases" / base), LoraConfig(task_type="CAUSAL_LM", **arguments))
        randomise(model)
        for parameter_name, value in model.named_parameters():
            if "lora_" in parameter_name:
                value.data = value.data.to(getattr(torch, dtype))
        save_adapter(model, folder, base)
        write_truth(folder, base)
    for name, arguments in REFUSED.items():
        folder = FIXTURES / "refused" / name
        config = LoraConfig(**{"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"], **arguments})
        model = get_peft_model(make_base("llama", attention_bias=name == "bias"), config)
        randomise(model)
        save_adapter(model, folder, "llama")
    write_other_type()
    total = sum(p.stat().st_size for p in FIXTURES.rglob("*") if p.is_file())
    print(f"{len(ACCEPTED)} accepted, {len(REFUSED) + 1} refused, {total / 1e6:.2f} MB in {FIXTURES}")


def write_truth(folder: Path, base: str) -> None:
    """Loads the folder again and records what PEFT makes of it."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    model = PeftModel.from_pretrained(load_base(FIXTURES / "bases" / base), folder).eval()
    modules = {
        name.removeprefix("base_model.model."): [module.r["default"], module.scaling["default"]]
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    (folder / "truth.json").write_text(json.dumps({"base": base, "modules": modules}, indent=1))
    save_logits(folder / "logits.npz", logits_of(model, SEQUENCES))


def write_other_type() -> None:
    from peft import IA3Config, get_peft_model

    config = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])
    save_adapter(get_peft_model(make_base("llama"), config), FIXTURES / "refused" / "ia3", "llama")


def load_exported(folder: Path, checkpoint: Path):
    """(the base under the adapter, what PEFT warned of dropping).  Its other warnings say nothing about our file."""
    import warnings

    from peft import PeftModel

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(load_base(checkpoint), folder).eval()
    return model, [str(w.message) for w in caught if re.search(r"(?i)missing|unexpected|ignored", str(w.message))]


def write_logits(folder: Path, checkpoint: Path, wanted: dict) -> None:
    """FOLDER/logits.npz."""
    model, dropped = load_exported(folder, checkpoint)
    assert not dropped, dropped
    columns = slice(None) if wanted["columns"] is None else wanted["columns"]
    logits = [x[:, columns] for x in logits_of(model, wanted["sequences"])]
    save_logits(folder / "logits.npz", logits, wanted["sequences"])


def check(folder: Path, checkpoint: Path, atol: float) -> int:
    """0 when real PEFT computes the logits stored in `folder`, else 1."""
    import numpy as np

    stored = np.load(folder / "logits.npz")
    count = sum(name.startswith("tokens_") for name in stored.files)
    sequences = [stored[f"tokens_{i}"] for i in range(count)]
    base = logits_of(load_base(checkpoint), sequences)
    model, dropped = load_exported(folder, checkpoint)
    for message in dropped:
        print(f"PEFT warns: {message}")
    theirs = logits_of(model, sequences)
    worst, moved = 0.0, 0.0
    for i in range(count):
        difference = float(np.abs(theirs[i] - stored[f"logits_{i}"]).max())
        effect = float(np.abs(theirs[i] - base[i]).max())
        print(f"sequence {i}: {len(sequences[i])} tokens, max difference {difference:.3g}, adapter moves {effect:.3g}")
        worst, moved = max(worst, difference), max(moved, effect)
    passed = count > 0 and not dropped and worst <= atol and moved > 0
    print(f"{'ok' if passed else 'FAILED'}: {count} sequences, max difference {worst:.3g} (limit {atol:g})")
    return 0 if passed else 1


if __name__ == "__main__":
    main()
