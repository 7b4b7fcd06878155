"""Causal attention over packed lanes, forward and backward, in blocks; blocks of other segments are skipped.

May import pallas_kernels' top-level modules, no other op.
The TPU body is JAX's splash attention; the Triton bodies read no block that no token attends to.
"""
