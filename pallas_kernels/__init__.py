"""The ops.  Each file reads: what it computes, oracle, implementation, public op.  Nothing here knows what an adapter is."""

NO_ADAPTER = -1  # the slot of a token that belongs to the base model; selected on, never used as an index
KEPT = "kept"  # checkpoint name of what the backward pass keeps of a layer; the rest is computed again
