"""The same training and the same decoding on several meshes of virtual CPU devices, in one process of its own:

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/support/mesh_world.py WORLD OUT

writes OUT/MESH.npz for every mesh of the world: losses, gradient norms, trained weights, greedy tokens, log-probabilities.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from small_world import tiny_path
from train_world import CONFIG, RandomSource, examples, host, lora, optimizer, pairs, rollouts

from jaxlora.checkpoints.load import open_model, smollm2_path
from jaxlora.checkpoints.tokenizer import Tokenizer
from jaxlora.config.serving import SlotSize
from jaxlora.config.training import Loss, MomentsDtype
from jaxlora.core.lora import ALL_TARGETS
from jaxlora.core.model_config import ModelConfig
from jaxlora.model import compile_cache
from jaxlora.model.base_form import Form
from jaxlora.model.compile_cache import CompileCounter
from jaxlora.model.decoder import Base, load_base
from jaxlora.model.lora_pool import PoolSpec
from jaxlora.model.mesh import describe, make_mesh
from jaxlora.storage.adapter_store import AdapterStore
from serve.engine.engine import Engine, EngineConfig
from serve.engine.request import Request, SamplingParams
from train.trainer import Trainer

VOCAB = 384  # at least the tiny tokenizer's, and divisible by 2 and 3
SMALL = dataclasses.replace(CONFIG, vocab=VOCAB)
SMOLLM2_CUT = ModelConfig(  # one layer of SmolLM2's sizes
    family="llama",
    layers=1,
    d_model=576,
    d_ff=1536,
    heads=9,
    kv_heads=3,
    head_dim=64,
    vocab=VOCAB,
    context=256,
    norm_eps=1e-5,
    rope_theta=1e5,
    rope_scaling=None,
    window=None,
    qkv_bias=False,
    qk_norm=False,
    tied=True,
)
UINT8 = dataclasses.replace(SMALL, d_ff=192, vocab=512)  # moments in 8 bits, of features in one, two and four blocks
WORLDS = {  # name → meshes; the first is one device
    "small": ((1, 1, 1), (2, 2, 2)),
    "unrolled": ((1, 1, 1), (2, 2, 2)),  # the same, on several devices with an array for each layer, as GPUs have them
    "uint8": ((1, 1, 1), (2, 2, 2)),
    "smollm2-cut": ((1, 1, 1), (1, 2, 3)),
    "smollm2": ((1, 1, 1), (1, 2, 3)),
}
LANES, LANE_TOKENS, STEPS, NEW_TOKENS = 4, 32, 3, 6
SPEC = PoolSpec(slots=4, rank=4, dtype="float32", targets=ALL_TARGETS)
ENGINE = EngineConfig(
    sizes=(SlotSize(slots=4, pages=32), SlotSize(slots=6, pages=24)),
    rows=4,
    prefill_lanes=4,
    prefill_tokens=8,
    pages=32,
    page_tokens=4,
    max_tokens=32,
    max_waiting=16,
    max_waiting_tokens=4096,
    host_bytes=0,
    quantum_s=0.2,
)
TENANTS = {  # eps well above rounding: an update of a near-zero gradient is not a coin toss
    "a": (4, ALL_TARGETS, {"lr": 0.02, "eps": 1e-2, "weight_decay": 0.1}),
    "b": (1, ("q_proj", "down_proj"), {"lr": 0.02, "eps": 1e-2, "clip": 0.5}),
    "c": (2, ("k_proj", "o_proj", "lm_head"), {"lr": 0.02, "eps": 1e-1, "clip": None}),
}
LOSSES = {"a": Loss(), "b": Loss(name="dro"), "c": Loss(name="dpo")}


def train(base: Base, mesh: Mesh, found: dict[str, np.ndarray], moments: MomentsDtype = "float32") -> Trainer:
    """Three tenants, some steps; then one leaves and comes back from its state.  Compiles nothing after warm-up."""
    shape = {"lanes": LANES, "lane_tokens": LANE_TOKENS, "base_hash": "mesh"}
    trainer = Trainer(base, mesh, [SPEC], moments=moments, **shape)
    trainer.warm_up()
    data = {"a": examples(0, 6, vocab=VOCAB), "b": rollouts(1, 6), "c": pairs(2, 6, longest=6)}
    with CompileCounter() as counter:
        for i, (name, (rank, targets, settings)) in enumerate(TENANTS.items()):
            trainer.add(
                name, lora(rank, targets), optimizer(**settings), data[name], batch_size=3, seed=i, loss=LOSSES[name]
            )
        for n in range(STEPS):
            for r in trainer.step():
                accuracy = r.accuracy if n else 0.0  # before the first update DPO's margins are rounding
                found[f"train {r.tenant} {n}"] = np.array([r.loss, r.grad_norm, accuracy])
        rank, targets, settings = TENANTS["a"]
        resume = (host(trainer.unseat("a")), STEPS, 3 * STEPS)
        trainer.remove("a")
        trainer.add("a", lora(rank, targets), optimizer(**settings), data["a"], batch_size=3, seed=0, resume=resume)
        found["resumed"] = np.array([r.loss for r in sorted(trainer.step(), key=lambda r: r.tenant)])
        for name in (*TENANTS, None):
            e = trainer.evaluate(data[name or "a"], name)
            found[f"evaluate {name}"] = np.array([e.nll, e.accuracy])
    assert not counter.retraced, counter
    for name in TENANTS:
        for target, (a, b) in trainer.adapter(name).weights.items():
            found[f"weights {name} {target} a"], found[f"weights {name} {target} b"] = a, b
    placed = jax.tree.leaves((base, trainer.states))
    shards = [shard for x in jax.tree.leaves(trainer.states) for shard in x.addressable_shards]
    found["state bytes"] = np.array([sum(s.data.nbytes for s in shards if s.device == d) for d in mesh.devices.flat])
    found["parts"] = np.unique([len({s.index for s in x.addressable_shards}) for x in placed])
    return trainer


def decode(trainer: Trainer, tokenizer: Tokenizer, found: dict[str, np.ndarray]) -> None:
    """Greedy answers of the three adapters, one installed from device rows, two from the store, and of the base.

    In their middle slots and pages change, and change back.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = AdapterStore(Path(folder), host_bytes=10**8)
        engine = Engine(trainer.base, trainer.mesh, ENGINE, SPEC, store, tokenizer, "mesh")
        engine.warm_up()
        refs = {name: store.add("t", name, trainer.adapter(name)) for name in TENANTS}
        rows = trainer.rows("a")
        engine.rehearse_install(rows)
        with CompileCounter() as counter:
            engine.install(refs["a"], rows)
            for i, name in enumerate((*TENANTS, "base")):
                prompt = np.random.default_rng(i).integers(4, 320, 5 + 4 * i).tolist()
                params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True, logprobs=3)
                engine.submit(Request(id=name, tenant="t", adapter=refs.get(name), prompt=tuple(prompt), params=params))
            tokens, logprobs = {}, {}
            for count in itertools.count():
                if not engine.has_work:
                    break
                if count in (4, 7):
                    engine.resize(engine.sizes[count == 4])
                for delta in engine.step():
                    if delta.error is not None:
                        raise delta.error
                    tokens.setdefault(delta.request_id, []).extend(delta.tokens)
                    tops = [[p.logprob, *(x for _, x in p.top)] for p in delta.logprobs]
                    logprobs.setdefault(delta.request_id, []).extend(tops)
        assert not counter.retraced, counter
        assert (engine.resizes, engine.size) == (2, engine.sizes[0])
        store.close()
    for name in tokens:
        found[f"tokens {name}"], found[f"logprobs {name}"] = np.array(tokens[name]), np.array(logprobs[name])


def main(world: str, out: Path) -> None:
    """Writes the results of every mesh."""
    jax.config.update("jax_numpy_rank_promotion", "raise")
    compile_cache.enable(None)
    source, tokenizer = open_model(smollm2_path() if world == "smollm2" else tiny_path("tiny-llama-tied"))
    if world != "smollm2":
        source = RandomSource({"small": SMALL, "unrolled": SMALL, "uint8": UINT8, "smollm2-cut": SMOLLM2_CUT}[world])
    for sizes in WORLDS[world]:
        mesh, found = make_mesh(*sizes), {}
        form = Form.UNROLLED if world == "unrolled" and mesh.size > 1 else None
        base = load_base(source, mesh, dtype="float32", form=form)
        trainer = train(base, mesh, found, "uint8" if world == "uint8" else "float32")
        decode(trainer, tokenizer, found)
        np.savez(out / f"{describe(mesh)}.npz", **found)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
