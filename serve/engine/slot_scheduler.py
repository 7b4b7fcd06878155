"""Decides which adapters are active, and which tenant is served next.  Pure host code: state and clock in, decision out.

At most `limit` adapters are active.  Nothing moves unless an adapter waits.  An adapter enters a free slot at once;
otherwise the one that is active longest, past its quantum, leaves for the one that waits longest.  Wait counts from the
later of its oldest request's arrival and the moment it last left a slot, so that two adapters with long backlogs cannot
alternate and shut out the rest.

Slots are divided between tenants first (`quotas`): a tenant below its share takes a slot of one above it, a tenant at
its share exchanges its own adapters, and with more tenants than slots they take turns.  So a tenant's wait is bounded by
its own adapters over its share of slots, whatever others bring: an adapter waits at most
ceil((W - N) / (N - P)) * (quantum + swap) + one step, with W adapters, N slots, P of them pinned.  Where KV had to be
dropped, a turn lasts until it has been computed again: a shorter one would make no progress.

Where slots differ in rank, all of this holds within each class of slots for the adapters that are at *home* there: those that
no smaller class holds.  An adapter whose class is full may be a *guest* in a larger one while nobody waits who is at home
there; past its quantum it is the first to leave when somebody does.  So nobody at home waits longer than without guests
by more than a quantum.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from jaxlora.core.errors import InvalidRequest
from jaxlora.core.lora import AdapterRef
from serve.engine.slots import SlotTable
from serve.engine.telemetry import Histogram

INPUT, OUTPUT = 1.0, 2.0  # cost of a token computed and of a token generated, as in the virtual token counter (VTC)

WAIT_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)  # upper bounds


def quotas(demand: Mapping[str, int], weights: Mapping[str, float], slots: int) -> dict[str, int]:
    """Returns each tenant's share of the slots: by weight, never more than it can use, at least one.

    With more tenants than slots every tenant's share is one, and they take turns.  demand: adapters with work.
    """
    due = {tenant: 1 for tenant, wanted in demand.items() if wanted > 0}
    for _ in range(slots - len(due)):
        short = [t for t in due if due[t] < demand[t]]
        if not short:
            break
        due[min(short, key=lambda t: ((due[t] + 1) / weights.get(t, 1.0), t))] += 1
    return due


class TokenShares:
    """The virtual token counter of each tenant: the tokens it was served, over its weight.

    Of the tenants with work the one with the smallest counter goes first.  A tenant that comes back starts at the
    smallest counter of the others: time without work is not saved up.  Source: S-LoRA's fair queue, arXiv 2401.00588.
    """

    def __init__(self) -> None:
        self.weights: dict[str, float] = {}
        self._served: dict[str, float] = {}

    def keep(self, tenants: Iterable[str]) -> None:
        """Sets the tenants with work: new ones start with the least served of the others, the rest are forgotten."""
        there = {t: self._served[t] for t in tenants if t in self._served}
        least = min(there.values(), default=0.0)
        self._served = {t: there.get(t, least) for t in tenants}

    def add(self, tenant: str, inputs: int, outputs: int) -> None:
        """Adds tokens that were computed, and generated, for the tenant."""
        cost = (INPUT * inputs + OUTPUT * outputs) / self.weights.get(tenant, 1.0)
        self._served[tenant] = self._served.get(tenant, 0.0) + cost

    def served(self, tenant: str) -> float:
        """Returns weighted tokens; the tenant with fewer goes first."""
        return self._served.get(tenant, 0.0)


@dataclass(slots=True)
class Work:
    """The wait of an adapter version with unfinished requests."""

    oldest: float  # arrival of its oldest unfinished request
    left: float = float("-inf")  # when it last left a slot with work undone

    @property
    def since(self) -> float:
        """When its wait began."""
        return max(self.oldest, self.left)


@dataclass(slots=True)
class Exchange:
    """The adapters that leave, those that enter which slot, and which of these must be copied into it."""

    leave: list[AdapterRef] = field(default_factory=list)
    enter: list[tuple[AdapterRef, int]] = field(default_factory=list)
    load: list[tuple[AdapterRef, int]] = field(default_factory=list)


class ActiveSet:
    """The active adapters.  Their slots are pinned in the slot table; unpinned ones may be replaced."""

    def __init__(
        self, slots: SlotTable, *, quantum_s: float, limit: int, rank_of: Callable[[AdapterRef], int] = lambda _: 0
    ):
        """rank_of: the largest rank of a version's modules; asked where slots differ in rank."""
        self.slots, self._rank_of = slots, rank_of
        self.quantum_s, self.limit = quantum_s, limit  # both may change at any time
        self.weights: dict[str, float] = {}  # of tenants' slots, 1 where none is given
        self.pinned: set[AdapterRef] = set()  # never leave
        self.entered: dict[AdapterRef, float] = {}  # the active ones, and since when
        # When a tenant gave up its last slot of a class with work undone.
        self._tenant_left: dict[tuple[str, int], float] = {}
        self.swaps = 0  # exchanges of an adapter with work undone for another
        self.waited_s = Histogram(WAIT_S)  # how long adapters with work waited for a slot

    def pin(self, ref: AdapterRef) -> None:
        """Keeps the adapter active from the moment it enters.  Raises InvalidRequest where no slot would be left to share."""
        home = self.home(ref)
        most = self._limit(home)
        if len({r for r in self.pinned if self.home(r) == home} | {ref}) >= most:
            raise InvalidRequest(f"{most} slots take at most {most - 1} pinned adapters; unpin one first")
        self.pinned.add(ref)

    def home(self, ref: AdapterRef) -> int:
        """Returns the class of slots that the adapter is at home in; the largest where none holds it."""
        classes = self.slots.classes
        if len(classes) == 1:
            return next(iter(classes))
        rank = self._rank_of(ref)
        return min((c for c in classes if c >= rank), default=max(classes))

    def _limit(self, rank: int) -> int:
        """Returns how many adapters may be active in a class of slots."""
        if len(self.slots.classes) == 1:
            return self.limit
        return max(1, self.slots.classes[rank] * self.limit // self.slots.count)

    def _active(self, rank: int) -> list[AdapterRef]:
        """Returns the adapters that are active in a class of slots."""
        if len(self.slots.classes) == 1:
            return list(self.entered)
        return [ref for ref in self.entered if self.slots.rank(self._slot(ref)) == rank]

    def unpin(self, ref: AdapterRef) -> None:
        """Makes the adapter take turns again."""
        self.pinned.discard(ref)

    def succeed(self, ref: AdapterRef) -> None:
        """Pins the newest version of an adapter in place of an earlier one that is pinned."""
        for old in [r for r in self.pinned if (r.tenant, r.name) == (ref.tenant, ref.name)]:
            self.pinned.remove(old)
            self.pinned.add(ref)

    def wanted(self, work: Mapping[AdapterRef, Work], count: int) -> list[AdapterRef]:
        """Returns the adapters that enter next and lie in no slot, at most `count`: they are read meanwhile."""
        queues: dict[str, list[AdapterRef]] = {}
        for ref in dict.fromkeys([*self.pinned, *work]):
            if self.slots.find(ref) is None:
                queues.setdefault(ref.tenant, []).append(ref)
        if not queues:
            return []
        shares = {rank: self._tenants(work, rank) for rank in self.slots.classes}

        def turn(ref: AdapterRef) -> tuple:
            return self._turn(ref, work, *shares[self.home(ref)])

        # A tenant with many of them has its first one read with the others' first ones.
        firsts = [heapq.nsmallest(count, queue, key=turn) for queue in queues.values()]
        ranked = [((turn(ref)[0], i, turn(ref)), ref) for first in firsts for i, ref in enumerate(first)]
        return [ref for _, ref in heapq.nsmallest(count, ranked, key=lambda x: x[0])]

    def exchange(
        self,
        now: float,
        work: Mapping[AdapterRef, Work],
        ready: Collection[AdapterRef],
        stay: Collection[AdapterRef] = (),
    ) -> Exchange:
        """Decides on an exchange, and records it here and in the slot table.

        ready: adapters that have been read.  stay: active ones that stay, as their turn has made no progress yet.
        """
        self.settle(work)
        result = Exchange()
        waiting = [
            ref
            for ref in dict.fromkeys([*ready, *self.slots.resident()])
            if ref not in self.entered and (ref in work or ref in self.pinned)
        ]
        self._keep_limit(now, work, result)
        staying = self.pinned | set(stay)
        for rank in self.slots.classes:
            self._exchange_in(rank, now, work, [r for r in waiting if self.home(r) == rank], ready, staying, result)
        if len(self.slots.classes) > 1:
            self._take_guests(now, work, [r for r in waiting if r not in self.entered], ready, result)
        return result

    def _exchange_in(
        self,
        rank: int,
        now: float,
        work: Mapping[AdapterRef, Work],
        waiting: list[AdapterRef],
        ready: Collection[AdapterRef],
        staying: Collection[AdapterRef],
        result: Exchange,
    ) -> None:
        """Decides within a class of slots, for the adapters at home there that wait."""
        limit, active = self._limit(rank), self._active(rank)
        ripe = [r for r in active if r not in staying and now - self.entered[r] >= self.quantum_s]
        if not waiting or (len(active) >= limit and not ripe):
            return
        guests, count = [r for r in ripe if self.home(r) != rank], len(active)
        ripe = [r for r in ripe if r not in guests]
        has, due = self._tenants(work, rank)
        while waiting:
            ref = min(waiting, key=lambda r: self._turn(r, work, has, due))
            waiting.remove(ref)
            slot = self.slots.find(ref)
            if slot is not None and self.slots.rank(slot) != rank:
                self.slots.drop(ref)  # it was a guest, and is read again for a slot of its own
                slot = None
            if ref not in ready and slot is None:
                continue  # it lay in a slot that another has just taken
            if count >= limit:
                victim = min(guests, key=self._age, default=None) or self._victim(ref, ripe, has, due, rank)
                if victim is None:
                    continue
                if victim in guests:
                    guests.remove(victim)
                else:
                    ripe.remove(victim)
                    has[victim.tenant] -= 1
                self._leave(victim, now, work, result)
                count -= 1
            self._enter(ref, rank, now, work, result)
            count += 1
            has[ref.tenant] += 1

    def _take_guests(
        self,
        now: float,
        work: Mapping[AdapterRef, Work],
        waiting: list[AdapterRef],
        ready: Collection[AdapterRef],
        result: Exchange,
    ) -> None:
        """Lets adapters whose class is full into larger classes that have room, and for which nobody at home waits."""
        wanting = {self.home(r) for r in (*work, *self.pinned) if r not in self.entered}
        room = {c: self._limit(c) - len(self._active(c)) for c in self.slots.classes if c not in wanting}
        for ref in sorted(waiting, key=lambda r: r in work and work[r].since):
            slot = self.slots.find(ref)
            if ref in self.pinned or (ref not in ready and slot is None):
                continue
            lies_in = None if slot is None else self.slots.rank(slot)
            fits = [c for c in room if room[c] > 0 and c > self.home(ref) and lies_in in (None, c)]
            if fits:
                room[fits[0]] -= 1
                self._enter(ref, fits[0], now, work, result)

    def settle(self, work: Mapping[AdapterRef, Work]) -> None:
        """Makes adapters without work inactive: their slots may be replaced.

        Called only before a decision, so that an adapter whose next request follows at once does not begin a new quantum.
        """
        for ref in [r for r in self.entered if r not in work and r not in self.pinned]:
            del self.entered[ref]
            self.slots.unpin(self._slot(ref))
        if self._tenant_left:
            busy = {(ref.tenant, self.home(ref)) for ref in work}
            self._tenant_left = {t: left for t, left in self._tenant_left.items() if t in busy}

    def resize(self, slots: int, limit: int, now: float, work: Mapping[AdapterRef, Work]) -> dict[int, int]:
        """Changes the number of slots, and how many adapters may be active.

        Returns the place that each slot which keeps its adapter had, and the one that it has now.  Active adapters keep
        theirs, and their turn; where they are too many, those that are active longest leave.
        """
        self.settle(work)
        self.limit = limit
        self._keep_limit(now, work, Exchange())
        return self.slots.resize(slots)

    def _keep_limit(self, now: float, work: Mapping[AdapterRef, Work], result: Exchange) -> None:
        """Has the adapters leave that are active longest, where the limit was lowered."""
        for rank in self.slots.classes:
            active = self._active(rank)
            over = len(active) - self._limit(rank)
            for ref in sorted((r for r in active if r not in self.pinned), key=self._age)[: max(over, 0)]:
                self._leave(ref, now, work, result)

    def _tenants(self, work: Mapping[AdapterRef, Work], rank: int) -> tuple[Counter[str], dict[str, int]]:
        """Returns (slots of a class that each tenant's adapters at home there hold, its share), without pinned ones."""
        own = [ref for ref in self._active(rank) if ref not in self.pinned and self.home(ref) == rank]
        demand = Counter(ref.tenant for ref in work if ref not in self.pinned and self.home(ref) == rank)
        return Counter(ref.tenant for ref in own), quotas(demand, self.weights, self._free(rank))

    def _free(self, rank: int) -> int:
        """Returns how many slots of a class are shared: those that no pinned adapter takes."""
        return self._limit(rank) - sum(self.home(r) == rank for r in self.pinned)

    def _turn(
        self, ref: AdapterRef, work: Mapping[AdapterRef, Work], has: Counter[str], due: Mapping[str, int]
    ) -> tuple:
        """Sort key: pinned, then adapters of tenants below their share, the longest waiting tenant and adapter first."""
        if ref in self.pinned:
            return (0,)
        since = work[ref].since
        below = has[ref.tenant] < due[ref.tenant]
        # A tenant that holds nothing waits as a whole: its many adapters must not give it many turns.
        left = self._tenant_left.get((ref.tenant, self.home(ref)), since)
        since_tenant = max(since, left) if has[ref.tenant] == 0 else since
        return (1 if below else 2, since_tenant, since, ref.tenant, ref.name, ref.version)

    def _victim(
        self, ref: AdapterRef, ripe: list[AdapterRef], has: Counter[str], due: Mapping[str, int], rank: int
    ) -> AdapterRef | None:
        """Returns the adapter past its quantum that this one may replace: the one active longest."""
        if ref in self.pinned:
            among = ripe
        elif has[ref.tenant] >= due[ref.tenant]:
            among = [r for r in ripe if r.tenant == ref.tenant]
        else:
            among = [r for r in ripe if has[r.tenant] > due.get(r.tenant, 0)]
            if not among and sum(due.values()) > self._free(rank):
                among = ripe  # more tenants than slots: turns
        return min(among, key=self._age, default=None)

    def _age(self, ref: AdapterRef) -> tuple[float, int]:
        """Sort key: the adapter that is active longest first."""
        return self.entered[ref], self._slot(ref)

    def _leave(self, ref: AdapterRef, now: float, work: Mapping[AdapterRef, Work], result: Exchange) -> None:
        del self.entered[ref]
        self.slots.unpin(self._slot(ref))
        work[ref].left = now
        home = self.home(ref)
        if not any(r.tenant == ref.tenant and self.home(r) == home for r in self.entered):
            self._tenant_left[ref.tenant, home] = now
        result.leave.append(ref)
        self.swaps += 1

    def _enter(self, ref: AdapterRef, rank: int, now: float, work: Mapping[AdapterRef, Work], result: Exchange) -> None:
        """Makes the adapter active in a slot of this class, which has room."""
        slot = self.slots.find(ref)
        if slot is None:
            slot = self.slots.choose(rank)
            assert slot is not None, "more adapters are active than slots"
            self.slots.place(slot, ref)
            result.load.append((ref, slot))
        self.slots.pin(ref)
        self.entered[ref] = now
        result.enter.append((ref, slot))
        if ref in work:
            self.waited_s.observe(now - work[ref].since)

    def _slot(self, ref: AdapterRef) -> int:
        slot = self.slots.find(ref)
        assert slot is not None
        return slot

    def check(self) -> None:
        """Asserts that active adapters are those that are pinned in the table, and no more than the limit allows."""
        self.slots.check()
        assert set(self.entered) == set(self.slots.pinned())
