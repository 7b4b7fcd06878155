"""The decoder of Llama, Mistral, Qwen2 and Qwen3, which differ in a few booleans; the only module with Flax NNX.

`forward` is the one forward pass: training, prefill and decode pass in their own attention and LoRA.

Shape letters: T tokens, D model, F MLP, N query heads, K kv heads, H head, L layers, V vocabulary, G lanes, J tokens
of a lane, X Y features in, out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from jaxlora.core.errors import ConfigInvalid, ModelInvalid
from jaxlora.core.model_config import LINEARS, ModelConfig, parameters
from jaxlora.model.base_form import JOINED, JOINED_BY_TARGETS, Form, form_of, layer_arrays, places
from jaxlora.model.mesh import check_model, place_array, replicated, sharding
from pallas_kernels import KEPT
from pallas_kernels.native.library import instruction_set
from pallas_kernels.product.op import BLOCK, Packed, outputs, pack, packed_shape, plain_back, product
from pallas_kernels.rows import op as rows

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
ALIGNMENT = 64  # bytes; of the arrays that XLA's CPU client takes over
# What the forward pass saves of a layer for the backward pass, which recomputes the rest.  From most memory to least.
REMAT = {
    "everything": jax.checkpoint_policies.everything_saveable,
    "products": jax.checkpoint_policies.save_only_these_names(KEPT),  # outputs of GEMMs and attention
    "nothing": jax.checkpoint_policies.nothing_saveable,  # only the layer's input
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Packed tokens of many tenants, the input of training and serving alike.

    Tokens are ordered by lane: T = G * J, every token of a lane has the lane's slot.  In a decode step J is 1.
    """

    token_T: jax.Array  # int32 vocabulary ids
    position_T: jax.Array  # int32 place in its sequence; -1 is padding when serving
    segment_T: jax.Array  # int32 sequence within the lane, from 1; 0 is padding
    slot_T: jax.Array  # int32 which adapter; NO_ADAPTER is the base model


class Lora[Layer](Protocol):
    """Computes adapted linears.  `per_layer` is scanned over layers together with the weights."""

    @property
    def per_layer(self) -> Layer:
        """Returns a pytree with a leading axis of layers."""
        ...

    def deltas(self, layer: Layer, targets: tuple[str, ...], x_TX: jax.Array) -> tuple[jax.Array | None, ...]:
        """Returns each target's delta, [T, Y]; None where no adapter of this pool has the target.

        Where devices split the features of x it may be each device's part, [parts, T, Y], in the order of the devices.
        """
        ...


def sum_with_parts(x_TX: jax.Array, weight_XY: jax.Array, delta_PTY: jax.Array) -> jax.Array:
    """Returns x @ weight + the sum of P parts, [T, Y], each device's part added before the one sum over devices."""
    P, T, Y = delta_PTY.shape
    y_PTY = jnp.einsum("tpx,pxy->pty", x_TX.reshape(T, P, -1), weight_XY.reshape(P, -1, Y))
    # In the dtype of activations, as the compiler sums a product over devices.
    return lax.reduce(y_PTY + delta_PTY.astype(y_PTY.dtype), jnp.zeros((), y_PTY.dtype), lax.add, (0,))


class Attend[Cache](Protocol):
    """Attends over the new tokens and whatever the cache holds; returns the cache with the new keys and values."""

    def __call__(
        self, layer: jax.Array, q_TNH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]: ...


