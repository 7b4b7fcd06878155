# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.24.0", "numpy", "safetensors"]
# ///
"""Checks merged exports against real transformers.  The suite itself needs no torch.

    uv run python tests/support/check_merged.py                     merges every PEFT fixture, and one adapter into the demo model
    uv run --script tests/support/check_merged.py --load FOLDER     the torch side: FOLDER/*/merged, with logits.npz beside it

transformers must find every weight of a merged folder and give the logits that PEFT gave for base and adapter, within 1e-4
(demo model: 1e-3, thirty layers); its tokenizer must give the ids of the demo model's prompt.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ATOL, DEMO_ATOL = 1e-4, 1e-3
DEMO_ADAPTER = 3  # of smollm2_world.SHAPES: all seven projections and lm_head


def merge_all(folder: Path) -> None:
    """FOLDER/NAME/merged and FOLDER/NAME/logits.npz of every fixture and of the demo model."""
    import peft_world
    from small_world import smollm2_prompts
    from smollm2_world import SHAPES, random_adapter

    from jaxlora.checkpoints.load import open_base, open_source
    from jaxlora.config.base import MeshSection, ModelSection
    from jaxlora.peft.merge import write_merged

    for name in peft_world.ACCEPTED:
        fixture = peft_world.load_fixture(name)
        head = peft_world.base_head(fixture.base)
        adapter, _ = peft_world.read_folder(fixture.folder, fixture.base, head=head)
        (folder / name / "merged").mkdir(parents=True)
        source = open_source(peft_world.base_folder(fixture.base))
        write_merged(folder / name / "merged", source, adapter, dtype="float32")
        shutil.copyfile(fixture.folder / "logits.npz", folder / name / "logits.npz")
    opened = open_base(ModelSection(path="smollm2", dtype="float32"), MeshSection(data=1, fsdp=1, tensor=1))
    rank, targets = SHAPES[DEMO_ADAPTER]
    adapter = random_adapter(opened, f"adapter{DEMO_ADAPTER}", rank, targets, DEMO_ADAPTER)
    prompt = smollm2_prompts()[DEMO_ADAPTER]
    with np.load(peft_world.FIXTURES.parent / "smollm2_adapters.npz") as file:
        logits_TV = file[f"logits_{DEMO_ADAPTER}"]
    (folder / "smollm2" / "merged").mkdir(parents=True)
    write_merged(folder / "smollm2" / "merged", open_source(opened.path), adapter, dtype="float32")
    sampled = {"columns": prompt.sampled_ids, "text": np.array(prompt.text)}
    np.savez(folder / "smollm2" / "logits.npz", tokens_0=prompt.ids_T, logits_0=logits_TV, **sampled)


def load_all(folder: Path) -> bool:
    """Whether transformers agrees with every logits.npz."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    fine = True
    for stored in sorted(folder.glob("*/logits.npz")):
        model, info = AutoModelForCausalLM.from_pretrained(stored.parent / "merged", output_loading_info=True)
        logits, worst, ids = np.load(stored), 0.0, True
        columns = logits["columns"] if "columns" in logits else slice(None)
        for i in range(sum(name.startswith("tokens") for name in logits.files)):
            with torch.no_grad():
                got = model(torch.tensor(logits[f"tokens_{i}"][None]).long()).logits[0].numpy()
            worst = max(worst, float(np.abs(got[:, columns] - logits[f"logits_{i}"]).max()))
        if "text" in logits:
            tokenizer = AutoTokenizer.from_pretrained(stored.parent / "merged")
            ids = tokenizer(str(logits["text"])).input_ids == logits["tokens_0"].tolist()
            ids = ids and bool(tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False))
        keys = {kind: found for kind, found in info.items() if found}
        fine &= worst <= (DEMO_ATOL if "columns" in logits else ATOL) and not keys and ids
        print(f"{stored.parent.name:16} largest difference {worst:.1e} {keys or ''} {'' if ids else 'other ids'}")
    return fine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", type=Path, help="what the other side wrote")
    load = parser.parse_args().load
    if load is not None:
        sys.exit(0 if load_all(load) else "transformers computes something else")
    with tempfile.TemporaryDirectory() as temporary:
        merge_all(Path(temporary))
        subprocess.run(["uv", "run", "--script", __file__, "--load", temporary], check=True)


if __name__ == "__main__":
    main()
