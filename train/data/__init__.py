"""Parses JSONL lines into examples and pairs, and mixes them into packed lanes.

May import jaxlora's core and config; no jax.
A lane holds one tenant; weights[i] weights the prediction of token i. The mixer is a pure function of its cursor.
"""
