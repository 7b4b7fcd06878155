"""Prompt chunks and decode rows in one program, heads split over two virtual CPU devices, in a process of its own.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/support/mixed_mesh_world.py FOLDER
Checks that every answer is the plain model's and that nothing compiles after the warm-up; prints how many steps were mixed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import compiled  # noqa: F401  # jax as in the tests
import jax
from serve_world import MODEL, ONE_SHAPE, RANK, SLOTS, PlainModel, World, ask, mixing, read_all, run_all
from small_world import tiny_path

from jaxlora.checkpoints.load import base_hash, open_model
from jaxlora.core.lora import ALL_TARGETS
from jaxlora.model.compile_cache import CompileCounter
from jaxlora.model.decoder import load_base
from jaxlora.model.lora_pool import PoolSpec
from jaxlora.model.mesh import make_mesh
from jaxlora.storage.adapter_store import AdapterStore


def main(folder: Path) -> None:
    source, tokenizer = open_model(tiny_path(MODEL))
    mesh, store = make_mesh(tensor=2, devices=jax.devices()[:2]), AdapterStore(folder, host_bytes=10**8)
    spec = PoolSpec(slots=SLOTS, rank=RANK, dtype="float32", targets=ALL_TARGETS)
    base, plain = load_base(source, mesh, dtype="float32"), PlainModel(source)
    world = World(source, base, mesh, tokenizer, base_hash(tiny_path(MODEL)), store, plain, [], spec)
    world.adapters += [world.add(f"bot{i}", i) for i in range(3)]
    engine = mixing(world.engine(ONE_SHAPE))
    engine.warm_up()
    requests = [ask(f"r{i}", [None, *world.adapters][i % 4], 4 + 5 * i, 10) for i in range(8)]
    later, mixed, start = requests[1:], [], engine._start

    def watched(chunks, sequences):
        mixed.append(bool(chunks and sequences))
        return start(chunks, sequences)

    def between(_: int) -> None:
        read_all(engine)
        if later:
            engine.submit(later.pop(0))

    engine._start = watched
    with CompileCounter() as counter:
        answers = run_all(engine, requests[:1], between)
    assert not counter.retraced
    for request in requests:
        assert answers[request.id].tokens == world.greedy(request), request.id
    store.close()
    print(sum(mixed))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
