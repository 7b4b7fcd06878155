"""Decides which requests run in the next step.  Pure host code: state and clock in, plan out.

`ActiveSet` decides which adapters are active.  A request runs when its adapter is active (the base model always is) and
it has a row of the decode batch; it takes KV pages as it grows.  Every group (an adapter version, or a tenant's requests
of the base) gets one row first; further rows go to the tenant that was served least.  A preempted request goes on at
the same token.

When running requests need pages, those of preempted requests move to the host or, without room there, are dropped and
computed again.  Then the request that got its row last is preempted.  The first one never is, so some request always
ends.  `apply` changes the settings of a running scheduler, all or none, between two steps.
"""

from __future__ import annotations

from collections import Counter, abc
from collections.abc import Callable, Collection, Hashable, Iterator
from dataclasses import dataclass

from jaxlora.config.serving import SlotSize, Tuning
from jaxlora.core.errors import InvalidRequest, Overloaded, RateLimited
from jaxlora.core.lora import AdapterRef
from pallas_kernels import NO_ADAPTER
from serve.engine.page_cache import PageAllocator
from serve.engine.request import Request
from serve.engine.sequence import AdapterQueue, Chunk, Plan, Sequence, Status
from serve.engine.slot_scheduler import ActiveSet, TokenShares, Work
from serve.engine.slots import Demand, SlotTable

HELD_BACK = 3  # steps in a row in which the smallest prefill program has no room for a large tenant's prompts


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The resources that a plan may use."""

    rows: int  # sequences that run at once
    lanes: int  # prompt chunks of a step
    few_lanes: int  # of the smallest prefill program
    lane_tokens: int  # tokens of a chunk
    waiting: int  # requests that wait for their first step before new ones are refused
    waiting_tokens: int  # sum of their prompts and max_tokens
    host_pages: int  # pages of KV that preempted requests may keep on the host


class WaitingLine:
    """Counts the requests that have not run yet: they are bounded, and no tenant keeps the others out.

    A tenant may hold at most SHARE times what is still free for everyone, so the fuller the line, the less of it is one's.
    """

    SHARE = 2  # one tenant alone fills two thirds of the line
    RETRY_S = 1.0

    def __init__(self, limits: Limits):
        self._limits = limits
        self.requests, self.tokens = 0, 0
        self._requests: Counter[str] = Counter()  # of a tenant
        self._tokens: Counter[str] = Counter()

    def enter(self, tenant: str, tokens: int) -> None:
        """Counts one more request.  Raises Overloaded when the line is full, RateLimited for more than the tenant's share."""
        free, free_tokens = self._limits.waiting - self.requests, self._limits.waiting_tokens - self.tokens
        if free <= 0:
            raise Overloaded(f"{self._limits.waiting} requests are waiting already; retry later")
        if self.requests and tokens > free_tokens:
            raise Overloaded(
                f"requests of {self.tokens} tokens are waiting already, with {self._limits.waiting_tokens} the "
                "queue is full; retry later"
            )
        own, own_tokens = self._requests[tenant], self._tokens[tenant]
        if own > self.SHARE * free or own_tokens > self.SHARE * free_tokens:
            raise RateLimited(
                f"{own} of your requests, of {own_tokens} tokens, are waiting already, which is your share of the queue; "
                "retry when some have begun",
                retry_after_s=self.RETRY_S,
            )
        self._count(tenant, 1, tokens)

    def leave(self, tenant: str, tokens: int) -> None:
        """Counts one less."""
        self._count(tenant, -1, -tokens)

    def _count(self, tenant: str, requests: int, tokens: int) -> None:
        self.requests += requests
        self.tokens += tokens
        self._requests[tenant] += requests
        self._tokens[tenant] += tokens
        if self._requests[tenant] == 0:
            del self._requests[tenant], self._tokens[tenant]

    def check(self, waiting: list[Request]) -> None:
        """Asserts that exactly these requests are counted."""
        assert (self.requests, self.tokens) == (len(waiting), sum(map(_tokens, waiting)))
        assert self._requests == Counter(r.tenant for r in waiting)


