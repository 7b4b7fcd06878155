"""AdamW of the due slots of one array, in place: each number is read and written once.
May import pallas_kernels' own modules, no other op.
Which gradients belong to a tenant, and their norm, is the caller's."""
