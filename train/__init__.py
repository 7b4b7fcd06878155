"""Examples, batches, losses and the multi-tenant training step; the trainer over it.
Imports jaxlora and pallas_kernels, and knows no HTTP.
Trainer owns the slots; without a server it belongs to the main thread, beside one to the device thread."""
