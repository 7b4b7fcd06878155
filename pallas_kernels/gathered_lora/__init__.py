"""LoRA of decode: each token has its own slot, rows are read from the pool in place.

May import pallas_kernels' own modules, no other op.
xla_cpu visits two tokens of an adapter at a time, written so that XLA reads rows where they lie.
"""
