"""The benchmark of what an adapter costs: its counts on a small base by hand, its arithmetic, and a load of a server."""

from __future__ import annotations

import os
from dataclasses import replace

from safetensors.numpy import load_file
from small_world import tiny_path

from benchmarks import cost
from benchmarks.peers.cases import Serving
from benchmarks.peers.measure import measure
from benchmarks.peers.processes import Tree
from jaxlora.core.adapter_size import adapter_size
from jaxlora.core.lora import LoraSpec
from jaxlora.core.model_config import parameter_count
from jaxlora.peft.ingest import find_base
from serve.bench.client import Server

pytest_plugins = ["wire_fixtures"]


def test_an_adapter_is_stored_and_counted():
    base = find_base(str(tiny_path("tiny-llama-tied")))
    shapes = {k: v.shape for k, v in load_file(tiny_path("tiny-llama-tied") / "model.safetensors").items()}
    features = sum(sum(s) for k, s in shapes.items() if k.endswith(("q_proj.weight", "v_proj.weight")))
    every = sum(sum(s) for k, s in shapes.items() if k.endswith("_proj.weight"))
    head = sum(shapes["model.embed_tokens.weight"])
    layers = base.source.config.layers
    found = cost.measured(base.source.config, base.hash, "q, v", 4, "bfloat16")
    assert found.trainable_parameters == 4 * features
    assert found.ram == 4 * 4 * features
    assert found.ram < found.disk < found.ram + 10**6
    assert found.slot == 2 * 4 * features + 4 * 2 * layers + 4 * 2  # and a scale of each module, a rank of each target
    assert found.server_slot == 2 * 4 * (every + head) + 4 * (7 * layers + 1) + 4 * 8


def test_public_shapes_have_their_published_parameters_and_ranks_are_the_largest():
    published = {"Llama-3.2-1B": 1_235_814_400, "Llama-3.1-8B": 8_030_261_248, "Llama-3.1-70B": 70_553_706_496}
    assert {name: parameter_count(config) for name, config in cost.BASES.items()} == published
    rows = cost.ranks()
    assert len(rows) == 6
    for row in rows:
        config, targets = cost.BASES[row.base], cost.TARGETS[row.targets]
        below, above = (
            adapter_size(config, LoraSpec(rank=rank, alpha=1.0, targets=targets)).trainable_percent
            for rank in (row.largest_rank, row.largest_rank + 1)
        )
        assert below < 0.1 <= above
    assert f"| Llama-3.1-8B | 8,030,261,248 | q, v | {rows[2].largest_rank} |" in cost.ranks_table(rows)


def test_a_load_asks_the_adapters_and_is_measured(running, backend):
    backend.adapters, backend.context = {"a0": 1, "a1": 1}, 400  # a letter is a token
    tree = Tree(os.getpid())  # the server is a thread of this process
    one = cost.Loaded(cost.Setup(name="2 over 2", slots=2, adapters=2), tree, Server.at(running[1]))
    case = Serving(name="2 over 2", clients=3, adapters=2, requests=6, answer=5)
    sample = measure([one], "jaxlora", case, None, 3, 0.0)
    assert {r.adapter.name for r in backend.requests} == {"a0", "a1"}
    assert {r.params.max_tokens for r in backend.requests} == {5}
    assert (len(backend.requests), sample.tokens, len(sample.first_s)) == (6, 30, 6)
    backend.requests.clear()
    one.work(replace(case, requests=1), None, 0)
    assert sorted(r.adapter.name for r in backend.requests) == ["a0", "a1"]  # both slots are filled
