"""The scheduler: first come, first served; rows, pages and pins add up; whoever waits gets in."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jaxlora.errors import InvalidRequest, Overloaded
from jaxlora.lora import AdapterRef
from jaxlora.slots import SlotTable
from pallas_kernels import NO_ADAPTER
from serve.pages import PageAllocator
from serve.request import Request, SamplingParams
from serve.scheduler import Plan, Scheduler, Sequence

SLOTS, PAGES, PAGE_TOKENS, ROWS, LANES, LANE_TOKENS, WAITING = 2, 9, 4, 4, 3, 5, 6


def adapter(number: int, version: int = 1) -> AdapterRef:
    return AdapterRef("acme", f"bot{number}", version)


def ask(id: str, ref: AdapterRef | None = None, prompt: int = 3, max_tokens: int = 4) -> Request:
    params = SamplingParams(max_tokens=max_tokens)
    return Request(id=id, tenant="acme", adapter=ref, prompt=tuple(range(prompt)), params=params)


def make() -> Scheduler:
    return Scheduler(
        SlotTable(SLOTS),
        PageAllocator(PAGES, PAGE_TOKENS),
        rows=ROWS,
        lanes=LANES,
        lane_tokens=LANE_TOKENS,
        max_waiting=WAITING,
    )


def advance(scheduler: Scheduler, plan: Plan) -> list[Sequence]:
    """What the engine does with a plan; the sequences that ended."""
    for chunk in plan.prefill:
        s = chunk.sequence
        assert s.done == chunk.start
        s.done += chunk.count
        if s.prompt_left == 0:
            s.tokens.append(0)
    for s in plan.decode:
        s.done += 1
        s.tokens.append(0)
    stepped = {id(s): s for s in [c.sequence for c in plan.prefill] + plan.decode}
    ended = [s for s in stepped.values() if s.generated >= s.request.params.max_tokens]
    for s in ended:
        scheduler.finish(s)
    return ended


def at_once(_ref: AdapterRef) -> bool:
    """Every adapter has been read."""
    return True


class SchedulerMachine(RuleBasedStateMachine):
    """Adds, steps and cancels at random.  `line` is the order of arrival of what has not been admitted."""

    def __init__(self):
        super().__init__()
        self.scheduler = make()
        self.line: list[Sequence] = []
        self.running: list[Sequence] = []
        self.on_device: dict[int, AdapterRef] = {}  # what the loads put where
        self.slow: set[AdapterRef] = set()  # adapters that are being read
        self.count = 0

    @rule(ref=st.builds(adapter, st.integers(0, 4), st.integers(1, 2)))
    def disk(self, ref):
        """An adapter takes its time, or has been read."""
        self.slow ^= {ref}

    @rule(
        ref=st.none() | st.builds(adapter, st.integers(0, 4), st.integers(1, 2)),
        prompt=st.integers(1, 24),
        max_tokens=st.integers(1, 18),
    )
    def add(self, ref, prompt, max_tokens):
        self.count += 1
        request = ask(f"r{self.count}", ref, prompt, max_tokens)
        if -(-(prompt + max_tokens) // PAGE_TOKENS) > PAGES:
            with pytest.raises(InvalidRequest, match=str(PAGES * PAGE_TOKENS)):
                self.scheduler.add(request)
        elif len(self.line) == WAITING:
            with pytest.raises(Overloaded):
                self.scheduler.add(request)
        else:
            self.line.append(self.scheduler.add(request))

    @rule()
    def step(self):
        self.step_once()

    def step_once(self):
        pinned = {s.slot: s.request.adapter for s in self.running if s.slot != NO_ADAPTER}
        before = list(self.running)
        plan = self.scheduler.plan(lambda ref: ref not in self.slow)
        # Admitted is a head of the line, in order of arrival, and whoever is left there has a reason to be.
        admitted = [s for s in self.scheduler.running if all(s is not b for b in before)]
        assert all(x is y for x, y in zip(admitted, self.line, strict=False))
        self.line = self.line[len(admitted) :]
        self.running = before + admitted
        if self.line:
            head = self.line[0].request
            free_pages = PAGES - sum(len(s.pages) for s in self.running)
            used_slots = {s.slot: s.request.adapter for s in self.running if s.slot != NO_ADAPTER}
            assert (
                len(self.running) == ROWS
                or -(-(len(head.prompt) + head.params.max_tokens) // PAGE_TOKENS) > free_pages
                or (head.adapter is not None and len(used_slots) == SLOTS and head.adapter not in used_slots.values())
                or (head.adapter in self.slow and head.adapter not in self.on_device.values())
            ), "the head of the line fits and was not admitted"
        # Loads: only what has been read and is not resident, each once, never over a pinned slot.  Nothing else evicts.
        assert len({slot for _, slot in plan.load}) == len(plan.load)
        for ref, slot in plan.load:
            assert slot not in pinned
            assert ref not in self.on_device.values()
            assert ref not in self.slow
            assert ref in [s.request.adapter for s in admitted]
            self.on_device[slot] = ref
        assert self.scheduler.slots.resident() == {ref: slot for slot, ref in self.on_device.items()}
        for s in self.running:
            ref = s.request.adapter
            assert (s.slot == NO_ADAPTER) == (ref is None)
            assert ref is None or self.on_device[s.slot] == ref
            assert len(s.pages) == -(-(len(s.request.prompt) + s.request.params.max_tokens) // PAGE_TOKENS)
        self.check_work(plan)
        for s in advance(self.scheduler, plan):
            self.running = [r for r in self.running if r is not s]

    def check_work(self, plan):
        """Lanes and rows of a plan: within bounds, in order, nobody forgotten, prompt before decode."""
        assert len(plan.prefill) <= LANES
        assert all(1 <= c.count <= LANE_TOKENS for c in plan.prefill)
        chunked = {id(c.sequence) for c in plan.prefill}
        expected = {id(s) for s in self.running if s.done >= len(s.request.prompt)}
        assert {id(s) for s in plan.decode} == expected
        assert not chunked & expected
        assert bool(self.running) <= (not plan.empty)
        for s in self.running:
            place = s.done
            for c in plan.prefill:
                if c.sequence is s:
                    assert c.start == place
                    place += c.count
            assert place <= max(len(s.request.prompt), s.done)

    @precondition(lambda self: self.line or self.running)
    @rule(which=st.integers(0, 100), again=st.booleans())
    def cancel(self, which, again):
        everyone = self.line + self.running
        gone = everyone[which % len(everyone)]
        for _ in range(1 + again):  # harmless when repeated
            self.scheduler.finish(gone)
        self.line = [s for s in self.line if s is not gone]
        self.running = [s for s in self.running if s is not gone]

    @rule()
    def drain(self):
        """Every request ends within the steps its own and its predecessors' tokens take."""
        self.slow.clear()
        bound = sum(len(s.request.prompt) + s.request.params.max_tokens for s in self.line + self.running)
        for _ in range(bound):
            self.step_once()
        assert not self.line
        assert not self.running
        assert self.scheduler.pages.free == PAGES
        assert self.scheduler.plan(at_once).empty

    @invariant()
    def adds_up(self):
        self.scheduler.check()
        assert list(self.scheduler.waiting) == self.line
        assert self.scheduler.running == self.running
        pins = [sum(s.slot == slot for s in self.running) for slot in range(SLOTS)]
        assert self.scheduler.slots._pins == pins


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


