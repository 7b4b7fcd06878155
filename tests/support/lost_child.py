"""`jaxlora` in a process of its own, whose device fails or hangs when a file says so.

python lost_child.py FOLDER ARGUMENTS-OF-JAXLORA…    FOLDER/fail: its next step raises; FOLDER/hang: its next step does not end
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from serve.cli import main as cli


def break_steps(folder: Path) -> None:
    """Has the engine look for the files before each step, and use each once."""
    from serve.engine.engine import Engine

    step = Engine.step

    def breaking(engine: Engine, deliver=None):
        time.sleep(0.02)  # or an answer is complete before it can be broken
        for name in ("fail", "hang"):
            if (folder / name).exists():
                (folder / name).unlink()
                if name == "fail":
                    raise RuntimeError("the device is gone")
                time.sleep(10_000)
        return step(engine, deliver)

    Engine.step = breaking


if __name__ == "__main__":
    break_steps(Path(sys.argv[1]))
    sys.argv = [sys.argv[0], *sys.argv[2:]]
    cli.main()
