"""RMS norm and log-sum-exp: ops with one sum over each row.
May import pallas_kernels' own modules, no other op.
The native bodies sum a row in one order, however many rows there are."""
