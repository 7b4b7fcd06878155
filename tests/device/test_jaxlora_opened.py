"""Opening a base as a file's [model] says."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from model_world import NoLora
from small_world import tiny_path

from jaxlora.checkpoints import load as opened
from jaxlora.checkpoints.load import open_base
from jaxlora.config.base import ONE_DEVICE, ModelSection
from jaxlora.model.decoder import TokenBatch, forward
from pallas_kernels.dispatch import traced_for


@pytest.mark.parametrize(
    ("dtype", "precision", "used"),
    [
        ("float32", "auto", "highest"),
        ("bfloat16", "auto", "default"),
        ("float32", "default", "default"),
        ("bfloat16", "highest", "highest"),
    ],
)
def test_dtype_and_precision_of_products_are_settings(dtype, precision, used):
    """Read off the forward pass as traced for a TPU, whose products are XLA's: every one has the precision."""
    model = ModelSection(path=str(tiny_path("tiny-llama-tied")), dtype=dtype, precision=precision)
    base = open_base(model, ONE_DEVICE).base
    assert base.dtype == dtype
    four = jnp.arange(4, dtype=jnp.int32)
    batch = TokenBatch(token_T=four, position_T=four, segment_T=jnp.ones_like(four), slot_T=-jnp.ones_like(four))
    with traced_for("tpu"):
        jaxpr = jax.make_jaxpr(lambda b: forward(b, batch, NoLora(), lambda _, q, k, v, cache: (q, cache), ()))(base)
    products = str(jaxpr).split("dot_general[")[1:]
    assert len(products) == 7
    wanted = {"highest": "Precision.HIGHEST", "default": "Precision.DEFAULT"}[used]
    assert all(f"precision=({wanted}, {wanted})" in product[:300] for product in products)


@pytest.mark.parametrize(
    ("bfloat16_s", "chosen"), [(0.5, "bfloat16"), (0.74, "bfloat16"), (0.9, "float32"), (1.4, "float32")]
)
def test_auto_is_bfloat16_only_where_it_is_clearly_faster(bfloat16_s, chosen, monkeypatch):
    """Times that lie close together would choose by chance, one way today and the other after a restart."""
    monkeypatch.setattr(opened, "_product_s", {"bfloat16": bfloat16_s, "float32": 1.0}.__getitem__)
    model = ModelSection(path=str(tiny_path("tiny-llama-tied")), dtype="auto")
    assert open_base(model, ONE_DEVICE).base.dtype == chosen


def test_the_products_that_auto_compares_take_time():
    assert all(0 < opened._product_s(dtype) < 1 for dtype in ("float32", "bfloat16"))
