"""`jaxlora serve` over the tiny model in a process of its own, slowed so that a stream is under way when a signal comes.

python drain_child.py STORE GRACE_S STEP_S
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from serve_world import MODEL
from small_world import tiny_path

from jaxlora.config.base import ModelSection
from jaxlora.config.serving import ServeConfig
from serve.engine.engine import Engine
from serve.server import build as assemble


def main(store: Path, grace_s: float, step_s: float) -> None:
    """Serves until a signal."""
    step = Engine.step

    def slow(engine: Engine, deliver=None):
        time.sleep(step_s)
        return step(engine, deliver)

    Engine.step = slow
    config = ServeConfig(
        adapters=store,
        data=store.with_name("data"),
        model=ModelSection(path=str(tiny_path(MODEL)), dtype="float32"),
        port=0,
        slots=2,
        max_rank=4,
        rows=4,
        prefill_lanes=4,
        prefill_tokens=8,
        kv_pages=32,
        page_tokens=8,
        grace_s=grace_s,
        max_waiting=2,
        training=None,
    )
    assemble.main(config, None)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))
