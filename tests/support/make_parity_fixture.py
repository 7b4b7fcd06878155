"""Writes tests/fixtures/parity.json: the losses of PyTorch and PEFT on the recipes of parity_world.py, one tenant at a time.

PYTHONPATH=benchmarks uv run python tests/support/make_parity_fixture.py [--python EXE]     EXE: the Python of the torch side
"""

from __future__ import annotations

import argparse
import json

from parity_world import BATCH, FIXTURE, RECIPES, examples, opened, trainer_of
from peft_recipe import train_alone

from train.data.examples import ExampleStream


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="version or path of the Python on the torch side")
    python = parser.parse_args().python
    base = opened()
    trainer, found = trainer_of(base), {}
    for name, r in RECIPES.items():
        stream = ExampleStream(examples(r, base), r.seed)
        adapter = trainer.adapter(name)
        alone = train_alone(adapter, base.base.config, r.optimizer, stream, batch=BATCH, python=python)
        found[name] = alone.losses
    FIXTURE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
