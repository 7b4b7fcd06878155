"""The ops of LoRA, attention and loss, each with a reference that defines it and a body per platform.

Imports nothing of ours; nothing here knows what an adapter or a tenant is.
dispatch.TABLE is the one place that chooses a body; @shaped checks shape suffixes when an op is traced.
"""

NO_ADAPTER = -1  # the slot of a token that belongs to the base model; selected on, never used as an index
KEPT = "kept"  # checkpoint name of what the backward pass keeps of a layer; the rest is computed again
