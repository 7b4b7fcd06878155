"""The serving slots: the table of the versions in them, and how many there are.  Pure host code: no jax.

    demand ─▶ SlotPolicy ─▶ another SlotSize, or none ─▶ Engine.resize ─▶ SlotTable.resize

Slots and KV pages share one piece of memory.  More slots are wanted where adapters wait for one longer than a quantum and
the KV in use fits the pages that remain; fewer where requests lack pages and the adapters with work fit the slots that
remain.  Neither ends what the other began while the load stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxlora.config.serving import SlotSize
from jaxlora.core.lora import AdapterRef

PATIENCE_S = 10.0  # for which slots or pages must be short before their number changes
GAP_S = (
    4.0  # in which no shortage is seen, after which there is none: it comes and goes with turns, answers and long steps
)
REST_S = 30.0  # between two changes, each of which costs everybody a moment
ROOM = 0.9  # of the pages of a size with more slots, what may be in use when it is chosen


class SlotTable:
    """Maps adapter versions to serving slots.  A pinned slot is never reused; ties go to the lowest index.

    Slots may differ in rank: those of one rank are a class.
    """

    def __init__(self, slots: int, ranks: Sequence[int] = ()):
        """ranks: the largest rank that each slot holds; none: they hold the same."""
        assert len(ranks) in (0, slots)
        self._rank_of = tuple(ranks) or (0,) * slots
        self.classes = {rank: self._rank_of.count(rank) for rank in sorted(set(self._rank_of))}  # rank → slots
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

    def rank(self, slot: int) -> int:
        """Returns the class of a slot: the largest rank that it holds."""
        return self._rank_of[slot]

    def choose(self, rank: int | None = None) -> int | None:
        """Returns a slot to load into: an empty one, else the unpinned one used longest ago; None when all are pinned.

        rank: the class of the slot; None: any.
        """
        free = [s for s, pins in enumerate(self._pins) if pins == 0 and rank in (None, self._rank_of[s])]
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

    def resize(self, slots: int) -> dict[int, int]:
        """Changes the number of slots, all of one class.  Returns the place that each version which stays had, and has now.

        The pinned ones stay, which must be no more than that, then those that were used last.
        """
        ((rank, _),) = self.classes.items()
        kept = sorted(self._slot_of.values(), key=lambda s: (self._pins[s] == 0, -self._used[s]))[:slots]
        moves = {old: new for new, old in enumerate(sorted(kept))}
        assert len(self.pinned()) == sum(self._pins[old] > 0 for old in moves), "more versions are pinned than slots"

        def moved[T](of: list[T], nothing: T) -> list[T]:
            return [of[old] for old in moves] + [nothing] * (slots - len(moves))

        self._ref_of, self._pins, self._used = moved(self._ref_of, None), moved(self._pins, 0), moved(self._used, 0)
        self._slot_of = {ref: slot for slot, ref in enumerate(self._ref_of) if ref is not None}
        self._rank_of, self.classes = (rank,) * slots, {rank: slots}
        return moves

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """What requests want of slots and pages at one moment."""

    adapters: int  # with work, or pinned
    waited_s: float  # of the adapter that waits longest for one of the slots, all of which are in use; else 0
    pages: int  # that requests hold
    shortages: int  # times that requests lacked pages, since the start


class _Lasting:
    """A condition that comes and goes: it lasts as long as it is away for GAP_S at most."""

    def __init__(self) -> None:
        self._began = self._seen = float("-inf")

    def observe(self, now: float, holds: bool) -> float:
        """Returns for how long it has lasted; 0 when it does not hold now."""
        if not holds:
            return 0.0
        if now - self._seen > GAP_S:
            self._began = now
        self._seen = now
        return now - self._began


class SlotPolicy:
    """Decides when a server changes from one of its sizes to the next, at most once in REST_S."""

    def __init__(self, sizes: Sequence[SlotSize], present: SlotSize):
        """sizes: by rising slots, so by falling pages; `present` is one of them."""
        self._sizes, self._at = tuple(sizes), tuple(sizes).index(present)
        self._slots_short, self._pages_short = _Lasting(), _Lasting()
        self._shortages, self._lacked = 0, float("-inf")  # pages: how often, and when last
        self._changed = float("-inf")

    def set(self, now: float, size: SlotSize) -> None:
        """Notes a change to this size."""
        self._at, self._changed = self._sizes.index(size), now
        self._slots_short, self._pages_short = _Lasting(), _Lasting()

    def choose(self, now: float, demand: Demand, quantum_s: float) -> SlotSize | None:
        """Returns the size to change to now; None: the present one stays.  Called before each step."""
        present = self._sizes[self._at]
        more = self._sizes[self._at + 1] if self._at + 1 < len(self._sizes) else None
        fewer = self._sizes[self._at - 1] if self._at else None
        lacked, self._shortages = demand.shortages > self._shortages, demand.shortages
        self._lacked = now if lacked else self._lacked
        waits = demand.adapters > present.slots and demand.waited_s > quantum_s and now - self._lacked > GAP_S
        slots_s = self._slots_short.observe(now, more is not None and waits and demand.pages <= ROOM * more.pages)
        pages_s = self._pages_short.observe(now, fewer is not None and lacked and demand.adapters <= fewer.slots)
        if now - self._changed < REST_S:
            return None
        return more if slots_s >= PATIENCE_S else fewer if pages_s >= PATIENCE_S else None
