"""The scheduler: rows, pages, pins and counts add up, everybody's KV is their own, and everybody ends."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jaxlora.config.serving import SlotSize
from jaxlora.core.errors import InvalidRequest, Overloaded, RateLimited
from jaxlora.core.lora import AdapterRef
from serve.engine.page_cache import PageAllocator
from serve.engine.request import Request, SamplingParams
from serve.engine.scheduler import HELD_BACK, Limits, Scheduler
from serve.engine.sequence import Plan, Sequence, Status
from serve.engine.slots import SlotTable

SLOTS, PAGES, PAGE_TOKENS, QUANTUM = 2, 9, 4, 5.0
LIMITS = Limits(rows=4, lanes=3, few_lanes=1, lane_tokens=5, waiting=6, waiting_tokens=100, host_pages=4)


def adapter(number: int, tenant: str = "acme", version: int = 1) -> AdapterRef:
    return AdapterRef(tenant, f"bot{number}", version)


def ask(id: str, ref: AdapterRef | None = None, prompt: int = 3, max_tokens: int = 4, tenant: str = "acme") -> Request:
    """Prompts of one length are alike, so they share their KV."""
    params = SamplingParams(max_tokens=max_tokens)
    tenant = tenant if ref is None else ref.tenant
    return Request(id=id, tenant=tenant, adapter=ref, prompt=tuple(range(prompt)), params=params)


class World:
    """A scheduler, its clock, and what a device would hold: whose tokens the KV of each place was computed from."""

    def __init__(self, limits: Limits = LIMITS, pages: int = PAGES, slots: int = SLOTS, quantum: float = QUANTUM):
        allocator = PageAllocator(pages, PAGE_TOKENS)
        self.scheduler = Scheduler(SlotTable(slots), allocator, limits, quantum_s=quantum, active=slots)
        self.now = 0.0
        self.slow: set[AdapterRef] = set()  # adapters that are being read
        self.kv: list[list[object]] = [[None] * PAGE_TOKENS for _ in range(pages)]
        self.host: dict[int, list[list[object]]] = {}
        self.on_device: dict[int, AdapterRef] = {}  # what the loads put where
        self.preempted: set[int] = set()  # numbers of those that lost their row at least once

    def add(self, id: str, *args, **kwargs) -> Sequence:
        return self.scheduler.add(ask(id, *args, **kwargs), self.now)

    def plan(self) -> Plan:
        ran = {s.number for s in self.scheduler.running}
        wanted = self.scheduler.wanted(4)
        plan = self.scheduler.plan(self.now, [ref for ref in wanted if ref not in self.slow])
        self.preempted |= ran - {s.number for s in self.scheduler.running}
        self.scheduler.check()
        for s, pages in plan.save:
            self.host[s.number] = [list(self.kv[p]) for p in pages]
        for ref, slot in plan.load:
            assert ref not in self.on_device.values()
            self.on_device[slot] = ref
        for s, pages in plan.restore:
            for page, saved in zip(pages, self.host.pop(s.number), strict=True):
                self.kv[page] = saved
        assert self.scheduler.slots.resident() == {ref: slot for slot, ref in self.on_device.items()}
        assert len(plan.prefill) <= self.scheduler.limits.lanes
        assert all(1 <= c.count <= self.scheduler.limits.lane_tokens for c in plan.prefill)
        chunked = {c.sequence.number for c in plan.prefill}
        assert not chunked & {s.number for s in plan.decode}
        assert bool(self.scheduler.running) == bool(plan.prefill or plan.decode)
        return plan

    def resize(self, size: SlotSize) -> None:
        """What the engine does to change slots and pages."""
        self.preempted |= {s.number for s in self.scheduler.running}
        for s, pages in self.scheduler.vacate():
            self.host[s.number] = [list(self.kv[p]) for p in pages]
        moves = self.scheduler.resize(size, size.slots, self.now)
        self.kv = [[None] * PAGE_TOKENS for _ in range(size.pages)]
        self.on_device = {moves[slot]: ref for slot, ref in self.on_device.items() if slot in moves}
        assert self.scheduler.slots.resident() == {ref: slot for slot, ref in self.on_device.items()}

    def step(self) -> list[Sequence]:
        """Plans and does what the engine does with it; the sequences that ended."""
        plan = self.plan()
        self.now += 1.0
        for chunk in plan.prefill:
            s = chunk.sequence
            assert s.done == chunk.start
            for _ in range(chunk.count):
                self.compute(s)
            if s.prompt_left == 0:
                self.scheduler.computed(s)
                if s.generated == 0:
                    self.generate(s)
        for s in plan.decode:
            self.compute(s)
            self.generate(s)
        ended = [s for s in list(self.scheduler.running) if s.generated >= s.request.params.max_tokens]
        for s in ended:
            self.finish(s)
        return ended

    def compute(self, s: Sequence) -> None:
        """The KV of the sequence's next token, from all KV before it, which must be its own."""
        for i in range(s.done):
            assert self.kv[s.pages[i // PAGE_TOKENS]][i % PAGE_TOKENS] == (s.salt, tuple(s.tokens[: i + 1]))
        page, place = divmod(s.done, PAGE_TOKENS)
        self.kv[s.pages[page]][place] = (s.salt, tuple(s.tokens[: s.done + 1]))
        s.done += 1

    def generate(self, s: Sequence) -> None:
        """The next token depends on the ones before, whenever it is computed."""
        assert s.done == len(s.tokens)
        s.tokens.append(sum(s.tokens) % 7)

    def finish(self, s: Sequence) -> None:
        self.host.pop(s.number, None)
        self.scheduler.finish(s)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()


REFS = st.none() | st.builds(adapter, st.integers(0, 3), st.sampled_from(["acme", "bolt"]), st.integers(1, 2))


class SchedulerMachine(RuleBasedStateMachine):
    """Adds, steps and cancels at random, with adapters that are read slowly and settings that change."""

    def __init__(self):
        super().__init__()
        self.world = World()
        self.open: list[Sequence] = []
        self.count = 0

    @rule(ref=REFS)
    def disk(self, ref):
        """An adapter takes its time, or has been read."""
        self.world.slow ^= {ref} - {None}

    @rule(ref=REFS, prompt=st.integers(1, 24), max_tokens=st.integers(1, 18), tenant=st.sampled_from(["acme", "bolt"]))
    def add(self, ref, prompt, max_tokens, tenant):
        self.count += 1
        _, _, waiting = self.world.scheduler.counts()
        line = [s.request for s in self.open if s.status is Status.WAITING]
        tokens = sum(len(r.prompt) + r.params.max_tokens for r in line) + prompt + max_tokens

        def add():
            return self.world.add(f"r{self.count}", ref, prompt, max_tokens, tenant)

        if -(-(prompt + max_tokens) // PAGE_TOKENS) > PAGES != self.world.scheduler.pages.pages:
            return  # the engine refuses what the least pages do not hold
        if -(-(prompt + max_tokens) // PAGE_TOKENS) > PAGES:
            with pytest.raises(InvalidRequest, match=str(PAGES * PAGE_TOKENS)):
                add()
        elif len(line) == LIMITS.waiting or (line and tokens > LIMITS.waiting_tokens):
            with pytest.raises(Overloaded):
                add()
        elif self.holds_its_share(line, tenant if ref is None else ref.tenant):
            with pytest.raises(RateLimited):
                add()
        else:
            self.open.append(add())
            assert self.world.scheduler.counts()[2] == waiting + 1

    def holds_its_share(self, line, tenant) -> bool:
        own = [r for r in line if r.tenant == tenant]
        tokens, own_tokens = (sum(len(r.prompt) + r.params.max_tokens for r in some) for some in (line, own))
        return len(own) > 2 * (LIMITS.waiting - len(line)) or own_tokens > 2 * (LIMITS.waiting_tokens - tokens)

    @rule()
    def step(self):
        for s in self.world.step():
            self.open.remove(s)

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 100), again=st.booleans())
    def cancel(self, which, again):
        gone = self.open.pop(which % len(self.open))
        for _ in range(1 + again):  # harmless when repeated
            self.world.finish(gone)

    @rule(limit=st.integers(1, SLOTS), quantum=st.sampled_from([1.0, 5.0, 20.0]), lanes=st.integers(1, 3))
    def tune(self, limit, quantum, lanes):
        scheduler = self.world.scheduler
        limit = min(limit, scheduler.slots.count)
        scheduler.active.limit, scheduler.active.quantum_s, scheduler.prefill_lanes = limit, quantum, lanes

    @rule(slots=st.integers(1, SLOTS + 1), pages=st.sampled_from([PAGES, PAGES + 3]))
    def resize(self, slots, pages):
        self.world.resize(SlotSize(slots=slots, pages=pages))
        assert not self.world.scheduler.running
        assert self.world.scheduler.pages.free == pages

    @rule()
    def drain(self):
        """Everybody ends, in a time that the work bounds: rows and slots go round, and each turn brings a step forward."""
        self.world.slow.clear()
        work = sum(len(s.request.prompt) + s.request.params.max_tokens for s in self.open)
        for _ in range(20 + 10 * work):
            for s in self.world.step():
                self.open.remove(s)
        assert not self.open
        assert self.world.scheduler.pages.free == self.world.scheduler.pages.pages
        assert self.world.scheduler.counts() == (0, 0, 0)
        assert self.world.plan().empty

    @invariant()
    def adds_up(self):
        self.world.scheduler.check()
        assert sum(self.world.scheduler.counts()) == len(self.open)
        saved = {s.number for s in self.open if s.status is Status.OFFLOADED}
        assert saved == set(self.world.host)


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=60, stateful_step_count=40)


def test_a_request_that_can_never_fit_is_refused_and_leaves_nothing():
    world = World()
    limit = PAGES * PAGE_TOKENS
    world.add("fits", prompt=limit - 1, max_tokens=1)
    with pytest.raises(InvalidRequest, match=f"{limit + 1} tokens, this server holds {limit}") as caught:
        world.add("large", prompt=limit, max_tokens=1)
    assert caught.value.param == "max_tokens"
    assert world.scheduler.counts() == (0, 0, 1)


def test_the_line_is_bounded_by_requests_and_by_tokens():
    world = World()
    for i in range(LIMITS.waiting):
        world.add(str(i), tenant=("acme", "bolt")[i % 2])
    with pytest.raises(Overloaded, match=f"{LIMITS.waiting} requests"):
        world.add("more")
    world.step()  # some start, so the line moves
    world.add("more")
    world = World()
    for i in range(3):
        world.add(str(i), prompt=20, max_tokens=12)
    with pytest.raises(Overloaded, match="96 tokens are waiting already, with 100"):
        world.add("more", prompt=3, max_tokens=2, tenant="bolt")
    world.add("small", prompt=3, max_tokens=1, tenant="bolt")


def test_what_is_left_to_compute_is_counted_for_each_adapter():
    world = World(slots=1)
    first, second = adapter(0), adapter(1)
    for id, ref in (("base", None), ("one", first), ("other", first), ("waits", second)):
        world.add(id, ref, prompt=3, max_tokens=4)
    assert world.scheduler.left() == {None: (0, 7), first: (0, 14), second: (0, 7)}
    world.step()  # a prompt each, and the first token
    assert world.scheduler.left() == {None: (3, 0), first: (6, 0), second: (0, 7)}
    for _ in range(10):
        world.step()
    assert world.scheduler.left() == {}


@pytest.mark.fault("R4", "T7")
def test_a_tenant_that_floods_the_line_leaves_room_for_every_other():
    """300 of one tenant come first, and again whenever one has begun; another's request still enters at once."""
    limits = Limits(rows=4, lanes=3, few_lanes=1, lane_tokens=5, waiting=90, waiting_tokens=9999, host_pages=4)
    world, refusals = World(limits), []
    for step in range(20):
        for i in range(300):
            try:
                world.add(f"flood-{step}-{i}", tenant="flood")
            except RateLimited as error:
                refusals.append(error)
        assert world.scheduler.line.requests <= 2 / 3 * limits.waiting + 2 + step
        world.add(f"quiet-{step}", tenant="quiet")
        world.step()
    assert len(refusals) > 20 * 200
    assert all(error.retry_after_s > 0 for error in refusals)


def test_a_tenant_of_long_requests_leaves_tokens_of_the_line_to_others():
    limits = Limits(rows=4, lanes=3, few_lanes=1, lane_tokens=5, waiting=90, waiting_tokens=300, host_pages=4)
    world = World(limits)
    for i in range(7):  # 224 of 300 tokens
        world.add(f"long-{i}", prompt=20, max_tokens=12, tenant="long")
    with pytest.raises(RateLimited, match="7 of your requests, of 224 tokens"):
        world.add("one-more", prompt=20, max_tokens=12, tenant="long")
    world.add("other", prompt=20, max_tokens=12, tenant="other")


def test_requests_of_the_base_overtake_one_that_waits_for_a_slot():
    world = World(quantum=1000.0)
    for i in range(SLOTS):
        world.add(str(i), adapter(i), max_tokens=30, prompt=1)
    world.run(2)
    blocked, base = world.add("blocked", adapter(9)), world.add("base")
    world.step()
    assert base.status is Status.RUNNING
    assert blocked.status is Status.WAITING


def test_an_adapter_past_its_quantum_leaves_and_its_requests_go_on_where_they_were():
    world = World(pages=40)
    first = [world.add(str(i), adapter(i), max_tokens=30) for i in range(SLOTS)]
    world.step()
    late = world.add("late", adapter(9), max_tokens=12)
    world.run(int(QUANTUM) - 1)
    assert late.status is Status.WAITING
    world.step()
    assert late.status is Status.RUNNING
    # The lower slot of two that are active equally long.
    assert [s.status for s in first] == [Status.PREEMPTED, Status.RUNNING]
    done, generated = first[0].done, first[0].generated
    world.run(int(QUANTUM))
    assert first[0].status is Status.RUNNING
    assert (first[0].done, first[0].generated) >= (done, generated)
    assert world.scheduler.recomputed_tokens == 0
    world.run(80)
    assert world.scheduler.counts() == (0, 0, 0)


@pytest.mark.parametrize("host_pages", [0, 40])
def test_preempted_kv_gives_way_to_the_host_or_is_computed_again(host_pages):
    """The pool holds little more than one request: all finish."""
    limits = Limits(rows=4, lanes=3, few_lanes=1, lane_tokens=5, waiting=9, waiting_tokens=999, host_pages=host_pages)
    world = World(limits, pages=6)
    open_ = [world.add(str(i), adapter(i), prompt=8, max_tokens=12) for i in range(5)]
    saves = 0
    for _ in range(400):
        world.step()
        saves += len(world.host)
    assert world.scheduler.counts() == (0, 0, 0)
    assert world.preempted
    assert (world.scheduler.recomputed_tokens > 0) == (host_pages == 0)
    assert (saves > 0) == (host_pages > 0)
    alone = World()
    reference = alone.add("alone", adapter(0), prompt=8, max_tokens=12)
    alone.run(30)
    assert all(s.tokens == reference.tokens for s in open_)


def test_a_group_without_a_row_takes_one_from_the_group_with_the_most():
    world = World(replace(LIMITS, waiting_tokens=200), pages=60)
    many = [world.add(str(i), adapter(0), max_tokens=20) for i in range(LIMITS.rows)]
    world.step()
    one = world.add("one", adapter(1), max_tokens=2)
    world.step()
    assert one.status is Status.RUNNING
    assert [s.status for s in many] == [*[Status.RUNNING] * 3, Status.PREEMPTED]
    world.run(2)
    assert one.status is Status.FINISHED
    assert all(s.status is Status.RUNNING for s in many)


@pytest.mark.fault("T7")
def test_rows_go_to_the_tenant_that_was_served_least():
    """Fifty adapters of one tenant against one of another, both with work without end."""
    limits = Limits(rows=8, lanes=8, few_lanes=1, lane_tokens=5, waiting=999, waiting_tokens=99999, host_pages=0)
    world = World(limits, pages=400, slots=4)
    count = 0
    tokens = {"hoard": 0, "small": 0}

    def top_up():
        nonlocal count
        for tenant, adapters in (("hoard", 50), ("small", 1)):
            for i in range(adapters):
                for _ in range(8 // adapters + 1):
                    if world.scheduler._tenants[tenant] < 60:
                        count += 1
                        world.add(f"r{count}", adapter(i, tenant), max_tokens=20, prompt=3)

    for i in range(900):
        top_up()
        ended = world.step()
        if i > 100:
            for s in ended:
                tokens[s.request.tenant] += len(s.tokens)
    assert abs(tokens["hoard"] - tokens["small"]) <= 0.1 * sum(tokens.values())


def test_a_prompt_that_was_computed_before_is_not_computed_again():
    world = World(pages=30)
    world.add("first", adapter(0), prompt=14, max_tokens=2)
    world.run(6)
    again, other = world.add("again", adapter(0), prompt=14), world.add("other", adapter(1), prompt=14)
    version = world.add("version", adapter(0, version=2), prompt=14)
    base = world.add("base", prompt=14)
    world.run(30)
    assert (again.cached_tokens, other.cached_tokens, version.cached_tokens, base.cached_tokens) == (12, 0, 0, 0)


@pytest.mark.fault("T2")
def test_what_one_tenant_asked_the_base_no_other_finds():
    world = World(pages=30)
    world.add("secret", prompt=14, max_tokens=2)
    world.run(6)
    own, probe = world.add("own", prompt=14), world.add("probe", prompt=14, tenant="bolt")
    world.run(30)
    assert own.request.prompt == probe.request.prompt
    assert (own.cached_tokens, probe.cached_tokens) == (12, 0)


def test_a_resident_adapter_is_not_loaded_again_and_the_oldest_leaves():
    world = World()

    def serve(ref: AdapterRef) -> list[tuple[AdapterRef, int]]:
        s = world.add("x", ref)
        load = world.plan().load
        world.finish(s)
        return load

    assert serve(adapter(0)) == [(adapter(0), 0)]
    assert serve(adapter(1)) == [(adapter(1), 1)]
    assert serve(adapter(0)) == []
    assert serve(adapter(2)) == [(adapter(2), 1)]  # adapter 1 was used longest ago
    assert serve(adapter(0)) == []
    assert serve(adapter(0, version=2)) == [(adapter(0, version=2), 1)]  # another version is another adapter


def test_two_askers_of_one_adapter_cause_one_load():
    world = World()
    askers = [world.add(str(i), adapter(7)) for i in range(3)]
    assert world.plan().load == [(adapter(7), 0)]
    assert [s.slot for s in askers] == [0, 0, 0]


def test_lanes_go_round_before_a_long_prompt_gets_a_second_one():
    world = World(pages=30)
    long = world.add("long", prompt=17, max_tokens=2)
    plan = world.plan()
    assert [(c.sequence, c.start, c.count) for c in plan.prefill] == [(long, i * 5, 5) for i in range(3)]
    short = world.add("short", prompt=2)
    plan = world.plan()
    assert [(c.sequence, c.start, c.count) for c in plan.prefill] == [(long, 0, 5), (long, 5, 5), (short, 0, 2)]
    world.step()
    assert world.plan().decode == [short]


@pytest.mark.parametrize("decodes", [True, False])
def test_one_tenants_prompts_take_the_smallest_program_while_another_decodes(decodes):
    limits = replace(LIMITS, rows=4, lanes=3, waiting=60, waiting_tokens=10_000)
    world = World(limits, pages=200)
    if decodes:
        world.add("quiet", tenant="quiet", prompt=3, max_tokens=40)
    world.step()
    for i in range(40):
        world.add(f"flood{i}", tenant="loud", prompt=20 + i, max_tokens=1)
    for _ in range(3):
        world.step()  # served alike at first; from then on the loud one is ahead
    lanes = []
    for _ in range(12):
        plan = world.plan
        world.plan = lambda plan=plan: lanes.append(made := plan()) or made
        world.step()
        world.plan = plan
    assert {len(made.prefill) for made in lanes} == {1 if decodes else 3}


def test_a_stream_of_small_prompts_keeps_no_large_tenant_waiting_for_ever():
    limits = replace(LIMITS, rows=8, lanes=2, lane_tokens=4, waiting=90, waiting_tokens=10_000)
    world, waited, longest = World(limits, pages=400), 0, 0
    for i in range(8):
        world.add(f"flood{i}", tenant="loud", prompt=60 + i, max_tokens=2)
    for i in range(24):
        world.add(f"small{i}", tenant=f"small{i}", prompt=6, max_tokens=1)
        plan, plans = world.plan, []
        world.plan = lambda plan=plan, plans=plans: plans.append(made := plan()) or made
        world.step()
        world.plan = plan
        served = any(chunk.sequence.request.tenant == "loud" for chunk in plans[0].prefill)
        waited = 0 if served else waited + 1
        longest = max(longest, waited)
    assert 1 <= longest <= HELD_BACK


def test_the_prompt_of_the_tenant_that_was_served_least_has_the_first_lane_of_every_step():
    limits = replace(LIMITS, rows=4, lanes=2, lane_tokens=4, waiting=60, waiting_tokens=10_000)
    for before in range(2):  # whether or not the loud one's prompts are left out of the step
        world = World(limits, pages=200)
        world.add("decodes", tenant="loud", prompt=9, max_tokens=60)
        for i in range(8):
            world.add(f"flood{i}", tenant="loud", prompt=40 + i, max_tokens=2)
        for _ in range(6 + before):
            world.step()
        newcomer = world.add("quiet", tenant="quiet", prompt=4, max_tokens=4)
        assert world.plan().prefill[0].sequence is newcomer


def test_the_same_history_gives_the_same_plans():
    def plans() -> list[str]:
        world, out = World(), []
        for i in range(30):
            if world.scheduler.counts()[2] < LIMITS.waiting:
                ref = None if i % 3 == 0 else adapter(i % 4)
                world.add(str(i), ref, prompt=1 + i % 9, max_tokens=1 + i % 5)
            world.step()
            out.append(repr([(s.number, s.slot, s.pages) for s in world.scheduler.running]))
        return out

    assert plans() == plans()


def test_a_change_of_slots_keeps_the_turns_of_those_that_run_and_moves_their_kv_to_the_host():
    world = World(replace(LIMITS, rows=3), pages=40, slots=3)
    first, second, base = world.add("a", adapter(0), 6, 9), world.add("b", adapter(1), 6, 9), world.add("c", None, 6, 9)
    world.run(3)
    late = world.add("d", None, 6, 9, tenant="bolt")
    entered = dict(world.scheduler.active.entered)
    world.resize(SlotSize(slots=2, pages=36))
    assert world.scheduler.slots.count == 2
    assert world.scheduler.active.entered == entered
    kept = [s.status is Status.OFFLOADED for s in (first, second, base)]
    assert kept == [True, True, False]  # what has no room on the host is computed again
    world.plan()
    assert [s.number for s in world.scheduler.running] == [first.number, second.number, base.number]
    assert late.status is Status.WAITING
    world.run(40)
    assert all(s.generated == 9 for s in (first, second, base, late))


def test_where_more_are_active_than_slots_remain_those_that_are_active_longest_leave():
    world = World(slots=3)
    for number in range(3):
        world.add(f"r{number}", adapter(number), 3, 9)
        world.step()
    world.resize(SlotSize(slots=1, pages=PAGES))
    assert list(world.scheduler.active.entered) == [adapter(2)]
    assert world.scheduler.slots.resident() == {adapter(2): 0}
    assert world.scheduler.active.limit == 1
    world.now += 2 * QUANTUM
    world.run(60)
    assert world.scheduler.counts() == (0, 0, 0)


def test_want_of_pages_is_counted_and_slots_that_are_all_in_use_are_waited_for():
    world = World(pages=4, slots=1)
    for id in "ab":
        world.add(id, None, 8, 4)
    world.step()
    assert world.scheduler.shortages == 1  # the second has no pages
    world.add("c", adapter(0))
    world.add("d", adapter(1))
    world.now += 1.0
    world.step()
    world.now += 1.0
    demand = world.scheduler.demand(world.now)
    assert (demand.adapters, demand.pages) == (2, 4)
    assert demand.waited_s == world.now - 1.0
    world.scheduler.active.limit = 0  # as an operator may allow fewer than there are
    assert world.scheduler.demand(world.now).waited_s == 0.0
