"""What the host adds to a decode step: 64 sequences of 8 adapters, each step's wall time but for the device's.

    uv run python benchmarks/host.py [--steps 200]

The device's time is from the launch of the step's program until its output is on the host (`device_times`); all else is
the host's: the plan, the batch, its transfer, tokens to text, the deltas.  Sampled and greedy rows in turn, half of them
with stop strings.  Prints the median and the 90th percentile; exit code 1 when the median is above the limit.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace

import numpy as np
from serving import request, server

from serve.engine.engine import Engine
from serve.engine.request import Delta
from serve.engine.sampling import StepOutput
from serve.engine.sequence import Sequence

ROWS, ADAPTERS, PROMPT = 64, 8, 16
LIMIT_MS = 2.0


def device_times(engine: Engine) -> list[float]:
    """Has the engine note from now on, for each step that decodes, the seconds from its launch to its output."""
    program, end, began, times_s = engine._programs.launch, engine._end_decode, [0.0], []

    def launch(*args: object) -> object:
        began[0] = time.perf_counter()
        return program(*args)

    def ended(sequences: list[Sequence], out: StepOutput) -> list[Delta]:
        times_s.append(time.perf_counter() - began[0])
        return end(sequences, out)

    engine._programs.launch, engine._end_decode = launch, ended
    return times_s


def main() -> int:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    with server(ADAPTERS, slots=ADAPTERS, rows=ROWS, kv_pages=4 * ROWS) as s:
        engine = s.runner.engine
        engine.warm_up()
        for n in range(ROWS):
            one = request(s.adapters[n % ADAPTERS], PROMPT, steps + 20, s.opened.base.config.vocab)
            how = replace(one.params, temperature=n % 2, seed=n, stop=("\n\n\n\n", "</end>") if n % 4 < 2 else ())
            engine.submit(replace(one, params=how))
        while engine.scheduler.counts()[0] < ROWS or any(q.prompt_left for q in engine.scheduler.running):
            engine.step()
        host_ms, times_s = [], device_times(engine)
        for _ in range(steps):
            start = time.perf_counter()
            engine.step()
            host_ms.append((time.perf_counter() - start - times_s[-1]) * 1000)
        print(f"{engine.scheduler.counts()[0]} of {ROWS} sequences still run after {steps} steps")
    print(f"device {1000 * np.median(times_s):8.2f} ms (median)")
    print(
        f"host   {np.median(host_ms):8.2f} ms (median, limit {LIMIT_MS}), {np.percentile(host_ms, 90):.2f} ms (90th percentile)"
    )
    return int(np.median(host_ms) > LIMIT_MS)


if __name__ == "__main__":
    sys.exit(main())
