"""The table of serving slots and the versions in them.  Pure host code: no jax."""

from __future__ import annotations

from jaxlora.core.lora import AdapterRef


class SlotTable:
    """Maps adapter versions to serving slots.  A pinned slot is never reused; ties go to the lowest index."""

    def __init__(self, slots: int):
        self._ref_of: list[AdapterRef | None] = [None] * slots
        self._pins = [0] * slots
        self._used = [0] * slots  # clock of the last pin or unpin
        self._slot_of: dict[AdapterRef, int] = {}
        self._clock = 0

    @property
    def count(self) -> int:
        """The number of slots."""
        return len(self._ref_of)

    def find(self, ref: AdapterRef) -> int | None:
        """Returns the slot that holds this version, or None.  From any thread: the map is replaced, never changed."""
        return self._slot_of.get(ref)

    def pin(self, ref: AdapterRef) -> int | None:
        """Adds a user to the slot that holds this version and returns it; None when the version is not resident."""
        slot = self._slot_of.get(ref)
        if slot is not None:
            self._pins[slot] += 1
            self._touch(slot)
        return slot

    def unpin(self, slot: int) -> None:
        """Removes a user of the slot."""
        assert self._pins[slot] > 0, f"slot {slot} is not pinned"
        self._pins[slot] -= 1
        self._touch(slot)

    def choose(self) -> int | None:
        """Returns a slot to load into: an empty one, else the unpinned one used longest ago; None when all are pinned."""
        free = [s for s, pins in enumerate(self._pins) if pins == 0]
        return min(free, key=lambda s: (self._ref_of[s] is not None, self._used[s], s), default=None)

    def place(self, slot: int, ref: AdapterRef) -> None:
        """Records that the slot holds this version."""
        assert self._pins[slot] == 0, f"slot {slot} is pinned"
        assert self._slot_of.get(ref, slot) == slot, f"{ref} sits in slot {self._slot_of[ref]} already"
        self._slot_of = {r: s for r, s in self._slot_of.items() if s != slot} | {ref: slot}
        self._ref_of[slot] = ref
        self._touch(slot)

    def drop(self, ref: AdapterRef) -> None:
        """Forgets an unused version; does nothing when it is not resident or still pinned."""
        slot = self._slot_of.get(ref)
        if slot is not None and self._pins[slot] == 0:
            self._slot_of = {r: s for r, s in self._slot_of.items() if r != ref}
            self._ref_of[slot] = None

    def resident(self) -> dict[AdapterRef, int]:
        """Returns every version on the device and its slot."""
        return dict(self._slot_of)

    def pinned(self) -> list[AdapterRef]:
        """Returns the versions whose slots have users."""
        return [ref for ref, slot in self._slot_of.items() if self._pins[slot] > 0]

    def check(self) -> None:
        """Asserts that both maps agree and that no pin is lost."""
        assert {r: s for s, r in enumerate(self._ref_of) if r is not None} == self._slot_of
        assert all(p >= 0 for p in self._pins)
        assert all(p == 0 or r is not None for p, r in zip(self._pins, self._ref_of, strict=True))

    def _touch(self, slot: int) -> None:
        self._clock += 1
        self._used[slot] = self._clock