class Block(nnx.Module):
    """Weights of one layer but for packed ones."""

    # Set by name from the arrays, as the linears are; a family without a bias or a norm lacks the attribute.
    attn_norm: nnx.Param
    mlp_norm: nnx.Param
    q_bias: nnx.Param
    k_bias: nnx.Param
    v_bias: nnx.Param
    q_norm: nnx.Param
    k_norm: nnx.Param

    def __init__(self, arrays: Mapping[str, jax.Array]):
        for name, value in arrays.items():
            setattr(self, name, nnx.Param(value))

    def __call__[Cache, Layer](
        self,
        config: ModelConfig,
        packed: Mapping[str, Packed],
        layer: jax.Array,
        x_TD: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        lora: Lora[Layer],
        lora_layer: Layer,
        attend: Attend[Cache],
        cache: Cache,
    ) -> tuple[jax.Array, Cache]:
        """Returns the residual stream after this layer, and the cache."""
        c, T = config, x_TD.shape[0]

        def linears(x_TX: jax.Array, *targets: str) -> list[jax.Array]:
            deltas = lora.deltas(lora_layer, targets, x_TX)
            first = deltas[0]
            if first is not None and first.ndim == 3:  # o_proj or down_proj, alone
                return [sum_with_parts(x_TX, getattr(self, targets[0])[...], first)]
            if packed:
                out = product(x_TX, [packed[target] for target in targets], layer)
            else:
                out = self.products(config, x_TX, targets)
            return [y if d is None else y + d.astype(y.dtype) for y, d in zip(out, deltas, strict=True)]

        h_TD = rms_norm(x_TD, self.attn_norm[...], c.norm_eps)
        q, k, v = linears(h_TD, "q_proj", "k_proj", "v_proj")
        if c.qkv_bias:
            q, k, v = q + self.q_bias[...][None], k + self.k_bias[...][None], v + self.v_bias[...][None]
        q, k = q.reshape(T, c.heads, c.head_dim), k.reshape(T, c.kv_heads, c.head_dim)
        if c.qk_norm:
            q, k = rms_norm(q, self.q_norm[...], c.norm_eps), rms_norm(k, self.k_norm[...], c.norm_eps)
        q, k, v = (checkpoint_name(y, KEPT) for y in (rotate(q, rope), rotate(k, rope), v))
        out_TNH, cache = attend(layer, q, k, v.reshape(T, c.kv_heads, c.head_dim), cache)
        (o_TD,) = linears(out_TNH.reshape(T, -1), "o_proj")
        x_TD = checkpoint_name(x_TD + o_TD, KEPT)
        h_TD = rms_norm(x_TD, self.mlp_norm[...], c.norm_eps)
        gate_TF, up_TF = (checkpoint_name(y, KEPT) for y in linears(h_TD, "gate_proj", "up_proj"))
        act_TF = jax.nn.silu(gate_TF.astype(jnp.float32)) * up_TF.astype(jnp.float32)
        (down_TD,) = linears(act_TF.astype(x_TD.dtype), "down_proj")
        return x_TD + down_TD, cache

    def products(self, config: ModelConfig, x_TX: jax.Array, targets: tuple[str, ...]) -> list[jax.Array]:
        """Returns the base's [T, Y] of each target: of weights of their own, or of the array that joins them."""
        joined = JOINED_BY_TARGETS.get(targets)
        if joined is None or not hasattr(self, joined):
            return [x_TX @ getattr(self, target)[...] for target in targets]
        y_TPY = jnp.einsum("TX,XPY->TPY", x_TX, getattr(self, joined)[...])
        return [y_TPY[:, *place].reshape(x_TX.shape[0], -1) for _, place in places(config, joined)]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Base:
    """The frozen base model: device arrays by the names of `parameters`, and their configuration.

    Its form (`base_form.Form`) shows in `packed` and `layers`.  A base of 8 bits has them in its linears and its head, and in
    its embeddings where they are the head.
    """

    arrays: dict[str, jax.Array]  # those outside of layers
    # Stacked, [L, ...], or a mapping for each layer, of the names in `base_form.layer_arrays`.
    layers: dict[str, jax.Array] | tuple[dict[str, jax.Array], ...]
    packed: dict[str, Packed] = field(default_factory=dict)  # all linears and the head, or none: then they are above
    config: ModelConfig = jax.tree.static()
    precision: str = jax.tree.static()  # of matrix products: default, high or highest
    mesh: Mesh = jax.tree.static()  # the mesh the arrays are placed on

    @property
    def dtype(self) -> jnp.dtype:
        """Returns the dtype of activations, KV and what is not in 8 bits."""
        return self.arrays["norm"].dtype

    def only(self, first: int, count: int) -> Base:
        """Returns the base for a program over these layers: its arrays are theirs alone, or those of all layers stacked.

        The program takes the numbers of its layers as data, so it is the same for any of them.
        """
        if isinstance(self.layers, dict):
            return self
        return replace(self, layers=self.layers[first : first + count])


