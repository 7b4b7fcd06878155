"""Our side of peft_alone.py: an untrained adapter, or none, and batches, written out, and what PyTorch and PEFT make of them."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from jaxlora.checkpoints.load import smollm2_path
from jaxlora.config.training import Optimizer
from jaxlora.core.lora import AdapterRef, AdapterWeights
from jaxlora.core.model_config import ModelConfig
from jaxlora.peft.folder import export_peft
from train.data.examples import Example, ExampleStream

SCRIPT = Path(__file__).with_name("peft_alone.py")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Prompts that are answered greedily when all steps are done."""

    prompts: Sequence[Sequence[int]]  # tokens
    ends: Sequence[int]  # tokens that end an answer
    answer: int  # tokens at most


NOBODY = Asked(prompts=(), ends=(), answer=0)


@dataclass(frozen=True, kw_only=True)
class Alone:
    """What PyTorch and PEFT make of a recipe."""

    losses: list[float]  # of each step, nats per target token, before its update
    heldout: float | None  # after the last step
    answers: list[list[int]]  # tokens, without the one that ended them
    cpu_s: float  # of the steps
    tokens: int
    peak_bytes: int  # of PyTorch's process


def _listed(examples: Sequence[Example]) -> list[dict[str, list]]:
    return [{"tokens": e.tokens.tolist(), "weights": e.weights.tolist()} for e in examples]


def train_alone(
    adapter: AdapterWeights | None,
    config: ModelConfig,
    optimizer: Optimizer,
    stream: ExampleStream,
    *,
    batch: int,
    heldout: Sequence[Example] = (),
    asked: Asked = NOBODY,
    python: str | None = None,
) -> Alone:
    """Trains this untrained adapter of the demo model on the batches that our mixer takes from the stream.

    adapter: None trains all weights of the demo model instead.
    `python`: version or path of the Python on the torch side.  Raises CalledProcessError when that side fails.
    """
    steps = [{"lr": optimizer.lr_at(n), "examples": _listed(stream.take(batch))} for n in range(optimizer.total_steps)]
    row = optimizer.row(0, 1.0) | {"clip": optimizer.clip}
    with tempfile.TemporaryDirectory() as temporary:
        folder, recipe = Path(temporary) / "adapter", Path(temporary) / "recipe.json"
        if adapter is not None:
            export_peft(adapter.named(AdapterRef("peft", "untrained", 1)), folder, config, base_name="SmolLM2")
        written = {"base": str(smollm2_path()), "adapter": None if adapter is None else str(folder), "steps": steps}
        recipe.write_text(json.dumps(written | {"optimizer": row, "heldout": _listed(heldout)} | asdict(asked)))
        choice = [] if python is None else ["--python", python]
        command = ["uv", "run", *choice, "--script", str(SCRIPT), str(recipe)]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return Alone(**json.loads(printed.splitlines()[-1]))
