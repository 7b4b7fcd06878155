"""Implements `jaxlora train`: trains a file's tenants together, with metrics, plots and a progress screen.

May import everything of train and jaxlora.
With several processes only the lead writes and prints; what decides a step may not differ between processes.
"""
