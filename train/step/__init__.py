"""Jitted training step: one loss for each lane, gradients for each slot, and AdamW on the due slots in place.

May import jaxlora, pallas_kernels and train/data.
Every hyper-parameter is a value per slot. Microsteps split the same step into short programs, for a shared device.
"""
