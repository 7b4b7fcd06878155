"""TPU body of `packed_attention`: JAX's splash attention, lane by lane, with our segments and window.

It takes whole blocks of 128 tokens, so a lane is padded.  It masks scores by selection, as we do, and skips the blocks
outside every token's causal past and window; it skips none for segments.  Its backward pass gets what our
own forward pass saved, which its public functions do not offer: `_splash_attention_bwd` is its gradient rule.

Shape letters: G lanes, J tokens of a lane, N query heads, K kv heads, M queries per kv head, H head.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from pallas_kernels.loops import filled
from pallas_kernels.tiling_tpu import LANES, blocks


def forward(
    q_GJNH: jax.Array,
    k_GJKH: jax.Array,
    v_GJKH: jax.Array,
    segment_GJ: jax.Array,
    *,
    window: int | None,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """Returns ([G, J, N, H] in q's dtype, float32 log-sums [G, K, M, J]); padding rows are undefined numbers."""
    G, J, N, _ = q_GJNH.shape
    K = k_GJKH.shape[2]
    kernel = _kernel(J, N, window, interpret, keep=True)
    with _precision(q_GJNH):
        out, (lse_GNJ,) = jax.vmap(kernel)(_scaled(q_GJNH), *map(_by_head, (k_GJKH, v_GJKH)), _segments(segment_GJ))
    return _by_token(out, J), lse_GNJ[..., :J].reshape(G, K, N // K, J)


def backward(
    q_GJNH: jax.Array,
    k_GJKH: jax.Array,
    v_GJKH: jax.Array,
    segment_GJ: jax.Array,
    out_GJNH: jax.Array,
    lse_GKMJ: jax.Array,
    d_GJNH: jax.Array,
    *,
    window: int | None,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the gradients of q, k and v in their dtypes."""
    G, J, N, H = q_GJNH.shape
    kernel = _kernel(J, N, window, interpret, keep=False)
    lse_GNJ = filled(lse_GKMJ.reshape(G, N, J), LANES, axis=2)

    def lane(q_NJH, k_KJH, v_KJH, segment, out_NJH, lse_NJ, d_NJH) -> tuple[jax.Array, ...]:
        kept = (q_NJH, k_KJH, v_KJH, segment, None, out_NJH, lse_NJ, kernel.dq_mask_info, kernel.dkv_mask_info)
        options = {k: v for k, v in kernel.kwargs.items() if k != "save_residuals"}
        return splash._splash_attention_bwd(save_residuals=False, **options, res=kept, do=d_NJH)[3:6]

    with _precision(q_GJNH):
        dq, dk, dv = jax.vmap(lane)(
            _scaled(q_GJNH),
            *map(_by_head, (k_GJKH, v_GJKH)),
            _segments(segment_GJ),
            _by_head(out_GJNH),
            lse_GNJ,
            _by_head(d_GJNH),
        )
    dq_GJNH = (_by_token(dq, J).astype(jnp.float32) * H**-0.5).astype(q_GJNH.dtype)
    return dq_GJNH, _by_token(dk, J).astype(k_GJKH.dtype), _by_token(dv, J).astype(v_GJKH.dtype)


def _kernel(J: int, N: int, window: int | None, interpret: bool, *, keep: bool) -> splash.SplashAttentionKernel:
    """Builds the splash kernel.  keep: returns the log-sums too."""
    J = math.ceil(J / LANES) * LANES
    mask = masks.CausalMask((J, J)) if window is None else masks.LocalMask((J, J), (window - 1, 0), 0)
    most = max(blocks().tokens, LANES)
    n = max(size for size in range(LANES, J + 1, LANES) if J % size == 0 and size <= most)
    sizes = splash.BlockSizes(block_q=n, block_kv=n, block_q_dkv=n, block_kv_dkv=n, block_q_dq=n, block_kv_dq=n)
    return splash.make_splash_mha(
        masks.MultiHeadMask([mask] * N),
        block_sizes=sizes,
        save_residuals=keep,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )


def _precision(q: jax.Array):
    """Returns the precision of the products: exact for float32, bfloat16 products with float32 sums."""
    return jax.default_matmul_precision("highest" if q.dtype == jnp.float32 else "default")


def _segments(segment_GJ: jax.Array) -> splash.SegmentIds:
    whole_GJ = filled(segment_GJ, LANES, axis=1)
    return splash.SegmentIds(q=whole_GJ, kv=whole_GJ)


def _by_head(x_GJNH: jax.Array) -> jax.Array:
    return filled(x_GJNH, LANES, axis=1).transpose(0, 2, 1, 3)


def _scaled(q_GJNH: jax.Array) -> jax.Array:
    return _by_head((q_GJNH.astype(jnp.float32) * q_GJNH.shape[3] ** -0.5).astype(q_GJNH.dtype))


def _by_token(x_GNJH: jax.Array, J: int) -> jax.Array:
    return x_GNJH[:, :, :J].transpose(0, 2, 1, 3)
