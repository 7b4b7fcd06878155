"""What the host does for a decode step: 64 sequences of 8 adapters, and a device that answers at once.

    uv run python benchmarks/host.py [--steps 300]

A turn of the device thread is timed, with tokens delivered to 64 streams that an event loop reads: the plan, the batch, the
launch with the arrays of the real base and pool, tokens to text, stop strings, counters, deltas.  In place of the step a
program of the same arguments runs, which computes next to nothing.  Sampled and greedy rows in turn, half of them with stop
strings.  A device never waits for the host if its step takes longer than this (`Engine.runs_ahead`).  Prints the median
of the thread's own time, and of the time that passed, in which the event loop has read what came before; exit code 1 when
the first is above the limit.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import threading
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from serving import Server, request, server

from jaxlora.model.decoder import Base
from jaxlora.model.kv_cache import KVPages, page_format
from jaxlora.model.lora_pool import Rows
from jaxlora.model.mesh import replicated
from serve.engine.engine import Engine
from serve.engine.logit_edits import LogitEdits
from serve.engine.sampling import StepOutput, Work
from serve.engine.step import Computed, PackedBatches, StepPrograms
from serve.runtime.delta_stream import DeltaStream
from serve.runtime.device_thread import Submission

ROWS, ADAPTERS, PROMPT = 64, 8, 16
WARM_UP = 50  # steps that are not timed
LIMIT_MS = 1.0


def answer_at_once(engine: Engine) -> None:
    """Has programs that compute nothing stand for the engine's two of an accelerator."""
    vocab = engine.base.config.vocab

    def step(
        base: Base,
        pool: Rows,
        kv: KVPages,
        newest_B: jax.Array,
        packed: PackedBatches,
        edits: None,
    ) -> tuple[KVPages, Computed]:
        return kv, Computed(logits_BV=newest_B.astype(jnp.float32)[:, None], x_GJD=None)

    def choice(
        logits_BV: jax.Array,
        newest_B: jax.Array,
        packed: PackedBatches,
        edits: LogitEdits | None,
        work: Work,
    ) -> tuple[jax.Array, StepOutput, jax.Array]:
        (batch,) = [one.unpack() for one in packed]
        token_G = (1000 + batch.position_GJ[:, -1] * 7919 + batch.place_G * 31) % vocab
        zero_G = jnp.zeros(len(token_G), jnp.float32)
        return newest_B, StepOutput(token_B=token_G, logprob_B=zero_G, finite_B=zero_G == 0), zero_G

    one = replicated(engine.mesh)
    engine._programs = programs = StepPrograms(engine.mesh, one=False)
    programs.step = jax.jit(step, donate_argnums=2, out_shardings=(page_format(engine.mesh), one))
    programs.choice = jax.jit(choice, static_argnums=4, out_shardings=one)


async def read(s: Server, tokens: int) -> None:
    """Submits the requests and reads their answers to the end."""

    async def one(stream: DeltaStream) -> None:
        async for _ in stream:
            pass

    streams = []
    for n in range(ROWS):
        it = request(s.adapters[n % ADAPTERS], PROMPT, tokens, s.opened.base.config.vocab)
        how = replace(it.params, temperature=n % 2, seed=n, stop=("\n\n\n\n", "</end>") if n % 4 < 2 else ())
        streams.append(DeltaStream(it.id, s.runner.cancel, s.runner._mail))
        s.runner._inbox.put(Submission(replace(it, params=how), streams[-1].deliver, s.runner.admit))
    await asyncio.gather(*map(one, streams))


def main() -> int:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    with server(ADAPTERS, slots=ADAPTERS, rows=ROWS, kv_pages=ROWS * (steps // 16 + 8)) as s:
        runner, engine = s.runner, s.runner.engine
        answer_at_once(engine)
        engine.runs_ahead = True
        reader = threading.Thread(target=asyncio.run, args=(read(s, steps + WARM_UP + 20),))
        reader.start()
        scheduler = engine.scheduler
        while scheduler.counts()[0] < ROWS or any(q.prompt_left for q in scheduler.running):
            runner._turn()
        turn_ms = []
        for _ in range(WARM_UP + steps):
            start, cpu = time.perf_counter(), time.thread_time()
            runner._turn()
            turn_ms.append((1000 * (time.perf_counter() - start), 1000 * (time.thread_time() - cpu)))
        print(f"{scheduler.counts()[0]} of {ROWS} sequences still run after {steps} steps")
        while engine.has_work:
            runner._turn()
        reader.join()
    wall, cpu = np.array(turn_ms[WARM_UP:]).T
    for name, of in (("of its own", cpu), ("passed", wall)):
        at = np.percentile(of, (10, 50, 90))
        print(f"host: {at[1]:.2f} ms {name} (median; {at[0]:.2f} and {at[2]:.2f} ms the 10th and 90th percentiles)")
    return int(np.median(cpu) > LIMIT_MS)


if __name__ == "__main__":
    sys.exit(main())
