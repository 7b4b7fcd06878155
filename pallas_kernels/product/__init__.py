"""Products with the base's frozen weights as a CPU reads them fastest: op, packing and gradient.
May import pallas_kernels' own modules, no other op.
Without the native bodies nothing is packed, and XLA multiplies plain arrays."""
