"""Training slots in buckets of one largest rank each, and which adapter fits where.

Slot numbers run on from one bucket to the next.  Shape letters: U due slots of a bucket.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from jaxlora.core.errors import ConfigInvalid, StateInvalid
from jaxlora.core.lora import LoraSpec
from jaxlora.model.lora_pool import PoolSpec
from pallas_kernels import NO_ADAPTER
from train.step.optimizer import IDLE, Hyper
from train.step.state import Due


class SlotBuckets:
    """Assigns a tenant the first bucket that its rank fits, so that what it learns does not depend on other tenants."""

    def __init__(self, buckets: Sequence[PoolSpec], lanes: int):
        """Raises ConfigInvalid unless the buckets grow in rank and are alike in all else.

        lanes: those of a step; at most that many slots are due at once.
        """
        ranks = [b.rank for b in buckets]
        if not ranks or ranks != sorted(set(ranks)) or len({(b.dtype, b.targets) for b in buckets}) > 1:
            raise ConfigInvalid(f"training slots come in buckets of growing rank, each rank once; got ranks {ranks}")
        self.buckets = tuple(buckets)
        self.lanes = lanes

    @property
    def widest(self) -> PoolSpec:
        """Returns the bucket of the largest rank: an adapter that does not fit it fits none."""
        return self.buckets[-1]

    def check(self, spec: LoraSpec) -> None:
        """Raises AdapterInvalid when an adapter of this specification fits no slot."""
        self.widest.check(spec)

    def bucket_for(self, spec: LoraSpec) -> int:
        """Returns the bucket of this adapter.  Raises AdapterInvalid when it fits no slot."""
        self.check(spec)
        return next(b for b, bucket in enumerate(self.buckets) if spec.max_rank <= bucket.rank)

    def spec_for(self, spec: LoraSpec) -> PoolSpec:
        """Returns the specification of this adapter's slot.  Raises AdapterInvalid when it fits no slot."""
        return self.buckets[self.bucket_for(spec)]

    def count_free(self, spec: LoraSpec, taken: Collection[int]) -> int:
        """Returns the number of free slots for such an adapter.  Raises AdapterInvalid when it fits no slot."""
        return sum(s not in taken for s in self._slots(self.bucket_for(spec)))

    def first_free(self, spec: LoraSpec, taken: Collection[int]) -> int:
        """Returns the slot that such an adapter gets.  Raises AdapterInvalid, or StateInvalid when none is free."""
        bucket = self.bucket_for(spec)
        for slot in self._slots(bucket):
            if slot not in taken:
                return slot
        of_rank = f" of rank {self.buckets[bucket].rank}" if len(self.buckets) > 1 else ""
        raise StateInvalid(f"all {self.buckets[bucket].slots} training slots{of_rank} are taken; wait for one to leave")

    def _slots(self, bucket: int) -> range:
        start = sum(b.slots for b in self.buckets[:bucket])
        return range(start, start + self.buckets[bucket].slots)

    def place(self, slot: int) -> tuple[int, int]:
        """Returns (bucket, slot counted from the bucket's start) of a slot."""
        bucket = 0
        while slot >= self.buckets[bucket].slots:
            slot -= self.buckets[bucket].slots
            bucket += 1
        return bucket, slot

    def due(
        self, slots: Sequence[int], rows: Sequence[dict[str, float]]
    ) -> tuple[list[tuple[int, int]], tuple[Due, ...]]:
        """Returns where the report of each of these slots will stand, (bucket, row), and their updates in NumPy."""
        own: list[list[int]] = [[] for _ in self.buckets]
        hyper: list[list[dict[str, float]]] = [[] for _ in self.buckets]
        places = []
        for (bucket, slot), row in zip(map(self.place, slots), rows, strict=True):
            places.append((bucket, len(own[bucket])))
            own[bucket].append(slot)
            hyper[bucket].append(row)
        due = []
        for bucket, slots_U, rows_U in zip(self.buckets, own, hyper, strict=True):
            idle = min(self.lanes, bucket.slots) - len(slots_U)
            slot_U = np.array(slots_U + [NO_ADAPTER] * idle, np.int32)
            due.append(Due(hyper=Hyper.stack(rows_U + [IDLE] * idle), slot_U=slot_U))  # ty: ignore[invalid-argument-type]
        return places, tuple(due)
