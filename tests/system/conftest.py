"""Programs are compiled here: see `compiled` in tests/support."""

from compiled import perturbed_shapes

__all__ = ["perturbed_shapes"]
