"""The sizes that a server is given where its settings leave them out: a few steps, largest first.  Pure: no jax."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """A step of the ladder: sizes that go together."""

    rows: int
    prefill_lanes: int
    prefill_tokens: int
    slots: int
    max_rank: int
    training_slots: int
    lanes: int
    lane_tokens: int
    row_tokens: int  # KV tokens of each row at least


def _sizes(
    rows: int, prefill: tuple[int, int], slots: tuple[int, int], training: tuple[int, int, int], kv: int
) -> Sizes:
    return Sizes(
        rows=rows,
        prefill_lanes=prefill[0],
        prefill_tokens=prefill[1],
        slots=slots[0],
        max_rank=slots[1],
        training_slots=training[0],
        lanes=training[1],
        lane_tokens=training[2],
        row_tokens=kv,
    )


# The one place of what is chosen, largest first.  A CPU computes a step of 8 rows as fast as it should be, an
# accelerator's step takes hardly longer with many: memory is not all that bounds these.
ACCELERATOR = (
    _sizes(64, (16, 64), (32, 64), (8, 8, 1024), 1024),
    _sizes(32, (8, 64), (16, 32), (8, 8, 512), 1024),
    _sizes(16, (8, 32), (16, 16), (4, 4, 512), 512),
)
CPU = (
    _sizes(8, (8, 32), (8, 32), (4, 4, 256), 1024),
    _sizes(8, (8, 32), (8, 16), (4, 4, 256), 512),
    _sizes(8, (4, 32), (4, 16), (2, 2, 256), 256),
    _sizes(4, (2, 32), (4, 16), (1, 1, 256), 256),
    _sizes(4, (2, 32), (2, 8), (1, 1, 128), 256),
    _sizes(2, (2, 16), (2, 8), (1, 1, 64), 256),
    _sizes(2, (2, 16), (2, 4), (1, 1, 32), 128),
)
MANY_CORES = 16  # of a CPU that decodes more rows at once