def test_a_request_that_can_never_fit_is_refused_and_leaves_nothing():
    scheduler = make()
    limit = PAGES * PAGE_TOKENS
    scheduler.add(ask("fits", prompt=limit - 1, max_tokens=1))
    with pytest.raises(InvalidRequest, match=f"{limit + 1} tokens, this server holds {limit}") as caught:
        scheduler.add(ask("large", prompt=limit, max_tokens=1))
    assert caught.value.param == "max_tokens"
    assert len(scheduler.waiting) == 1


def test_the_line_is_bounded():
    scheduler = make()
    for i in range(WAITING):
        scheduler.add(ask(str(i)))
    with pytest.raises(Overloaded, match=f"{WAITING} requests"):
        scheduler.add(ask("more"))
    scheduler.plan(at_once)  # admits, so the line moves
    scheduler.add(ask("more"))


def test_nobody_overtakes_a_head_that_waits_for_a_slot():
    scheduler = make()
    first = [scheduler.add(ask(str(i), adapter(i))) for i in range(SLOTS)]
    scheduler.plan(at_once)
    blocked = scheduler.add(ask("blocked", adapter(9)))
    base = scheduler.add(ask("base"))  # would fit at once
    assert scheduler.plan(at_once).load == []
    assert list(scheduler.waiting) == [blocked, base]
    scheduler.finish(first[1])
    assert scheduler.plan(at_once).load == [(adapter(9), 1)]  # the slot that came free, not the pinned one
    assert not scheduler.waiting


