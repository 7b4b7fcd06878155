"""What a server and a training run take: bytes of weights, slots, KV pages and of a step's arrays.  Pure host code: no jax.

Shape letters: L layers, R LoRA rank, X Y features in, out, J tokens of a lane, V vocabulary, D model, F MLP.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxlora.config.serving import (
    SizedConfig,
    SizedTraining,
)
from jaxlora.config.training import SizedTrainConfig
from jaxlora.core.host_memory import MemoryLimit
from jaxlora.core.lora import ALL_TARGETS, HEAD_TARGET
from jaxlora.core.model_config import LINEARS, ModelConfig, layer_count, parameters
from jaxlora.model.base_form import Form
from pallas_kernels.gathered_lora.rank_classes import ROW_TILE, RankClasses, tile_count

GB = 1e9
ITEMSIZE = {"float32": 4, "bfloat16": 2}

# ---- what was measured: Python, JAX and XLA with all programs compiled, without a base's arrays -------------------
PROCESS_BYTES = 700 * 10**6
SIZE_BYTES = 80 * 10**6  # the programs of each further number of slots
READER_BYTES = 95 * 10**6  # a process that reads training files, before it reads one
READERS = 2
PACKED_PART = 32  # of which packed features are a whole multiple, those in of 8 bits of twice that: product/op.py's
LOGIT_COPIES, SCORED_COPIES, HEAD_COPIES = 6, 4, 2  # of logits in float32: sampled rows, scored tiles, tiles of a loss
SCORED_BYTES = 2**26  # a tile at most, as in serve/engine/step.py
PART_KEYS, PROMPT_PART_KEYS = 1024, 8192  # that a GPU attends to in a part, in decode and prompts: tiling_cuda.py's
HEAD_TARGETS = 32  # targets of a tile of the loss
LANE_ROWS = 3  # a training lane's own rows: as they are, their gradients, and in work
MOMENT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "uint8": 1.04}  # of one number; blocks of uint8 have a scale each


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Where a base is to run."""

    platform: str  # cpu, or an accelerator's
    cores: int
    device: MemoryLimit  # of one device; on a CPU of the whole process
    host: MemoryLimit | None  # of the process, where devices have a memory of their own
    devices: int  # of the mesh
    parts: Mapping[str, int]  # logical axis → devices that split it, as model/mesh.py has it
    rows: int  # devices that split the rows of a batch
    form: Form = Form.STACKED  # of a base's layers that are not quantized


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseShape:
    """What of a base decides how much memory it takes."""

    config: ModelConfig
    dtype: str  # float32 or bfloat16, of weights, activations and serving slots
    kv_dtype: str
    quantized: bool = False  # linears and head have 8 bits, on one CPU device
    name: str  # for a reader

    def weights_bytes(self, machine: Machine) -> int:
        """Returns the bytes of all arrays on one device, the second head that a CPU keeps of a tied base included."""
        table = {name: (p.shape, p.axes) for name, p in parameters(self.config).items()}
        if self.config.tied and machine.platform == "cpu":
            table["head"] = (self.config.d_model, self.config.vocab), ("embed", "vocab")
        if self.config.tied and self.quantized:
            del table["embed"]  # they are the head's
        return sum(self._stored_bytes(name, *of, machine) for name, of in table.items())

    def _stored_bytes(self, name: str, shape: Sequence[int], axes: Sequence[str | None], machine: Machine) -> int:
        """Returns the bytes on one device of an array as it is stored, with what packing fills up."""
        if name not in LINEARS or not (machine.form is Form.PACKED or self.quantized):
            return _part(shape, axes, machine) * ITEMSIZE[self.dtype]
        depth = PACKED_PART * (1 + self.quantized)
        X, Y = -(-shape[-2] // depth) * depth, -(-shape[-1] // PACKED_PART) * PACKED_PART
        return math.prod(shape[:-2]) * Y * (X + 4 if self.quantized else X * ITEMSIZE[self.dtype])

    def unpacked_bytes(self, machine: Machine) -> int:
        """Returns the bytes of the transposed head, which training unpacks unless it is there as embeddings."""
        unpacks = self.quantized or (machine.form is Form.PACKED and not self.config.tied)
        return unpacks * self.config.d_model * self.config.vocab * ITEMSIZE[self.dtype]

    def rank_bytes(self, machine: Machine, targets: Sequence[str] = ALL_TARGETS, itemsize: int = 4) -> int:
        """Returns the bytes on one device of one rank row of an adapter of these targets: A and B of all layers."""
        total = 0
        for target in targets:
            if target == HEAD_TARGET:
                L, (x, y), axes = 1, (self.config.d_model, self.config.vocab), ("embed", "vocab")
            else:
                p = parameters(self.config)[target]
                (L, x, y), axes = p.shape, p.axes[1:]
            total += L * sum(_part((n,), (axis,), machine) for n, axis in zip((x, y), axes, strict=True))
        return total * itemsize

    def token_bytes(self, machine: Machine) -> int:
        """Returns the bytes on one device of one token's keys and values."""
        kv = _part((self.config.kv_heads * self.config.head_dim,), ("kv_heads",), machine)
        return 2 * self.config.layers * kv * ITEMSIZE[self.kv_dtype]


def _part(shape: Sequence[int], axes: Sequence[str | None], machine: Machine) -> int:
    """Returns the elements of an array that one device holds."""
    split = math.prod(machine.parts.get(axis, 1) for axis in axes if axis is not None)
    return -(-math.prod(shape) // split)


# ---- what each thing takes --------------------------------------------------------------------------------------------

type Needs = dict[str, int]  # what → bytes of one device


def serving_needs(config: SizedConfig, base: BaseShape, machine: Machine) -> Needs:
    """Returns what a server of these sizes takes: of one device, and on a CPU of the host as well."""
    needs = {
        "weights": base.weights_bytes(machine),
        "slots": pool_bytes(config.rank_classes, base, machine),
        "KV": config.kv_pages * config.page_tokens * base.token_bytes(machine),
        "steps": step_bytes(config, base, machine),
    }
    if config.training is not None:
        needs["training"] = live_training_bytes(config.training, base, machine)
    return needs | (host_needs(config) if machine.host is None else {})


def pool_bytes(classes: RankClasses, base: BaseShape, machine: Machine) -> int:
    """Returns the bytes on one device of serving slots: rank rows in whole tiles, scales and ranks."""
    tables = 4 * sum(layer_count(base.config, target) + 1 for target in ALL_TARGETS)
    rows = tile_count(classes) * ROW_TILE * base.rank_bytes(machine, itemsize=ITEMSIZE[base.dtype])
    return rows + sum(slots for slots, _ in classes) * tables


def host_needs(config: SizedConfig) -> Needs:
    """Returns what a server takes of the host besides what a CPU computes with."""
    caches = config.host_adapters_gb + config.host_kv_gb + config.host_states_gb
    readers = READERS * READER_BYTES + (config.limits.read_memory_bytes or 0)  # two large files at once are rare
    process = PROCESS_BYTES + SIZE_BYTES * max(len(config.slot_sizes) - 1, 0)
    return {"caches": round(caches * GB), "readers": readers, "process": process}


def step_bytes(config: SizedConfig, base: BaseShape, machine: Machine) -> int:
    """Returns the bytes of the arrays that a decode step and a prefill step hold for a moment."""
    rows, lanes = -(-config.rows // machine.rows), -(-config.prefill_lanes // machine.rows)
    joined = attention_bytes(rows, PART_KEYS, base, machine)
    joined += attention_bytes(lanes * config.prefill_tokens, PROMPT_PART_KEYS, base, machine)
    return decode_bytes(rows, base, machine) + prefill_bytes(lanes, config.prefill_tokens, base, machine) + joined


def decode_bytes(rows: int, base: BaseShape, machine: Machine) -> int:
    """Returns the bytes of a decode step's arrays: logits, and a layer's weights in another layout where they are stacked."""
    table = parameters(base.config).values()
    layer = sum(_part(p.shape[1:], p.axes[1:], machine) for p in table if p.axes[0] == "layers")
    copied = 0 if machine.form is Form.UNROLLED else 4 * layer
    return LOGIT_COPIES * 4 * rows * _part((base.config.vocab,), ("vocab",), machine) + copied


def prefill_bytes(lanes: int, tokens: int, base: BaseShape, machine: Machine) -> int:
    """Returns the bytes of a prefill step's arrays, a tile of scored prompt tokens the largest."""
    vocab = _part((base.config.vocab,), ("vocab",), machine)
    tile = max(min(SCORED_BYTES, 4 * lanes * tokens * vocab), 4 * lanes * vocab)
    return LOGIT_COPIES * 4 * lanes * vocab + lanes * tokens * token_work(base, machine) + SCORED_COPIES * tile


def attention_bytes(tokens: int, part_keys: int, base: BaseShape, machine: Machine) -> int:
    """Returns the bytes of what a GPU's attention joins: a float32 output and log-sum of each part of the whole context."""
    parts = -(-base.config.context // part_keys)
    of_token = 4 * parts * _part((base.config.heads,), ("heads",), machine) * (base.config.head_dim + 1)
    return tokens * of_token if machine.platform == "gpu" and parts > 1 else 0


def token_work(base: BaseShape, machine: Machine) -> int:
    """Returns the bytes that one token of a layer's forward pass holds, most of them of the MLP in float32."""
    model = base.config
    wide = 3 * _part((model.d_ff,), ("mlp",), machine) + 3 * _part((model.heads * model.head_dim,), ("heads",), machine)
    return 4 * (wide + 4 * model.d_model)


def kept_bytes(base: BaseShape, machine: Machine, remat: str) -> int:
    """Returns the bytes that one token keeps of all layers for the backward pass, by `remat`."""
    model = base.config
    attn, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    kept = {
        "nothing": model.d_model,
        "products": 3 * model.d_model + 2 * attn + 2 * kv + 2 * model.d_ff,
        "everything": 8 * model.d_model + 6 * attn + 4 * kv + 8 * model.d_ff,
    }[remat]
    return model.layers * kept * ITEMSIZE[base.dtype]


def slot_bytes(base: BaseShape, machine: Machine, rank: int, targets: Sequence[str], moment_bytes: float) -> int:
    """Returns the bytes of one training slot: weights, open gradients and two moments."""
    return round(rank * base.rank_bytes(machine, targets, itemsize=1) * (4 + 4 + 2 * moment_bytes))


def live_training_bytes(training: SizedTraining, base: BaseShape, machine: Machine) -> int:
    """Returns the bytes of training slots and of a step in parts, whose passes take a lane of each group of devices."""
    copies = training.slots + 1  # one leaves its slot, for a checkpoint or another job's turn
    slots = copies * slot_bytes(base, machine, training.max_rank, ALL_TARGETS, 4)
    rows = training.max_rank * base.rank_bytes(machine)  # of one lane, beside the slots
    kept = training.longest_tokens * kept_bytes(base, machine, "products")
    lanes = -(-training.lanes // machine.rows)
    head = HEAD_COPIES * 4 * min(HEAD_TARGETS, training.lane_tokens) * _part((base.config.vocab,), ("vocab",), machine)
    evaluated = max(lanes * training.lane_tokens, training.longest_tokens) * token_work(base, machine)
    return slots + LANE_ROWS * rows + kept + lanes * head + evaluated + base.unpacked_bytes(machine)


def training_needs(config: SizedTrainConfig, targets: Sequence[str], base: BaseShape, machine: Machine) -> Needs:
    """Returns what a training run of these sizes takes, whose step is one program: of its lanes those of one pass."""
    slots = sum(
        n * slot_bytes(base, machine, rank, targets, MOMENT_BYTES[config.moments]) for rank, n in config.buckets
    )
    lanes = -(-config.lanes // (machine.rows * config.passes))
    rows = config.max_rank * base.rank_bytes(machine, targets)
    vocab = _part((base.config.vocab,), ("vocab",), machine)
    head = HEAD_COPIES * 4 * min(HEAD_TARGETS, config.lane_tokens) * vocab
    lane = config.lane_tokens * kept_bytes(base, machine, config.remat) + rows + head
    work = lanes * config.lane_tokens * token_work(base, machine)
    needs = {
        "weights": base.weights_bytes(machine),
        "slots": slots,
        "lanes": lanes * lane + work + base.unpacked_bytes(machine),
    }
    return needs | ({"process": PROCESS_BYTES} if machine.host is None else {})
