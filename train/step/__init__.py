"""The jitted training step: a loss per lane, chosen by data; gradients per slot; AdamW on the due slots in place.

May import jaxlora, pallas_kernels and train/data.
Every hyper-parameter is a value per slot. Microsteps are the same step in pieces, for a shared device.
"""
