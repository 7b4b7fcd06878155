"""The ops of LoRA, attention and loss, each with a reference that defines it and a body per platform.
Imports nothing of ours; nothing here knows what an adapter or a tenant is.
dispatch.TABLE is the one place that chooses a body; @shaped checks shape suffixes when an op is traced."""

NO_ADAPTER = -1  # slot of a token that belongs to the base model; masked by selection, never used as an index
KEPT = "kept"  # checkpoint name of what is saved of a layer for the backward pass; the rest is recomputed