def forward[Cache, Layer](
    base: Base,
    batch: TokenBatch,
    lora: Lora[Layer],
    attend: Attend[Cache],
    cache: Cache,
    *,
    remat: str = "products",
) -> tuple[jax.Array, Cache]:
    """Runs the one forward pass of the project: returns (hidden [T, D] after the final norm, cache).

    remat: one of REMAT; it changes what a gradient saves, and nothing without a gradient.
    """
    with jax.default_matmul_precision(base.precision):
        x_TD, cache = _through_layers(base, batch, embedded(base, batch), lora, attend, cache, remat, None)
    return final_norm(base, x_TD), cache


def embedded(base: Base, batch: TokenBatch) -> jax.Array:
    """Returns the input of the first layer, [T, D]."""
    if "embed" not in base.arrays:
        return outputs(base.packed["head"], batch.token_T, base.dtype)
    return base.arrays["embed"][batch.token_T]


def forward_some[Cache, Layer](
    base: Base,
    batch: TokenBatch,
    x_TD: jax.Array,
    lora: Lora[Layer],
    attend: Attend[Cache],
    cache: Cache,
    *,
    some_L: jax.Array,
    remat: str,
) -> tuple[jax.Array, Cache]:
    """Runs `forward` through the layers of these numbers only: returns (the input of the next layer, cache).

    `lora.per_layer` holds these layers only, base is `Base.only` of them.
    """
    with jax.default_matmul_precision(base.precision):
        return _through_layers(base, batch, x_TD, lora, attend, cache, remat, some_L)


def _through_layers[Cache, Layer](
    base: Base,
    batch: TokenBatch,
    x_TD: jax.Array,
    lora: Lora[Layer],
    attend: Attend[Cache],
    cache: Cache,
    remat: str,
    some_L: jax.Array | None,
) -> tuple[jax.Array, Cache]:
    """Returns the residual stream after all layers, the cache passed on from each to the next, or after those of some_L.

    Stacked layers are scanned.  Those of some_L are few and run one by one.  Each takes its weights by its number inside its
    checkpoint, so that a waiting gradient keeps the base's own arrays: a scan would keep copies.
    """
    config, layers = base.config, base.layers
    packed = {name: x for name, x in base.packed.items() if name != "head"}  # of all layers: a scan would copy each's
    rope = rope_tables(config, jnp.maximum(batch.position_T, 0))
    scanned = isinstance(layers, dict) and some_L is None

    # In a scan the compiler cannot merge what is computed again with the first time, elsewhere it would.
    @functools.partial(jax.checkpoint, policy=REMAT[remat], prevent_cse=not isinstance(layers, dict))
    def one_layer(carry: tuple[jax.Array, Cache], inputs: tuple) -> tuple[tuple[jax.Array, Cache], None]:
        x_TD, cache = carry
        layer, arrays, lora_layer = inputs
        if isinstance(layers, dict) and not scanned:
            arrays = {name: lax.dynamic_index_in_dim(x, layer, keepdims=False) for name, x in arrays.items()}
        return Block(arrays)(config, packed, layer, x_TD, rope, lora, lora_layer, attend, cache), None

    if scanned:
        return lax.scan(one_layer, (x_TD, cache), (jnp.arange(config.layers), layers, lora.per_layer))[0]
    index_L = np.arange(config.layers, dtype=np.int32) if some_L is None else some_L
    for i in range(index_L.shape[0]):
        mine = jax.tree.map(lambda x, i=i: x[i], lora.per_layer)
        arrays = layers if isinstance(layers, dict) else layers[i]
        (x_TD, cache), _ = one_layer((x_TD, cache), (jnp.int32(index_L[i]), arrays, mine))
    return x_TD, cache


def final_norm(base: Base, x_TD: jax.Array) -> jax.Array:
    """Returns the head's input from the last layer's output."""
    return rms_norm(x_TD, base.arrays["norm"], base.config.norm_eps)


