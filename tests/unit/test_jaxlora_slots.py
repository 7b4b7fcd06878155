"""Who sits in which slot: a pinned slot is never given away, and the choice is the same everywhere."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jaxlora.core.lora import AdapterRef
from serve.engine.slots import SlotTable


def ref(name: str, version: int = 1, tenant: str = "ada") -> AdapterRef:
    return AdapterRef(tenant, name, version)


A, B, C, X = (ref(name) for name in ("a", "b", "c", "x"))


def filled(*refs: AdapterRef) -> SlotTable:
    """Slots 0, 1, ... hold these, placed in this order; nobody uses them."""
    table = SlotTable(len(refs))
    for slot, r in enumerate(refs):
        table.place(slot, r)
    return table


def test_empty_slots_come_first_lowest_index_first():
    table = SlotTable(3)
    for want, r in enumerate((A, B, C)):
        assert table.choose() == want
        table.place(want, r)
    table.drop(B)
    assert table.choose() == 1


def test_the_slot_used_longest_ago_is_chosen():
    table = filled(A, B, C)
    assert table.choose() == 0
    table.unpin(table.pin(A))
    assert table.choose() == 1
    table.unpin(table.pin(B))
    assert table.choose() == 2


def test_use_lasts_until_the_unpin():
    table = filled(A, B)
    first, second = table.pin(A), table.pin(B)
    table.unpin(second)
    table.unpin(first)
    assert table.choose() == second


def test_a_pinned_slot_is_never_chosen():
    table = filled(A, B)
    assert table.pin(A) == 0
    assert table.choose() == 1
    assert table.pin(B) == 1
    assert table.choose() is None
    table.unpin(0)
    assert table.choose() == 0


def test_pins_are_counted():
    table = filled(A)
    assert [table.pin(A) for _ in range(3)] == [0, 0, 0]
    for _ in range(3):
        assert table.choose() is None
        table.unpin(0)
    assert table.choose() == 0


def test_who_is_not_resident_cannot_be_pinned():
    table = filled(A)
    assert table.pin(X) is None
    assert table.find(X) is None
    assert table.choose() == 0  # no pin was left behind


@pytest.mark.parametrize(
    "other", [ref("a", 2), ref("a", 1, "bob"), ref("b")], ids=["another version", "another tenant", "another name"]
)
def test_a_slot_belongs_to_one_version_of_one_tenants_adapter(other):
    table = filled(A)
    assert table.find(other) is None
    table.place(0, other)
    assert table.find(A) is None
    assert table.pin(A) is None
    assert table.find(other) == 0
    table.check()


def test_a_dropped_version_is_gone_unless_somebody_uses_it():
    table = filled(A, B)
    table.pin(A)
    table.drop(A)
    table.drop(X)
    assert table.resident() == {A: 0, B: 1}
    table.unpin(0)
    table.drop(A)
    assert table.resident() == {B: 1}
    assert table.choose() == 0
    table.check()


def test_resident_is_a_copy():
    table = filled(A)
    table.resident().clear()
    assert table.find(A) == 0


def test_our_own_mistakes_are_caught():
    table = filled(A, B)
    with pytest.raises(AssertionError, match="slot 0 is not pinned"):
        table.unpin(0)
    table.pin(A)
    with pytest.raises(AssertionError, match="slot 0 is pinned"):
        table.place(0, X)
    table.unpin(0)
    with pytest.raises(AssertionError, match="sits in slot 1 already"):
        table.place(0, B)
    assert table.resident() == {A: 0, B: 1}
    table.check()


REFS = [ref(name, version, tenant) for name in "ab" for version in (1, 2) for tenant in ("ada", "bob")]


class Slots(RuleBasedStateMachine):
    """Any use of a table of 3 slots, or later others, by 8 adapters, beside a model: a list of holders, in order of last use."""

    def __init__(self):
        super().__init__()
        self.table, self.twin = SlotTable(3), SlotTable(3)
        self.holder: dict[int, AdapterRef] = {}
        self.pins = [0, 0, 0]  # of each slot
        self.order = [0, 1, 2]  # least recently used first

    def used(self, slot: int) -> None:
        self.order.remove(slot)
        self.order.append(slot)

    def both(self, call):
        """The answer of the table; a twin with the same history must give the same."""
        got = call(self.table)
        assert got == call(self.twin)
        return got

    @rule(r=st.sampled_from(REFS))
    def pin_anyone(self, r):
        self.pin(r)

    @precondition(lambda self: self.holder)
    @rule(data=st.data())
    def pin_a_resident(self, data):
        self.pin(data.draw(st.sampled_from(sorted(self.holder.values()))))

    def pin(self, r):
        got = self.both(lambda t: t.pin(r))
        assert got == next((s for s, h in self.holder.items() if h == r), None)
        if got is not None:
            self.pins[got] += 1
            self.used(got)

    @precondition(lambda self: any(self.pins))
    @rule(data=st.data())
    def unpin(self, data):
        slot = data.draw(st.sampled_from([s for s, pins in enumerate(self.pins) if pins]))
        self.both(lambda t: t.unpin(slot))
        self.pins[slot] -= 1
        self.used(slot)

    @rule(r=st.sampled_from(REFS))
    def load(self, r):
        if r in self.holder.values():
            return
        slot = self.both(lambda t: t.choose())
        free = [s for s, pins in enumerate(self.pins) if not pins]
        empty = [s for s in free if s not in self.holder]
        if not free:
            assert slot is None
            return
        if empty:
            assert slot in empty
        else:
            assert slot == next(s for s in self.order if s in free)
        self.both(lambda t: t.place(slot, r))
        self.holder[slot] = r
        self.used(slot)

    @rule(r=st.sampled_from(REFS))
    def drop(self, r):
        self.both(lambda t: t.drop(r))
        self.holder = {s: h for s, h in self.holder.items() if h != r or self.pins[s]}

    @rule(slots=st.integers(2, 5))
    def resize(self, slots):
        pinned = [s for s in self.holder if self.pins[s]]
        if len(pinned) > slots:
            return
        idle = [s for s in reversed(self.order) if s in self.holder and not self.pins[s]]
        stay = sorted([*pinned, *idle][:slots])
        assert self.both(lambda t: t.resize(slots)) == {old: new for new, old in enumerate(stay)}
        used = [stay.index(s) for s in self.order if s in stay]
        self.holder = {new: self.holder[old] for new, old in enumerate(stay)}
        self.pins = [self.pins[old] for old in stay] + [0] * (slots - len(stay))
        self.order = [*range(len(stay), slots), *used]

    @invariant()
    def holds(self):
        self.table.check()
        assert self.table.count == len(self.pins)
        assert self.table.resident() == {r: s for s, r in self.holder.items()}
        for r in REFS:
            assert self.table.find(r) == next((s for s, h in self.holder.items() if h == r), None)
        for slot, count in enumerate(self.pins):
            assert not count or slot in self.holder


Slots.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestSlots = Slots.TestCase