class Scheduler:
    """Schedules all sequences, from the waiting queue to their end."""

    def __init__(
        self,
        slots: SlotTable,
        pages: PageAllocator,
        limits: Limits,
        *,
        quantum_s: float,
        active: int,
        rank_of: Callable[[AdapterRef], int] = lambda _: 0,
    ):
        """rank_of: as `ActiveSet` takes it."""
        self.active = ActiveSet(slots, quantum_s=quantum_s, limit=active, rank_of=rank_of)
        self.slots, self.pages, self.limits = slots, pages, limits
        self.prefill_lanes = limits.lanes  # of a step in which others decode; may change at any time
        self.shares = TokenShares()
        self.running: list[Sequence] = []  # the one that got its row first is first
        self._groups: dict[Hashable, dict[int, Sequence]] = {}  # unfinished ones by arrival
        self._work: dict[AdapterRef, Work] = {}
        self._preempted: dict[int, Sequence] = {}  # those that have pages but no row; the newest is last
        self._places = list(range(limits.rows))  # without a sequence that runs
        self._rows: Counter[Hashable] = Counter()  # of a group
        self._tenant_rows: Counter[str] = Counter()
        self._tenants: Counter[str] = Counter()  # unfinished requests
        self.line = WaitingLine(limits)
        self._number = 0
        self._held_back = 0  # steps in a row that left prompts out, see `_prefill`
        self.host_pages = 0  # in use
        self.recomputed_tokens = 0  # whose KV was dropped and is computed once more
        self.preemptions = 0  # times that a request lost its row before its end
        self.shortages = 0  # times that a request had to wait or to give way for want of pages

    # ---- coming and going -----------------------------------------------------------------------------------------

    def add(self, request: Request, now: float) -> Sequence:
        """Puts a request at the end of the queue and returns its sequence.

        Raises InvalidRequest when it can never fit the KV pages, Overloaded and RateLimited as `WaitingLine.enter` does.
        """
        tokens = _tokens(request)
        if self.pages.needed(tokens) > self.pages.pages:
            limit = self.pages.pages * self.pages.page_tokens
            raise InvalidRequest(
                f"prompt and max_tokens are {tokens} tokens, this server holds {limit}; ask for fewer",
                param="max_tokens",
            )
        self.line.enter(request.tenant, tokens)
        self._number += 1
        sequence = Sequence(request, list(request.prompt), request.adapter, self._number, now, now)
        self._groups.setdefault(sequence.group, {})[sequence.number] = sequence
        if request.adapter is not None:
            self._work.setdefault(request.adapter, Work(now))
        self._tenants[request.tenant] += 1
        if self._tenants[request.tenant] == 1:
            self.shares.keep(self._tenants)
        return sequence

    def finish(self, sequence: Sequence) -> None:
        """Ends a sequence in any state and frees its row and pages.  Idempotent."""
        if sequence.status is Status.FINISHED:
            return
        del self._groups[sequence.group][sequence.number]
        if sequence.status is Status.RUNNING:
            self._leave_row(sequence)
        elif sequence.status is Status.WAITING:
            self._leave_queue(sequence)
        elif sequence.status is Status.OFFLOADED:
            self.host_pages -= self.pages.needed(sequence.done)
        sequence.status = Status.FINISHED
        self._preempted.pop(sequence.number, None)
        self.pages.give_back(sequence.pages)
        sequence.pages = []
        self._settle_group(sequence.group, sequence.adapter)
        tenant = sequence.request.tenant
        self._tenants[tenant] -= 1
        if self._tenants[tenant] == 0:
            del self._tenants[tenant]
            self.shares.keep(self._tenants)

    def _settle_group(self, group: Hashable, ref: AdapterRef | None) -> None:
        """Updates the tables after a request has entered or left the group."""
        left = self._groups[group]
        if not left:
            del self._groups[group]
            if ref is not None:
                del self._work[ref]
        elif ref is not None:
            self._work[ref].oldest = next(iter(left.values())).arrived

    def follow(self, new: AdapterRef) -> list[AdapterRef]:
        """Moves the requests that follow this adapter to its new version.  Returns the version each had before.

        They keep their KV and their places in the queue.  Running ones are preempted until the new version is active,
        which it is in the next plan if it lies in a slot and there is room.
        """
        followers = [
            (ref, s)
            for ref in [r for r in self._work if (r.tenant, r.name) == (new.tenant, new.name) and r != new]
            for s in self._groups[ref].values()
            if s.request.follow
        ]
        for old, s in sorted(followers, key=lambda x: x[1].number):
            if s.status is Status.RUNNING:
                self._preempt(s, s.since)
            del self._groups[s.group][s.number]
            self._settle_group(s.group, old)
            s.adapter = new
            self._groups.setdefault(new, {})[s.number] = s
            self._work.setdefault(new, Work(s.arrived))
        if followers:  # some may be older than requests for the new version
            self._groups[new] = dict(sorted(self._groups[new].items()))
            self._settle_group(new, new)
        return [old for old, _ in followers]

    def forget(self, ref: AdapterRef) -> None:
        """Drops the cached pages of a version that no request uses any more."""
        for salt in self.pages.salts:
            if isinstance(salt, tuple) and ref in salt:
                self.pages.forget(salt)

    def wanted(self, count: int) -> list[AdapterRef]:
        """Returns the adapters to read now: those that enter next and lie in no slot, at most `count`."""
        return self.active.wanted(self._work, count)

    def demand(self, now: float) -> Demand:
        """Returns what decides on the number of slots."""
        active = self.active
        waits = [now - work.since for ref, work in self._work.items() if ref not in active.entered]
        full = len(active.entered) == active.limit == self.slots.count
        return Demand(
            adapters=len(active.pinned | self._work.keys()),
            waited_s=max(waits, default=0.0) if full else 0.0,
            pages=self.pages.pages - self.pages.free,
            shortages=self.shortages,
        )

    def settle(self) -> None:
        """Releases the slots of adapters without work, before another one is chosen."""
        self.active.settle(self._work)

    def vacate(self) -> list[tuple[Sequence, list[int]]]:
        """Preempts every sequence, and empties all pages.  Returns the KV to copy to the host; the rest is computed again.

        Followers go to the host first, as nothing computes again what older versions of their adapter have made, then
        those that run, which keep their places in the queue.
        """
        running, plan = list(self.running), Plan()
        preempted = list(reversed(self._preempted.values()))
        for s in running:
            self._preempt(s, s.since)
        self._preempted.clear()
        for s in sorted([*running, *preempted], key=lambda s: s.salt is not None):
            self._offload_or_drop(s, plan)
        return plan.save

    def resize(self, size: SlotSize, limit: int, now: float) -> dict[int, int]:
        """Changes slots and pages once `vacate` has emptied these.  Returns the moves of slots, as `ActiveSet.resize` does."""
        self.pages.resize(size.pages)
        return self.active.resize(size.slots, limit, now, self._work)

    def counts(self) -> tuple[int, int, int]:
        """Returns the numbers of (running, preempted, waiting) requests."""
        running, waiting = len(self.running), self.line.requests
        return running, self._tenants.total() - running - waiting, waiting

    def queues(self) -> dict[AdapterRef, AdapterQueue]:
        """Returns the adapters with unfinished requests, in no order."""
        rows = self._rows
        return {r: AdapterQueue(work.since, rows[r], len(self._groups[r]) - rows[r]) for r, work in self._work.items()}

    def left(self) -> dict[AdapterRef | None, tuple[int, int]]:
        """Returns the tokens still to be computed at most for each adapter: of requests that run, and of all others.

        Those of the base are under None.
        """
        left: dict[AdapterRef | None, tuple[int, int]] = {}
        for group in self._groups.values():
            for s in group.values():
                tokens = s.prompt_left + s.request.params.max_tokens - s.generated
                running, others = left.get(s.adapter, (0, 0))
                is_running = s.status is Status.RUNNING
                left[s.adapter] = (running + tokens, others) if is_running else (running, others + tokens)
        return left

    def check(self) -> None:
        """Asserts that rows, pages, pins and counts add up."""
        everyone = [s for group in self._groups.values() for s in group.values()]
        assert len(self.running) <= self.limits.rows
        running = {s.number for s in everyone if s.status is Status.RUNNING}
        assert sorted(running) == sorted(s.number for s in self.running)
        assert sorted([*self._places, *(s.place for s in self.running)]) == list(range(self.limits.rows))
        assert all(0 <= s.pending <= 1 for s in everyone)
        assert all(
            s.slot == NO_ADAPTER if (r := s.adapter) is None else self.slots.find(r) == s.slot for s in self.running
        )
        assert set(self._preempted) == {s.number for s in everyone if s.status is Status.PREEMPTED and s.pages}
        offloaded = [s for s in everyone if s.status is Status.OFFLOADED]
        assert not any(s.pages for s in everyone if s.status in (Status.WAITING, Status.OFFLOADED))
        assert self.host_pages == sum(self.pages.needed(s.done) for s in offloaded) <= self.limits.host_pages
        self.line.check([s.request for s in everyone if s.status is Status.WAITING])
        assert self._tenants == Counter(s.request.tenant for s in everyone)
        self.pages.check([p for s in everyone for p in s.pages])
        self.active.check()

    # ---- the plan -------------------------------------------------------------------------------------------------

    def plan(self, now: float, ready: Collection[AdapterRef]) -> Plan:
        """Plans the next step; what was launched before counts as computed.

        ready: adapters that have been read and can be copied into a slot.
        """
        plan = Plan()
        entered = self.active.entered
        held = {r for s in self.running if s.recovering and (r := s.adapter) and s.since == entered.get(r)}
        exchange = self.active.exchange(now, self._work, ready, held)
        if exchange.leave:
            for s in [s for s in self.running if s.adapter in exchange.leave]:
                self._preempt(s, now)
        plan.load = exchange.load
        page_tokens = self.pages.page_tokens
        for s in list(self.running):
            if s.done >= len(s.pages) * page_tokens and s.status is Status.RUNNING and s.decodes:
                self._grow(s, now, plan)
        self._seat(now, plan)
        plan.decode = [s for s in self.running if s.decodes]
        lanes = self.prefill_lanes if plan.decode else self.limits.lanes
        plan.prefill = self._prefill(lanes) if len(plan.decode) < len(self.running) else []
        for chunk in plan.prefill:
            self.shares.add(chunk.sequence.request.tenant, chunk.count, 0)
        for tenant, rows in Counter([s.request.tenant for s in plan.decode]).items():
            self.shares.add(tenant, 0, rows)
        return plan

    def computed(self, sequence: Sequence) -> None:
        """The KV of `done` tokens is there: whole pages of it may serve other requests with the same beginning."""
        if (salt := sequence.salt) is not None:
            self.pages.register(salt, sequence.tokens[: sequence.done], sequence.pages)

    def _prefill(self, lanes: int) -> list[Chunk]:
        """Returns the chunks of prompts of the next step, of the tenant that was served least first.

        Decoding waits for them, and so do the prompts beside them.  A tenant that has more rows than one that was served
        no more therefore has its prompts computed in what the others leave of the smallest program; where that is
        nothing for HELD_BACK steps, in a lane of the next.  No flood of prompts keeps its neighbours from decoding or
        beginning.
        """
        prompts = [s for s in self.running if s.prompt_left > 0]
        if not prompts:
            return []
        order = {t: (self.shares.served(t), self._row_share(t)) for t in self._tenant_rows}
        fewest, modest = float("inf"), set()
        for tenant in sorted(order, key=order.__getitem__):
            fewest = min(fewest, order[tenant][1])
            if order[tenant][1] <= fewest:
                modest.add(tenant)
        prompts.sort(key=lambda s: order[s.request.tenant])
        theirs = [s for s in prompts if s.request.tenant in modest]
        others = [s for s in prompts if s.request.tenant not in modest]
        due = bool(others) and self._held_back >= HELD_BACK
        chunks = self._chunks(theirs, lanes - due)
        room = max(min(self.limits.few_lanes, lanes) - len(chunks), int(due))
        self._held_back = self._held_back + 1 if others and room == 0 else 0
        return chunks + self._chunks(others, room)

    def _chunks(self, needy: list[Sequence], lanes: int) -> list[Chunk]:
        """Returns at most so many chunks of unfinished prompts: one for each sequence, then more for the first of them."""
        needy = needy[:lanes]
        count = Counter({s.number: 1 for s in needy})
        free = lanes - len(needy)
        for s in needy:
            more = min(-(-s.prompt_left // self.limits.lane_tokens) - 1, free)
            count[s.number] += more
            free -= more
        chunks = []
        for s in needy:
            end = s.done + s.prompt_left
            for start in range(s.done, end, self.limits.lane_tokens)[: count[s.number]]:
                chunks.append(Chunk(s, start, min(end - start, self.limits.lane_tokens)))
        return chunks

    # ---- rows -----------------------------------------------------------------------------------------------------

    def _seat(self, now: float, plan: Plan) -> None:
        """Gives rows to requests that may run: first to groups without a row, by wait, then to the tenant served least."""
        if len(self.running) == self._tenants.total():
            return
        queues: dict[Hashable, Iterator[Sequence]] = {
            group: (s for s in list(self._groups[group].values()) if s.status is not Status.RUNNING and not s.pending)
            for group in (*self.active.entered, *self._tenants)
            if group in self._groups
        }
        heads: dict[Hashable, Sequence] = {
            group: s for group, queue in queues.items() if (s := next(queue, None)) is not None
        }

        def turn(group: Hashable) -> tuple:
            s = heads[group]
            return (1, self.shares.served(s.request.tenant), s.number) if self._rows[group] else (0, s.since, s.number)

        while heads:
            group = min(heads, key=turn)
            if not self._start(heads.pop(group), now, plan):
                continue  # nor can another of its group
            if (after := next(queues[group], None)) is not None:
                heads[group] = after

    def _start(self, s: Sequence, now: float, plan: Plan) -> bool:
        """Gives the sequence a row, and pages for all its tokens.  Returns whether there was room."""
        victim = None
        if len(self.running) >= self.limits.rows:
            victim = self._victim(s, now)
            if victim is None:
                return False
        was_preempted = self._preempted.pop(s.number, None)  # its own pages are not taken from it
        if not s.pages and s.status is not Status.OFFLOADED and not s.scoring:
            s.pages = [] if (salt := s.salt) is None else self.pages.match(salt, s.tokens)
            s.done = len(s.pages) * self.pages.page_tokens
        need = self.pages.needed(min(len(s.tokens) + 1, _tokens(s.request))) - len(s.pages)
        if not self._reclaim(need, now, plan, by_turns=self._rows[s.group] == 0):
            if was_preempted is not None:
                self._preempted[s.number] = s
            else:
                self._drop(s)
            return False
        if victim is not None and victim.status is Status.RUNNING:
            self._preempt(victim, now)
        s.pages += self.pages.take(need) or []
        if s.status is Status.OFFLOADED:
            count = self.pages.needed(s.done)
            plan.restore.append((s, s.pages[:count]))
            self.host_pages -= count
        elif s.status is Status.WAITING:
            self._leave_queue(s)
            s.cached_tokens, s.queued_s = s.done, now - s.arrived
        slot = NO_ADAPTER if s.adapter is None else self.slots.find(s.adapter)
        assert slot is not None
        s.slot, s.since, s.status = slot, now, Status.RUNNING
        s.place, s.listed = self._places.pop(), 0
        self.running.append(s)
        self._rows[s.group] += 1
        self._tenant_rows[s.request.tenant] += 1
        return True

    def _victim(self, s: Sequence, now: float) -> Sequence | None:
        """Returns the sequence that gives up its row: of the group with the most rows, else by turns."""
        ripe = self._ripe(now)
        if self._rows[s.group] == 0:
            group, most = self._rows.most_common(1)[0]
            if most > 1:
                return next((r for r in reversed(self.running) if r.group == group), None)
            return ripe[0] if ripe else None
        rich = max(self._tenant_rows, key=lambda t: (self._row_share(t), t))
        if self._row_share(rich, -1) < self._row_share(s.request.tenant, 1):
            return None
        return next((r for r in ripe if r.request.tenant == rich), None)

    def _row_share(self, tenant: str, more: int = 0) -> float:
        """Returns the tenant's rows, and so many more, over its weight."""
        return (self._tenant_rows[tenant] + more) / self.shares.weights.get(tenant, 1.0)

    def _ripe(self, now: float) -> list[Sequence]:
        """Returns the sequences that have had their row for a quantum and can give it up."""
        long_ago = now - self.active.quantum_s
        return [s for s in self.running if s.since <= long_ago and s.since < now and not s.recovering]

    def _leave_row(self, s: Sequence) -> None:
        self.running.remove(s)
        self._places.append(s.place)
        s.slot = NO_ADAPTER
        self._rows[s.group] -= 1
        self._tenant_rows[s.request.tenant] -= 1
        if self._rows[s.group] == 0:
            del self._rows[s.group]
        if self._tenant_rows[s.request.tenant] == 0:
            del self._tenant_rows[s.request.tenant]

    def _leave_queue(self, s: Sequence) -> None:
        self.line.leave(s.request.tenant, _tokens(s.request))

    def _preempt(self, s: Sequence, now: float) -> None:
        """Takes the row; the pages stay until a running sequence needs them."""
        self._leave_row(s)
        self.preemptions += 1
        s.since, s.status = now, Status.PREEMPTED
        self.computed(s)
        self._preempted[s.number] = s

    # ---- pages ----------------------------------------------------------------------------------------------------

    def _grow(self, s: Sequence, now: float, plan: Plan) -> None:
        """Takes a page for the token that is decoded next and has no room in the last one, or preempts the sequence."""
        while not self._reclaim(1, now, plan, by_turns=False):
            last = self.running[-1]
            self._preempt(last, now)
            if last is s:
                return
        s.pages += self.pages.take(1) or []

    def _reclaim(self, need: int, now: float, plan: Plan, *, by_turns: bool) -> bool:
        """Frees this many pages if it can: of preempted requests, the newest first, then by turns of running ones."""
        ripe = self._ripe(now) if by_turns else []
        self.shortages += self.pages.free < need
        if self.pages.free + sum(len(s.pages) for s in [*self._preempted.values(), *ripe]) < need:
            return False
        while self.pages.free < need:
            if self._preempted:
                _, s = self._preempted.popitem()
                self._offload_or_drop(s, plan)
                continue
            if not ripe:
                return False  # preempted requests share their pages with running ones
            self._preempt(ripe.pop(0), now)
        return True

    def _offload_or_drop(self, s: Sequence, plan: Plan) -> None:
        """Frees a preempted sequence's pages; its KV goes to the host if there is room."""
        count = self.pages.needed(s.done)
        if 0 < count <= self.limits.host_pages - self.host_pages:
            plan.save.append((s, s.pages[:count]))
            s.status = Status.OFFLOADED
            self.host_pages += count
            self.pages.give_back(s.pages)
            s.pages = []
        else:
            self.recomputed_tokens += s.done
            self._drop(s)

    def _drop(self, s: Sequence) -> None:
        """Drops the KV, but for pages that stay in the prefix cache."""
        self.pages.give_back(s.pages)
        s.pages = []
        if s.status is not Status.OFFLOADED:
            s.lost, s.done = max(s.lost, s.done), 0


def _tokens(request: Request) -> int:
    """Returns the largest number of tokens that the request can have."""
    return len(request.prompt) + request.params.max_tokens


def apply(
    tuning: Tuning, scheduler: Scheduler, *, slots: int, slot_sizes: abc.Sequence[int], pins: Collection[AdapterRef]
) -> None:
    """Sets what the scheduler decides by from its next plan on.  All of it is data: nothing compiles.

    slots: there are now.  slot_sizes: how many there may be.  pins: the versions that the names under `pin` mean now.
    Raises InvalidRequest, and changes nothing, for more than the server has.
    """
    try:
        tuning.check_fits(slots, scheduler.limits.lanes, slot_sizes)
    except ValueError as error:
        raise InvalidRequest(str(error), param="tuning") from error
    active = scheduler.active
    active.quantum_s = tuning.quantum_ms / 1000
    for ref in active.pinned - set(pins):
        active.unpin(ref)
    active.limit = min(tuning.active_slots or slots, slots)
    for ref in pins:
        active.pin(ref)
    scheduler.prefill_lanes = tuning.prefill_lanes_while_decoding or scheduler.limits.lanes
    scheduler.shares.weights = active.weights = tuning.weights
