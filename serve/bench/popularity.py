"""Which model each request of a load asks: all equally often, by Zipf's law, or in the order of a trace."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxlora.core.errors import ConfigInvalid

FORMS = "uniform, zipf:S with S > 0, or trace:FILE"


def draw(popularity: str, models: Sequence[str], seed: int) -> Iterator[str]:
    """Returns an endless sequence of models; the same for the same seed.

    uniform     each model is as likely as any other
    zipf:S      the k-th of `models`, counted from 1, is drawn in proportion to 1 / k**S
    trace:FILE  a model a line, from the top again after the last one

    Raises ConfigInvalid for another form, and for a trace that cannot be read, is empty or names none of `models`.
    """
    law, _, rest = popularity.partition(":")
    if law == "trace" and rest:
        return itertools.cycle(_read_trace(Path(rest), models))
    if law == "uniform" and not rest:
        return _draw_by_place(models, 0.0, seed)
    if law == "zipf":
        try:
            exponent = float(rest)
        except ValueError:
            exponent = 0.0
        if 0 < exponent < float("inf"):
            return _draw_by_place(models, exponent, seed)
    raise ConfigInvalid(f"a popularity must be {FORMS}; got {popularity!r}")


def _draw_by_place(models: Sequence[str], exponent: float, seed: int) -> Iterator[str]:
    source = random.Random(seed)
    bounds = list(itertools.accumulate(place**-exponent for place in range(1, len(models) + 1)))
    while True:
        yield source.choices(models, cum_weights=bounds)[0]


def _read_trace(path: Path, models: Sequence[str]) -> list[str]:
    try:
        names = path.read_text().split()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigInvalid(f"the trace {path} cannot be read: {e}") from e
    unknown = sorted(set(names) - set(models))
    if unknown or not names:
        told = f"names {unknown[0]!r}, which is not asked" if unknown else "is empty"
        raise ConfigInvalid(f"the trace {path} {told}; a line is one of {', '.join(models[:10])}")
    return names
