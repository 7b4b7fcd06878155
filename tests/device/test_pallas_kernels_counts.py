"""Work follows adapters and wanted tokens, not slots: counted, in a run where every fetch and every product is seen.

Loops run turn by turn in Python.  The XLA body reads rows with `dynamic_slice`, visit by visit.  Of the Pallas body every
copy of a tile of rows is counted as it starts.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_checks import floats

from pallas_kernels import dispatch, tiling_tpu
from pallas_kernels.cross_entropy import pallas_tpu as cross_entropy_tpu
from pallas_kernels.cross_entropy.op import target_logprob
from pallas_kernels.gathered_lora import op as gathered_lora
from pallas_kernels.gathered_lora import pallas_tpu as gathered_lora_tpu
from pallas_kernels.gathered_lora import xla_cpu as gathered_lora_xla
from pallas_kernels.gathered_lora.op import visits_by_slot
from pallas_kernels.gathered_lora.pool_rows import of_slots
from pallas_kernels.gathered_lora.rank_classes import ROW_TILE
from pallas_kernels.gathered_lora.xla_cpu import COLUMNS, FEWEST

L, R, X, Y, LAYER = 2, 2, 6, 4, 1
SLOTS = [8, 64, 512]
by_slots = pytest.mark.parametrize("slots", [pytest.param(n, marks=() if n == 64 else pytest.mark.slow) for n in SLOTS])


def case(slots: int, tokens: int = 12, features: int = X):
    """Arguments of the op: adapters out of all slots, several tokens of some, base tokens between."""
    rng = np.random.default_rng(slots)
    few = rng.choice(slots, 5, replace=False)
    slot_T = np.append(few, [-1, slots - 1, -1, *few[:2], -1, few[0]]).astype(np.int32)[:tokens]
    rows = of_slots(floats(rng, L, slots, R, features), floats(rng, L, slots, R, Y), floats(rng, L, slots))
    rows = [replace(rows, rank_S=rng.integers(0, R + 1, slots).astype(np.int32))]
    return floats(rng, tokens, features), rows, jnp.int32(LAYER), rng.permutation(slot_T)


def run(args):
    with jax.disable_jit():
        return gathered_lora.gathered_lora(*args)


def expected(slot_T) -> tuple[set, int]:
    active = [int(s) for s in slot_T if s >= 0]
    assert len(set(active)) < len(active) < len(slot_T)
    return {(LAYER, s) for s in active}, len(active)


@pytest.mark.parametrize(
    "features", [X, pytest.param(FEWEST * COLUMNS, marks=pytest.mark.slow)], ids=["one product", "blocks"]
)
@by_slots
def test_xla_reads_the_rows_of_active_tokens_only(slots, features, monkeypatch):
    """Once for every two tokens of an adapter; nobody else's are touched, base tokens read none."""
    args = case(slots, features=features)
    real, read = gathered_lora_xla._slice, []

    def dynamic_slice(operand, start, sizes):
        if operand.shape[:2] == (L, slots * R):  # the scratch has as many axes
            read.append((operand.shape[-1], (int(start[0]), int(start[1]) // R), sizes[1] * sizes[2]))
        return real(operand, start, sizes)

    monkeypatch.setattr(gathered_lora_xla, "_slice", dynamic_slice)
    run(args)
    adapters, _ = expected(args[3])
    visits = sum(-(-np.sum(args[3] == s) // 2) for _, s in adapters)
    for half in (features, Y):
        assert {place for size, place, _ in read if size == half} == adapters
        assert sum(numbers for size, _, numbers in read if size == half) == visits * R * half


@pytest.mark.parametrize("tokens", [1, 6], ids=["decode", "prompts"])
@by_slots
def test_pallas_copies_each_adapters_true_rank_once(slots, tokens, monkeypatch):
    """Whatever its lanes and the rows of its slot; none of a target that it lacks.  Visits are tiles of tokens."""
    rank = 5 * ROW_TILE
    rng = np.random.default_rng(slots)
    few = rng.choice(slots, 5, replace=False)
    slot_T = rng.permutation(np.append(few, [-1, *few[:2].repeat(12), *few[2:].repeat(3), -1])).astype(np.int32)
    rank_S = rng.integers(0, rank + 1, (2, slots)).astype(np.int32)
    rank_S[0, few[0]] = 0
    rows = [
        replace(
            of_slots(floats(rng, L, slots, rank, X), floats(rng, L, slots, rank, Y), floats(rng, L, slots)), rank_S=own
        )
        for own in rank_S
    ]
    copied, real = [], gathered_lora_tpu.pltpu.make_async_copy

    class Copy:
        def __init__(self, source, *rest):
            self.copy = real(source, *rest)
            assert source.shape[-2] == ROW_TILE
            self.wait = self.copy.wait

        def start(self):
            jax.debug.callback(lambda: copied.append(ROW_TILE))
            self.copy.start()

    monkeypatch.setattr(gathered_lora_tpu.pltpu, "make_async_copy", Copy)
    x = floats(rng, len(slot_T) * tokens, X)
    with dispatch.interpreted():
        got = jax.jit(gathered_lora.gathered_lora)(x, rows, jnp.int32(LAYER), slot_T)
    jax.block_until_ready(got)
    jax.effects_barrier()
    distinct = sorted({int(s) for s in slot_T if s >= 0})
    tiles = sum(-(-int(own[s]) // ROW_TILE) for own in rank_S for s in distinct)
    assert sum(copied) == 2 * tiles * ROW_TILE  # of A and of B
    assert not np.asarray(got[0])[np.repeat(slot_T == few[0], tokens)].any()
    visits = visits_by_slot(jnp.asarray(slot_T))
    order = visits.order_G, visits.slot_G, visits.count_1[0]
    if tokens == 1:
        found = gathered_lora_tpu.visits_of(order)
        assert int(found.count) <= -(-len(slot_T) // gathered_lora_tpu.TOKENS) + len(distinct)
    else:
        found = gathered_lora_tpu.visits_of_lanes(order, 3, 2)
        visited = sorted(found.place_V[: int(found.count)].tolist())
        assert visited == [6 * lane + place for lane in np.flatnonzero(slot_T >= 0) for place in (0, 2, 4)]
    assert sorted(set(found.slot_V[: int(found.count)].tolist())) == distinct


@pytest.mark.parametrize("features", [X, FEWEST * COLUMNS], ids=["one product", "blocks"])
@by_slots
def test_no_result_of_the_decode_program_has_a_slot_axis(slots, features):
    """On the CPU: rows are cut out of the pool, which is a parameter and stays one."""
    args = case(slots, features=features)
    text = jax.jit(gathered_lora.gathered_lora).lower(*args).compile().as_text()
    hands_on = ("parameter(", "get-tuple-element(", "tuple(", "while(", "conditional(", "call(", "bitcast(")
    whole = (f"[{L},{slots * R // ROW_TILE},{ROW_TILE},", f"[{L},{slots * R},")  # in tiles, and without
    made = [line for line in text.splitlines() if any(x in line.partition(" = ")[2].partition("(")[0] for x in whole)]
    assert [line for line in made if not any(f" {op}" in line for op in hands_on)] == []
    assert made  # the pool itself is seen


def test_visits_are_by_slot_and_skip_the_base():
    visits = visits_by_slot(jnp.array([3, -1, 0, 3, -1, 1], jnp.int32))
    assert visits.order_G.tolist() == [2, 5, 0, 3, 1, 4]
    assert visits.slot_G.tolist() == [0, 1, 3, 3, -1, -1]
    assert visits.count_1.tolist() == [4]


@pytest.mark.parametrize(
    ("counts", "trips"),
    [
        ((0, 0), 0),
        ((17, 2), 2),
        *(pytest.param(*n, marks=pytest.mark.slow) for n in (((1, 0), 1), ((3, 16), 1), ((40, 40), 3))),
    ],
)
def test_pallas_multiplies_by_the_head_for_wanted_tokens_only(counts, trips, monkeypatch):
    """As many trips of 16 tokens of each lane as the lane with the most targets needs, forward and backward."""
    lanes, tokens, features, words = len(counts), 40, 8, 20
    rng = np.random.default_rng(0)
    wanted = np.stack([rng.permutation(tokens) < count for count in counts])
    seen = []

    def counted(name):
        real = getattr(cross_entropy_tpu, name)
        monkeypatch.setattr(cross_entropy_tpu, name, lambda *args: (seen.append((name, args[2].shape)), real(*args))[1])

    monkeypatch.setitem(tiling_tpu.TABLE, "any TPU", tiling_tpu.Blocks(vmem_bytes=16 * 2**20, tokens=32))
    for name in ("_forward_trip", "_backward_trip"):
        counted(name)
    x, head = floats(rng, lanes, tokens, features), floats(rng, features, words)
    target = rng.integers(0, words, (lanes, tokens, 1), dtype=np.int32)

    def loss(x):
        return target_logprob(x, head, head.T, target, wanted, None, chunk=8, tied=False)[0].sum()

    with jax.disable_jit(), dispatch.interpreted():
        jax.grad(loss)(x)
    rows = (lanes * 16, features)
    assert seen == [("_forward_trip", rows)] * trips + [("_backward_trip", rows)] * trips
