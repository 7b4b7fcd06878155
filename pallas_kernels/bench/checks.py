"""Compares every op's body on this device with its definition: small shapes, both dtypes, forward and backward.

The definitions run in the same precision of products as the bodies, so that what differs is the body.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bench.cases import OPS, Model, Sizes
from pallas_kernels.rows.op import BLOCKS, FEWEST, logsumexp, rms_norm, row_summary, top_k
from pallas_kernels.sampling.op import Choices, draw, draw_reference

MODEL = Model(d=576, heads=9, kv_heads=3, head=64, ff=1536, vocab=4099)  # numbers that few tiles divide
SIZES = Sizes(rows=16, adapters=5, slots=8, rank=16, lanes=4, tokens=128, context=300)
DEFINITIONS = {  # the form of each op that defines it
    "gathered_lora": "gather",
    "segmented_lora": "ragged_dot",
    "segmented_lora_grad": "ragged_dot",
    "attention": "all scores",
    "attention_grad": "all scores",
    "paged_attention": "gather pages",
    "target_logprob": "all logits",
    "target_logprob_grad": "all logits",
}
# Of the largest number of a result.  bfloat16 has 8 bits, and an op rounds its output and two inner values; float32 sums of
# thousands of terms, in another order, on units that may round products to ten bits.
TOLERANCE = {"bfloat16": 4 * 2**-8, "float32": 2**-10}
DRAWS, DIFFERENT = 4096, 0.002  # rows, and the share of them that may get a neighbour's token, as sums are rounded


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One comparison."""

    op: str
    shape: str
    dtype: str
    error: float  # largest difference, over the largest number of the definition's result
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the body computes what the definition does; not when the difference is NaN."""
        return self.error <= self.limit

    def __str__(self) -> str:
        verdict = "ok" if self.passed else "WRONG"
        return f"{self.op:20} {self.shape:42} {self.dtype:9} {self.error:9.2e} (limit {self.limit:.2e}) {verdict}"


def check(op: str) -> Iterator[Check]:
    """Yields the comparisons of one op of CHECKED, in every dtype and shape."""
    if op == "draw":
        yield Check(
            op=op, shape=f"{DRAWS} rows of 1000 words", dtype="float32", error=_draws_that_differ(), limit=DIFFERENT
        )
        return
    for dtype, limit in TOLERANCE.items():
        found = ROW_OPS[op](dtype) if op in ROW_OPS else _cases(op, dtype)
        for shape, ours, definition in found:
            yield Check(op=op, shape=shape, dtype=dtype, error=_error(ours, definition), limit=limit)


Results = tuple[str, list[np.ndarray], list[np.ndarray]]  # shape of a case, what the body gives, what the definition


def _cases(op: str, dtype: str) -> Iterator[Results]:
    for case in OPS[op](MODEL, dtype, SIZES):
        yield case.shape, _results(*case.forms["ours"]), _results(*case.forms[DEFINITIONS[op]])


def _results(form: Callable, args: tuple) -> list[np.ndarray]:
    with jax.default_matmul_precision("highest"):
        return [np.asarray(x, np.float64) for x in jax.tree.leaves(jax.jit(form)(*args))]


def _error(ours: list[np.ndarray], definition: list[np.ndarray]) -> float:
    """Returns the largest difference of any result, over the largest number of the definition's; NaN where one has a NaN."""
    return float(
        np.max(
            [
                np.abs(got - want).max() / max(np.abs(want).max(), np.finfo(np.float32).tiny)
                for got, want in zip(ours, definition, strict=True)
            ]
        )
    )


def _rows(dtype: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x_TX, weight_X = (jnp.asarray(rng.standard_normal(n), dtype) for n in ((16, 576), (576,)))
    return np.asarray(x_TX), np.asarray(weight_X)


def _norms(dtype: str) -> Iterator[Results]:
    x_TX, weight_X = _rows(dtype)
    exact = x_TX.astype("f8")
    normed = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5) * weight_X.astype("f8")
    yield "16 rows", _results(lambda x, w: rms_norm(x, w, 1e-5), (x_TX, weight_X)), [normed]


def _sums(dtype: str) -> Iterator[Results]:
    if dtype == "float32":  # of logits, which are in no other dtype
        x_TX, _ = _rows(dtype)
        yield "16 rows", _results(logsumexp, (x_TX,)), [np.log(np.exp(x_TX.astype("f8")).sum(-1))]


def _summaries(dtype: str) -> Iterator[Results]:
    if dtype == "float32":
        x_TX, _ = _rows(dtype)
        want = [x_TX.max(-1), x_TX.argmax(-1), np.log(np.exp(x_TX.astype("f8")).sum(-1)), np.ones(len(x_TX))]
        yield "16 rows", _results(row_summary, (x_TX,)), want


def _bests(dtype: str) -> Iterator[Results]:
    if dtype == "float32":
        x_TX = np.random.default_rng(0).standard_normal((16, 16 * BLOCKS[0] * FEWEST), np.float32)
        place_TM = np.argsort(-x_TX, axis=-1, kind="stable")[:, :16]
        yield "16 rows", _results(lambda x: top_k(x, 16), (x_TX,)), [np.take_along_axis(x_TX, place_TM, 1), place_TM]


def _draws_that_differ() -> float:
    """Returns the share of rows whose token is not the definition's."""
    rng = np.random.default_rng(0)
    x_BV = rng.standard_normal((DRAWS, 1000), np.float32)
    filters = {"top_p_B": rng.choice([1.0, 0.9], DRAWS), "min_p_B": rng.choice([0.0, 0.05], DRAWS)}
    choices = Choices(
        temperature_B=jnp.asarray(rng.uniform(0.3, 2, DRAWS), jnp.float32),
        top_k_B=jnp.asarray(rng.choice([0, 1, 40], DRAWS), jnp.int32),
        uniform_B=jnp.asarray(rng.random(DRAWS), jnp.float32),
        **{name: jnp.asarray(x, jnp.float32) for name, x in filters.items()},
    )
    drawn = functools.partial(draw, filtered=True)
    ours, definition = _results(drawn, (x_BV, x_BV.max(axis=1), choices)), _results(draw_reference, (x_BV, choices))
    return float((ours[0] != definition[0]).mean())


ROW_OPS = {"rms_norm": _norms, "logsumexp": _sums, "row_summary": _summaries, "top_k": _bests}
CHECKED = (*DEFINITIONS, *ROW_OPS, "draw")
