"""What edits of logits cost a decode step: none in the program, none in use, penalties, a grammar; 32 rows of the demo model.

    uv run python benchmarks/edits.py [--rounds 40]

The decode program runs on one set of arguments, each way once in every round, so that what the machine does meanwhile falls
on all alike; prints the median of each way's time over that of the program without edits in the same round.  The host's part
is what it takes to fill the edits of 32 rows, after 500 tokens each.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from unittest import mock

import jax
import numpy as np
from serving import request, server

from jaxlora.model.mesh import place_rows
from serve.engine import sampling
from serve.engine.grammar import Grammars, GrammarSource
from serve.engine.logit_edits import LogitEdits, RowEdits
from serve.engine.step import StepPrograms

ROWS, SEEN = 32, 500
SCHEMA = (
    '{"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}, "required": ["name"]}'
)


def main() -> None:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    with server(1, rows=ROWS, kv_pages=4 * ROWS) as s:
        engine, vocab = s.runner.engine, s.opened.base.config.vocab
        batch, idle = engine._idle.make(ROWS, 1), engine._edits.make(ROWS, tokens=False, allowed=False)
        batch.fields.position_GJ[:] = 8
        batch.fields.page_GC[:, 0] = np.arange(ROWS)
        packed, newest_B = (place_rows(engine.mesh, batch),), engine._newest
        params = replace(request(None, 1, 1024, vocab).params, repetition_penalty=1.2, presence_penalty=0.5)
        seen = np.random.default_rng(0).integers(0, vocab, SEEN)
        lists = [RowEdits(params, seen, (), vocab) for _ in range(ROWS)]
        state = Grammars(engine.tokenizer).compile_now(GrammarSource(kind="json", text=SCHEMA, param="")).start()
        for token in engine.tokenizer.encode('{"name": "'):
            state.allow(np.zeros(-(-vocab // 32), np.uint32))
            state.take(token)

        def penalties() -> LogitEdits:
            edits = engine._edits.make(ROWS, tokens=True, allowed=False)
            for row, it in enumerate(lists):
                it.fill(edits.tokens, row, must_end=False)
            return edits

        def grammar() -> LogitEdits:
            edits = engine._edits.make(ROWS, tokens=False, allowed=True)
            for row in range(ROWS):
                state.allow(np.asarray(edits.allowed.bits_BW)[row])
                edits.allowed.used_B[row] = True
            return edits

        args = (engine.base, engine._pool, engine._kv, newest_B, packed, idle)
        whole = engine._programs.step.lower(*args).compile()
        with mock.patch.object(sampling, "edited", lambda logits_BV, edits: logits_BV):
            jax.clear_caches()  # or the program is not traced again
            bare = StepPrograms(engine.mesh, one=True).step.lower(*args).compile()
        for name, program in (("with", whole), ("without", bare)):
            memory, cost = program.memory_analysis(), program.cost_analysis()
            print(f"{name} edits: {memory.temp_size_in_bytes / 1e6:.1f} MB of scratch, {cost['flops'] / 1e9:.3f} GFLOP")
        ways = {
            "no edits in the program": (bare, idle),
            "the same once more": (bare, idle),
            "no row uses any": (whole, idle),
            "penalties in all rows": (whole, engine._edits.place(penalties())),
            "a grammar in all rows": (whole, engine._edits.place(grammar())),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds + 1):  # the first warms up
            for name, (program, edits) in ways.items():
                start = time.perf_counter()
                engine._kv, (_, out) = program(engine.base, engine._pool, engine._kv, newest_B, packed, edits)
                jax.block_until_ready(out)
                times[name].append(time.perf_counter() - start)
        plain = np.array(times["no edits in the program"][1:])
        print(f"decode of {ROWS} rows without edits: {np.median(plain) * 1000:.1f} ms")
        for name in list(ways)[1:]:
            print(f"{name:24} {np.median(np.array(times[name][1:]) / plain):.3f} of that")
        for name, fill in (("penalties", penalties), ("grammar", grammar)):
            start = time.perf_counter()
            for _ in range(rounds):
                fill()
            print(f"{name}: the host fills {ROWS} rows in {(time.perf_counter() - start) / rounds * 1000:.2f} ms")
        print(f"and sends {sum(x.nbytes for x in jax.tree.leaves(penalties().tokens)) / 1e6:.2f} MB of lists, ", end="")
        print(f"{grammar().allowed.bits_BW.nbytes / 1e6:.2f} MB of bits")


if __name__ == "__main__":
    main()