def test_a_resident_adapter_is_not_loaded_again_and_the_oldest_leaves():
    scheduler = make()

    def serve(ref: AdapterRef) -> list[tuple[AdapterRef, int]]:
        s = scheduler.add(ask("x", ref))
        load = scheduler.plan(at_once).load
        scheduler.finish(s)
        return load

    assert serve(adapter(0)) == [(adapter(0), 0)]
    assert serve(adapter(1)) == [(adapter(1), 1)]
    assert serve(adapter(0)) == []
    assert serve(adapter(2)) == [(adapter(2), 1)]  # adapter 1 was used longest ago
    assert serve(adapter(0)) == []
    assert serve(adapter(0, version=2)) == [(adapter(0, version=2), 1)]  # another version is another adapter


def test_an_adapter_that_is_not_read_yet_evicts_nobody_and_keeps_its_place():
    scheduler = make()
    resident = [scheduler.add(ask(str(i), adapter(i))) for i in range(SLOTS)]
    scheduler.plan(at_once)
    for s in resident:
        scheduler.finish(s)
    cold, behind = scheduler.add(ask("cold", adapter(9))), scheduler.add(ask("behind", adapter(0)))
    assert scheduler.wanted(4) == [adapter(9)]
    for _ in range(3):
        assert scheduler.plan(lambda ref: False).load == []
    assert scheduler.slots.resident() == {adapter(0): 0, adapter(1): 1}
    assert list(scheduler.waiting) == [cold, behind]
    scheduler.finish(cold)  # it could not be read
    assert scheduler.plan(lambda ref: False).load == []
    assert scheduler.running == [behind]


def test_what_is_read_ahead_is_bounded_and_in_order():
    scheduler = make()
    for i in (3, 1, 3, 2, 0):
        scheduler.add(ask(f"{i}", adapter(i)))
    assert scheduler.wanted(9) == [adapter(3), adapter(1), adapter(2)]  # of as many requests as can run
    assert scheduler.wanted(2) == [adapter(3), adapter(1)]


def test_two_askers_of_one_adapter_cause_one_load():
    scheduler = make()
    for i in range(3):
        scheduler.add(ask(str(i), adapter(7)))
    assert scheduler.plan(at_once).load == [(adapter(7), 0)]
    assert [s.slot for s in scheduler.running] == [0, 0, 0]


def test_a_long_prompt_fills_the_lanes_in_order():
    scheduler = make()
    long = scheduler.add(ask("long", prompt=LANE_TOKENS * 3 + 2, max_tokens=2))
    short = scheduler.add(ask("short", prompt=2))
    plan = scheduler.plan(at_once)
    assert [(c.sequence, c.start, c.count) for c in plan.prefill] == [(long, i * 5, 5) for i in range(3)]
    advance(scheduler, plan)
    plan = scheduler.plan(at_once)
    assert [(c.sequence, c.start, c.count) for c in plan.prefill] == [(long, 15, 2), (short, 0, 2)]
    assert plan.decode == []
    advance(scheduler, plan)
    assert scheduler.plan(at_once).decode == [long, short]


def test_the_same_history_gives_the_same_plans():
    def plans() -> list[str]:
        scheduler, out = make(), []
        for i in range(20):
            if len(scheduler.waiting) < WAITING:
                scheduler.add(
                    ask(str(i), None if i % 3 == 0 else adapter(i % 4), prompt=1 + i % 9, max_tokens=1 + i % 5)
                )
            plan = scheduler.plan(at_once)
            out.append(repr((plan.load, [(c.start, c.count) for c in plan.prefill], len(plan.decode))))
            advance(scheduler, plan)
        return out

    assert plans() == plans()
