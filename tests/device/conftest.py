"""Programs are compiled here: see `compiled` in tests/support."""

from compiled import forgotten_programs, perturbed_shapes

__all__ = ["forgotten_programs", "perturbed_shapes"]
