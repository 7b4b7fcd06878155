"""Reductions of rows: RMS norm, log-sum-exp, what is said of logits, the best k.
May import pallas_kernels' own modules, no other op.
The native bodies sum a row in one order, however many rows there are."""
