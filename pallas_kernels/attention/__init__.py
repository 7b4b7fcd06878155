"""Causal attention over packed lanes, forward and backward, in blocks that skip foreign segments.

May import pallas_kernels' own modules, no other op.
The TPU body is JAX's splash attention; the Triton bodies read no block that nobody sees.
"""
