"""The draw of a token from each row's logits, with top-k, top-p and min-p.
May import pallas_kernels' own modules, no other op.
The native body sums a row in one order, however many rows there are."""