def head_weight(base: Base) -> tuple[jax.Array | Packed, jax.Array]:
    """Returns the head's weight as (head_DV, back_VD), the second its transpose; one may be a view of the other."""
    embed = base.arrays.get("embed")
    if base.packed:
        head = base.packed["head"]
        if base.config.tied and embed is not None:
            return head, embed
        return head, plain_back(head, 0, base.dtype)
    assert embed is not None
    head_DV = base.arrays.get("head", embed.T)
    return head_DV, embed if base.config.tied else head_DV.T


def head_logits(base: Base, x_TD: jax.Array) -> jax.Array:
    """Returns float32 logits of the base's head, [T, V]."""
    if base.packed:
        return product(x_TD, [base.packed["head"]], jnp.int32(0), dtype=jnp.float32)[0]
    head, _ = head_weight(base)
    assert isinstance(head, jax.Array)
    with jax.default_matmul_precision(base.precision):
        return jnp.dot(x_TD, head, preferred_element_type=jnp.float32)


class WeightSource(Protocol):
    """A checkpoint on disk, read one array at a time."""

    config: ModelConfig

    def read(self, name: str, layer: int | None) -> np.ndarray:
        """Returns one base array by its name in `parameters`, without the layer axis, in our layout."""
        ...


def load_base(
    source: WeightSource,
    mesh: Mesh,
    *,
    dtype: str,
    precision: str = "auto",
    quantization: str = "none",
    form: Form | None = None,
) -> Base:
    """Loads the base onto the devices of `mesh`, each array cast and placed with its own sharding.

    The host holds one array at a time besides what a CPU device keeps, a device no second copy of any.

    precision: of matrix products: default, high, highest, or auto, which is highest for float32, default for bfloat16.
    quantization: of the linears and the head: none, or int8 on one CPU device.
    form: of the layers; None is that of the mesh's platform.
    Raises ModelInvalid for a dtype other than float32 or bfloat16 or a wrong tensor, ConfigInvalid when the mesh does not divide
    and for 8 bits elsewhere than on one CPU device.
    """
    if dtype not in DTYPES:
        raise ModelInvalid(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    check_model(mesh, source.config)
    platform, quantized = mesh.devices.flat[0].platform, quantization == "int8"
    if quantized and not (platform == "cpu" and mesh.size == 1):
        raise ConfigInvalid(f"quantization = int8 is for one CPU device, got {mesh.size} of {platform}; leave it out")
    native = instruction_set() is not None
    form = form or form_of(platform, mesh.size, native=native, quantized=quantized)
    if precision == "auto":
        precision = "highest" if dtype == "float32" else "default"
    arrays, packed = _load_ends(source, mesh, DTYPES[dtype], form, quantized=quantized)
    layers = {}
    if form is Form.UNROLLED:
        layers = tuple(_load_layer(source, layer, mesh, DTYPES[dtype]) for layer in range(source.config.layers))
    else:
        kind = jnp.int8 if quantized else DTYPES[dtype]
        for name, p in parameters(source.config).items():
            if p.axes[0] != "layers":
                continue
            if form is Form.PACKED and name in LINEARS:
                packed[name] = _packed(functools.partial(_read, source, name), p.shape, mesh, kind)
                continue
            host = device_ready(p.shape, DTYPES[dtype])
            for layer in range(p.shape[0]):
                host[layer] = _read(source, name, layer)
            layers[name] = place_array(host, sharding(mesh, p.axes))
            del host
    return Base(arrays=arrays, layers=layers, packed=packed, config=source.config, precision=precision, mesh=mesh)


def _load_ends(
    source: WeightSource, mesh: Mesh, dtype: jnp.dtype, form: Form, *, quantized: bool
) -> tuple[dict[str, jax.Array], dict[str, Packed]]:
    """Returns embeddings, final norm and head, as plain arrays and packed.  Before the layers: reading one takes several
    times its bytes, and least is held by then."""
    config, kind = source.config, jnp.int8 if quantized else dtype
    arrays: dict[str, jax.Array] = {}
    packed: dict[str, Packed] = {}
    for name, p in parameters(config).items():
        if p.axes[0] == "layers":
            continue
        if form is Form.PACKED and name in LINEARS:
            packed[name] = _packed(lambda _, name=name: _read(source, name, None), (1, *p.shape), mesh, kind)
            continue
        host = device_ready(p.shape, dtype)
        host[...] = _read(source, name, None)
        tied = name == "embed" and config.tied
        if tied and form is Form.PACKED:
            packed["head"] = _packed(lambda _, host=host: host.T, (1, *p.shape[::-1]), mesh, kind)
        if tied and quantized:
            continue  # embeddings are the packed head's
        arrays[name] = place_array(host, sharding(mesh, p.axes))
        if tied and form is Form.STACKED and mesh.devices.flat[0].platform == "cpu":
            # XLA's CPU backend multiplies bfloat16 by a row-major right-hand side at twice the speed of a transposed one.
            host_DV = device_ready(p.shape[::-1], dtype)
            host_DV[...] = host.T
            arrays["head"] = place_array(host_DV, sharding(mesh, ("embed", "vocab")))
            del host_DV
        del host
    return arrays, packed


def _load_layer(source: WeightSource, layer: int, mesh: Mesh, dtype: jnp.dtype) -> dict[str, jax.Array]:
    """Returns the arrays of one layer in the form UNROLLED; the host joins what is joined."""
    arrays = {}
    for name, of in layer_arrays(source.config).items():
        host = device_ready(of.shape, dtype)
        if name in JOINED:
            for target, place in places(source.config, name):
                part = host[:, *place]
                part[...] = _read(source, target, layer).reshape(part.shape)
        else:
            host[...] = _read(source, name, layer)
        arrays[name] = place_array(host, sharding(mesh, of.axes))
    return arrays


def _read(source: WeightSource, name: str, layer: int | None) -> np.ndarray:
    """Returns an array of the checkpoint.  Raises ModelInvalid when it has not the shape that its configuration wants."""
    p = parameters(source.config)[name]
    what = name if layer is None else f"{name} of layer {layer}"
    value, shape = source.read(name, layer), p.shape if layer is None else p.shape[1:]
    if value.shape != shape:
        raise ModelInvalid(f"{what} has shape {value.shape}, the configuration wants {shape}")
    return value


def _packed(read: Callable[[int], np.ndarray], shape: tuple[int, ...], mesh: Mesh, dtype: jnp.dtype) -> Packed:
    """Returns one linear, packed layer by layer.  read: returns a layer's weights, [X, Y].  shape: [L, X, Y]."""
    L, X, Y = shape
    host = device_ready((L, *packed_shape(X, Y, dtype)), dtype)
    scale = device_ready((*host.shape[:2], BLOCK), jnp.float32) if dtype == jnp.int8 else None
    for layer in range(L):
        pack(read(layer), host[layer], None if scale is None else scale[layer])
    return Packed(
        blocks=place_array(host, replicated(mesh)),
        scale=None if scale is None else place_array(scale, replicated(mesh)),
        features_in=X,
        features_out=Y,
    )


def device_ready(shape: tuple[int, ...], dtype: jnp.dtype) -> np.ndarray:
    """Returns an uninitialised host array that a CPU device takes over without a copy, as XLA wants it aligned.

    Its owner fills it before it is placed and never writes it again.
    """
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    room = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    return room[start : start + nbytes].view(dtype).reshape(shape)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Returns x / rms(x) * weight over the last axis, in float32, cast to x's dtype."""
    return rows.rms_norm(x.reshape(-1, x.shape[-1]), weight, eps).reshape(x.shape)


def rope_tables(config: ModelConfig, position_T: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (cos, sin), float32 [T, H/2], of the rotary embedding.  Source: RoPE (arXiv 2104.09864)."""
    half = config.head_dim // 2
    frequency = 1.0 / config.rope_theta ** (np.arange(half, dtype=np.float64) / half)
    if config.rope_scaling is not None:
        frequency = config.rope_scaling.scaled(frequency)
    angle = position_T.astype(jnp.float32)[:, None] * jnp.asarray(frequency, jnp.float32)[None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_TNH: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Applies the half-split rotary embedding in float32; returns x's dtype."""
    cos, sin = rope[0][:, None, :], rope[1][:, None, :]
    first, second = jnp.split(x_TNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_TNH.dtype)
