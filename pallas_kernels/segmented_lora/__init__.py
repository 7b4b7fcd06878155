"""LoRA of training: lanes of one adapter each, forward and backward.
May import pallas_kernels' own modules, no other op.
take_rows gathers the rows of a step's lanes; targets that share an input share one read of it."""
