"""Ops of LoRA, attention and loss: each has a reference that defines it and an implementation ("body") per platform.

Imports nothing else of this repository; nothing here knows what an adapter or a tenant is.
dispatch.TABLE is the one place that chooses a body; @shaped checks shape suffixes when an op is traced.
"""

NO_ADAPTER = -1  # slot of a token of the base model; tested with ==, never used as an index
KEPT = "kept"  # checkpoint name of what the backward pass saves of a layer; the rest is recomputed
