"""Implements `jaxlora bench kernels`: measures the device's peak rates, and every op beside its alternatives.

May import all ops; only the command line imports it.
The minimum of several rounds counts; `cases` defines what is timed against what.
"""
