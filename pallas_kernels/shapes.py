"""@shaped checks the capital suffix of each parameter's name, its shape, when an op is traced.

    @shaped
    def expand(h_TR, b_SRY, slot_T): ...

`h_TR` has two axes, and the letter T means one size throughout a call.  A `None` argument is skipped.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable


def shaped[**P, R](op: Callable[P, R]) -> Callable[P, R]:
    """Wraps the op: an argument that breaks its suffix raises ValueError, which names parameter, axis, both sizes."""
    signature = inspect.signature(op)
    op_name = op.__name__  # ty: ignore[missing-attribute]
    suffix_of = {}
    for name in signature.parameters:
        head, _, suffix = name.rpartition("_")
        if head and suffix.isalpha() and suffix.isupper():
            suffix_of[name] = suffix

    @functools.wraps(op)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = signature.bind(*args, **kwargs)
        size_of: dict[str, tuple[int, str]] = {}
        for name, suffix in suffix_of.items():
            value = bound.arguments.get(name)
            if value is None:
                continue
            shape = value.shape
            if len(shape) != len(suffix):
                raise ValueError(f"{op_name}: {name} must have axes {'·'.join(suffix)}, got shape {shape}")
            for letter, size in zip(suffix, shape, strict=True):
                known, first = size_of.setdefault(letter, (size, name))
                if known != size:
                    raise ValueError(f"{op_name}: axis {letter} is {size} in {name} {shape} but {known} in {first}")
        return op(*args, **kwargs)

    return checked
