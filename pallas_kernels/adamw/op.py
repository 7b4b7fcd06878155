"""AdamW of some slots of one array: weights, summed gradients and moments are read once and written where they lie.

    g  = grad / divisor * shrink
    mu = b1 mu + (1 - b1) g                      nu = b2 nu + (1 - b2) g²
    w  = w - lr (mu / c1 / (sqrt(nu / c2) + eps) + decay w)             grad = 0

Clipping is by the norm of a slot's gradients in all arrays, so it is known before: `shrink` is 1, or limit / norm, or NaN
where the norm is not finite.  A number whose update is not finite stays as it was, with its moments.  Other slots are
neither read nor written.

Which body runs is the caller's choice (`train.step.update`): a general form that reads an update's finiteness before it
writes needs all arrays together.

Shape letters: L layers, S slots, R LoRA rank, X features, U due slots, N numbers of a turn.
Source: AdamW (arXiv 1711.05101).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from pallas_kernels import NO_ADAPTER
from pallas_kernels.adamw import pallas_tpu
from pallas_kernels.sharding import Placement

NUMBERS = ("divisor", "shrink", "b1", "b2", "c1", "c2", "eps", "decay", "lr")  # of a turn, in this order
Update = Callable[["SlotArrays", jax.Array, jax.Array], "SlotArrays"]  # of (arrays, slot_U, turn_UN)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SlotArrays:
    """One half of a target with all its slots, float32 each."""

    weight_LSRX: jax.Array
    grad_LSRX: jax.Array  # summed over the window
    mu_LSRX: jax.Array
    nu_LSRX: jax.Array

    def each(self) -> tuple[jax.Array, ...]:
        """Returns the arrays in the order of the fields."""
        return self.weight_LSRX, self.grad_LSRX, self.mu_LSRX, self.nu_LSRX


def adamw_reference(arrays: SlotArrays, slot_U: jax.Array, turn_UN: jax.Array) -> SlotArrays:
    """Defines the op: slot_U, int32, has each due slot once and NO_ADAPTER in the unused places, which come last.

    turn_UN: float32, the NUMBERS of each due slot; c1 and c2 are 1 - b1^n and 1 - b2^n of its update n.
    """
    divisor, shrink, b1, b2, c1, c2, eps, decay, lr = (turn_UN[None, :, i, None, None] for i in range(len(NUMBERS)))
    safe_U = jnp.maximum(slot_U, 0)
    weight, grad, mu, nu = (x[:, safe_U] for x in arrays.each())  # [L, U, R, X]
    g = grad / divisor * shrink
    new_mu, new_nu = b1 * mu + (1 - b1) * g, b2 * nu + (1 - b2) * g * g
    update = -lr * (new_mu / c1 / (jnp.sqrt(new_nu / c2) + eps) + decay * weight)
    fine = jnp.isfinite(update)
    new = (jnp.where(fine, weight + update, weight), jnp.zeros_like(grad), jnp.where(fine, new_mu, mu))
    at_U = jnp.where(slot_U == NO_ADAPTER, arrays.weight_LSRX.shape[1], slot_U)
    put = [
        x.at[:, at_U].set(value, mode="drop")
        for x, value in zip(arrays.each(), (*new, jnp.where(fine, new_nu, nu)), strict=True)
    ]
    return SlotArrays(weight_LSRX=put[0], grad_LSRX=put[1], mu_LSRX=put[2], nu_LSRX=put[3])


def fits_tpu(arrays: Sequence[SlotArrays]) -> bool:
    """Returns whether the TPU's body has room on the chip for such arrays."""
    return all(pallas_tpu.fits(a.weight_LSRX.shape[2]) for a in arrays)


def on_tpu(interpret: bool) -> Update:
    """Returns the TPU's body."""
    return _of_arrays(functools.partial(pallas_tpu.update, interpret=interpret))


def on_cuda() -> Update:
    """Returns the CUDA body."""
    from pallas_kernels.adamw import triton

    return _of_arrays(triton.update)


def _of_arrays(kernel: Callable[..., Sequence[jax.Array]]) -> Update:
    def update(arrays: SlotArrays, slot_U: jax.Array, turn_UN: jax.Array) -> SlotArrays:
        weight, grad, mu, nu = kernel(arrays.each(), slot_U, turn_UN)
        return SlotArrays(weight_LSRX=weight, grad_LSRX=grad, mu_LSRX=mu, nu_LSRX=nu)

    return update


def on_each(update: Update, placement: Placement, spec: PartitionSpec) -> Update:
    """Returns the body as it runs on each device of a mesh that splits the arrays alike, by `spec`."""
    specs = SlotArrays(weight_LSRX=spec, grad_LSRX=spec, mu_LSRX=spec, nu_LSRX=spec)  # ty: ignore[invalid-argument-type]
    whole = PartitionSpec()
    return placement.on_each(update, (specs, whole, whole), specs)
