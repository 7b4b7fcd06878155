"""Writes what real PEFT says of our exports: tests/fixtures/trained and tests/fixtures/smollm2_adapters.npz.

    uv run python tests/support/make_export_fixtures.py                the torch side is a script of its own, in its own environment
    uv run python tests/support/make_export_fixtures.py --python EXE   its Python, where torch needs another than this one

What is written:

    trained/NAME             the PEFT folder of an adapter trained by trained_world.py, and logits.npz: what PEFT
                             computes after loading the folder (tokens_i int32 [T], logits_i float32 [T, V])
    smollm2_adapters.npz     for adapter i of smollm2_world.py on prompt i of small_world.py: logits_i float32 [T, 256] of
                             the sampled ids, as PEFT computes them after loading our export; the folders are not kept
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import peft_world
import trained_world
from small_world import FIXTURES, smollm2_prompts
from smollm2_world import SHAPES, random_adapter

from jaxlora.checkpoints.load import open_base, smollm2_path
from jaxlora.config.base import MeshSection, ModelSection
from jaxlora.peft.folder import export_peft

SCRIPT = Path(__file__).parent / "make_peft_fixtures.py"


def peft_logits(python: str | None, folder: Path, base: Path, sequences: list[list[int]], columns: list[int] | None):
    """Has PEFT write logits.npz into the folder of an export."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"sequences": sequences, "columns": columns}, file)
        file.flush()
        choice = [] if python is None else ["--python", python]
        arguments = ["--logits", str(folder), "--base", str(base), "--tokens", file.name]
        subprocess.run(["uv", "run", *choice, "--script", str(SCRIPT), *arguments], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="version or path of the Python on the torch side")
    python = parser.parse_args().python
    shutil.rmtree(trained_world.FOLDER, ignore_errors=True)
    trained = trained_world.train()
    for name, adapter in trained.adapters.items():
        folder = trained_world.FOLDER / name
        export_peft(adapter, folder, trained.base.config, base_name=f"fixtures/{trained_world.BASE}")
        peft_logits(python, folder, peft_world.base_folder(trained_world.BASE), trained_world.SEQUENCES, None)
    opened = open_base(ModelSection(path="smollm2", dtype="float32"), MeshSection(data=1, fsdp=1, tensor=1))
    prompts, arrays = smollm2_prompts(), {}
    for i, (rank, targets) in enumerate(SHAPES):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "export"
            adapter = random_adapter(opened, f"tenant{i}", rank, targets, seed=i)
            export_peft(adapter, folder, opened.base.config, base_name="smollm2")
            columns = prompts[i].sampled_ids.tolist()
            peft_logits(python, folder, smollm2_path(), [prompts[i].ids_T.tolist()], columns)
            with np.load(folder / "logits.npz") as file:
                arrays[f"logits_{i}"] = file["logits_0"]
    np.savez_compressed(FIXTURES / "smollm2_adapters.npz", **arrays)


if __name__ == "__main__":
    main()
