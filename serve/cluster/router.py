"""Decides which replica answers a request.  Pure host code: state and clock in, decision out; for one thread.

Each adapter has an order of the replicas of its own (`rendezvous`).  The first k of it are the adapter's own; k follows
the tokens that wait and run for it, up within a second, down within half a minute.  Every replica is the base's own.
The least loaded of its own gets a request; of all within a margin of that one, the one that the tenant and the prompt's
beginning draw, as it may hold the KV of that prefix.  But nobody loads an adapter that another replica holds and has
room for; and where all of its own are overloaded, a request goes to another holder, else to the next in the order.

What is known of a replica is its last report, and what was sent to it since; other fronts are taken to have sent as
much.  Replicas take places in arrays by name, so that routers which know the same decide the same.

Source of passing over the overloaded: consistent hashing with bounded loads, arXiv 1608.01350.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from jaxlora.config.cluster import RouterSection
from jaxlora.core.errors import Unavailable
from serve.cluster.rendezvous import Drawn, Places, draw, smallest, stable_hash
from serve.cluster.replica_view import AdapterKey, Ask, ReplicaView, Report, Sent

SPILL = 8  # replicas after its own that an adapter may spill to
KEPT = 0.7  # a copy goes when one fewer would have less than this of what a copy is for


@dataclass(slots=True)
class _Demand:
    """The load of an adapter on all replicas, and how many are its own."""

    at_s: float
    tokens: int = 0
    smoothed: float = 0.0
    copies: int = 1

    def settle(self, now_s: float, config: RouterSection, rows: float) -> None:
        """Goes on to this moment.  rows: of a replica."""
        passed_s = max(0.0, now_s - self.at_s)
        span_s = config.rise_s if self.tokens > self.smoothed else config.fall_s
        self.at_s += passed_s
        self.smoothed += (self.tokens - self.smoothed) * -math.expm1(-passed_s / span_s)
        wanted = self.smoothed / (config.copy_tokens * rows)
        least, most = math.ceil(wanted), math.floor(wanted / KEPT) + 1
        self.copies = min(max(self.copies, least), most)


class Router:
    """The replicas, what is known of them, and where the next request goes."""

    def __init__(self, config: RouterSection):
        self.config = config
        self._replicas: dict[str, ReplicaView] = {}
        self._holders: dict[AdapterKey, set[ReplicaView]] = {}
        self._demand: dict[AdapterKey, _Demand] = {}
        self._demand_limit = 1024  # with as many, those without a load are forgotten
        self._sent = 0
        self._place()

    def join(self, name: str, weight: float, report: Report, now_s: float) -> None:
        """Adds a replica, or one that has started again; adapters come to it in proportion to its weight."""
        replica = ReplicaView(name, weight, self.config.fronts, report)
        self.leave(name, now_s)
        self._replicas[name] = replica
        self.report(name, report, now_s)
        self._place()

    def drain(self, name: str) -> None:
        """Sends a replica nothing more while there are others."""
        if (replica := self._replicas.get(name)) is not None and not replica.draining:
            replica.draining = True
            self._place()

    def reports(self) -> Mapping[str, Report]:
        """Returns what was said last by the replicas that do not drain."""
        return {name: replica.report for name, replica in self._replicas.items() if not replica.draining}

    def leave(self, name: str, now_s: float) -> None:
        """Forgets a replica that has stopped or failed, with what was sent to it."""
        if (replica := self._replicas.pop(name, None)) is not None:
            self._hold(replica, {}, now_s)
            self._place()

    def report(self, name: str, report: Report, now_s: float) -> None:
        """Takes in what a replica says, unless it has left or has said something newer."""
        replica = self._replicas.get(name)
        if replica is None or report.asked_s < replica.report.asked_s:
            return
        replica.report = report
        replica.open = {number: sent for number, sent in replica.open.items() if sent.at_s >= report.asked_s}
        adapters = dict(report.adapters)
        for sent in replica.open.values():
            if (key := sent.ask.key) is not None:
                adapters[key] = adapters.get(key, 0) + sent.ask.tokens
        self._hold(replica, adapters, now_s)
        self._measure(replica)

    def send(self, ask: Ask, now_s: float, tried: Collection[str] = ()) -> Sent:
        """Chooses a replica, none of those that were tried, and counts the request there.

        Raises Unavailable when none is left.
        """
        if ask.adapter is None:
            copies, drawn = len(self._placed), np.zeros(len(self._placed))
        else:
            copies = self._copies((ask.tenant, ask.adapter), now_s)
            drawn = draw(stable_hash(ask.tenant, ask.adapter), self._hashes, self._weights)
        if tried:
            drawn[[place for place, replica in enumerate(self._placed) if replica.name in tried]] = np.inf
        own = smallest(drawn, copies)
        if tried:
            own = own[drawn[own] < np.inf]
        if not own.size:
            raise Unavailable("no replica can take the request now; try again in some seconds")
        replica = self._choose(ask, own, drawn, tried)
        self._sent += 1
        sent = Sent(self._sent, replica.name, ask, now_s)
        replica.open[sent.number] = sent
        self._add(replica, ask.key, ask.tokens, now_s)
        return sent

    def end(self, sent: Sent, now_s: float) -> None:
        """Takes note that a request has ended, in whichever way, or was refused."""
        replica = self._replicas.get(sent.replica)
        if replica is not None and replica.open.pop(sent.number, None) is not None:
            self._add(replica, sent.ask.key, -sent.ask.tokens, now_s)

    def hottest(self, most: int, now_s: float) -> list[tuple[AdapterKey, int]]:
        """Returns the adapters with the largest smoothed load, and how many replicas are each one's own."""
        for demand in self._demand.values():
            demand.settle(now_s, self.config, self._rows)
        found = heapq.nlargest(most, self._demand.items(), key=lambda one: one[1].smoothed)
        return [(key, demand.copies) for key, demand in found if demand.smoothed >= 1]

    def _choose(self, ask: Ask, own: Places, drawn: Drawn, tried: Collection[str]) -> ReplicaView:
        """Returns one of the request's own replicas, or of the others that hold its adapter, or one of the rest."""
        held = self._holders.get(ask.key, set()) if ask.key else set()
        able = self._able(own, ask, held)
        if able.size:
            chosen = self._placed[self._nearest(able, ask)]
            if ask.key is None or chosen in held:
                return chosen
            others = [r for r in held if r.has_room]
        else:
            rest = smallest(drawn, own.size + SPILL)[own.size :]
            able = self._able(rest[drawn[rest] < np.inf], ask, held)
            loads = self._loads[own]
            if held:  # in a crowd one more copy would cost somebody a slot
                loads += self.config.spill_tokens * np.array([self._placed[place] not in held for place in own])
            chosen = self._placed[able[0] if able.size else own[np.argmin(loads)]]
            others = [r for r in held if r.waiting <= self.config.spill_tokens]
        others = [r for r in others if r.place is not None and r.name not in tried]
        return min(others, key=lambda r: (r.load, r.name), default=chosen)

    def _able(self, places: Places, ask: Ask, held: Collection[ReplicaView]) -> Places:
        """Returns the places that are not overloaded, and where the adapter has a slot or would get one at once."""
        able = places[self._waiting[places] <= self.config.spill_tokens]
        if ask.key is None or not self._full[able].any():
            return able
        return able[[not self._full[place] or self._placed[place] in held for place in able]]

    def _nearest(self, places: Places, ask: Ask) -> int:
        """Returns the place that the prompt's beginning draws, of those about as little loaded as the least loaded."""
        if places.size == 1:
            return int(places[0])
        loads = self._loads[places]
        near = places[loads <= loads.min() + self.config.margin_tokens]
        if near.size > 1:
            prefix = stable_hash(ask.tenant, ask.beginning[: self.config.prefix_chars])
            near = near[smallest(draw(prefix, self._hashes[near], self._weights[near]), 1)]
        return int(near[0])

    def _copies(self, key: AdapterKey, now_s: float) -> int:
        """Returns how many replicas are the adapter's own."""
        if (demand := self._demand.get(key)) is None:
            return 1
        demand.settle(now_s, self.config, self._rows)
        return demand.copies

    def _add(self, replica: ReplicaView, key: AdapterKey | None, tokens: int, now_s: float) -> None:
        """Counts the tokens of a request in, or out when they are negative."""
        if key is not None:
            self._set(replica, key, replica.adapters.get(key, 0) + tokens, now_s)
        self._measure(replica)

    def _hold(self, replica: ReplicaView, adapters: Mapping[AdapterKey, int], now_s: float) -> None:
        """Sets which adapters a replica holds."""
        for key in replica.adapters.keys() | adapters.keys():
            if replica.adapters.get(key) != adapters.get(key):
                self._set(replica, key, adapters.get(key), now_s)

    def _set(self, replica: ReplicaView, key: AdapterKey, tokens: int | None, now_s: float) -> None:
        """Sets an adapter's tokens at a replica; None: it does not hold the adapter."""
        more = (tokens or 0) - replica.adapters.pop(key, 0)
        if tokens is not None:
            replica.adapters[key] = tokens
            self._holders.setdefault(key, set()).add(replica)
        elif len(holders := self._holders[key]) > 1:
            holders.remove(replica)
        else:
            del self._holders[key]
        if more:
            if len(self._demand) >= self._demand_limit:
                self._forget(now_s)
            demand = self._demand.setdefault(key, _Demand(now_s))
            demand.settle(now_s, self.config, self._rows)
            demand.tokens += more

    def _forget(self, now_s: float) -> None:
        """Drops the adapters without a load; so seldom that it costs next to nothing for each that came."""
        for demand in self._demand.values():
            demand.settle(now_s, self.config, self._rows)
        self._demand = {key: d for key, d in self._demand.items() if d.tokens or d.smoothed >= 1}
        self._demand_limit = 1024 + 2 * len(self._demand)

    def _measure(self, replica: ReplicaView) -> None:
        """Brings a replica's load into the arrays."""
        if replica.place is not None:
            self._waiting[replica.place], self._loads[replica.place] = replica.waiting, replica.load
            self._full[replica.place] = replica.is_full

    def _place(self) -> None:
        """Gives the replicas that are sent requests their places; draining ones only if there are no others."""
        named = sorted(self._replicas.values(), key=lambda r: r.name)
        self._placed = [r for r in named if not r.draining] or named
        for replica in named:
            replica.place = None
        for place, replica in enumerate(self._placed):
            replica.place = place
        self._rows = sum(r.report.rows for r in named) / len(named) if named else 1.0
        self._hashes = np.array([r.hash for r in self._placed], np.uint64)
        self._weights = np.array([r.weight for r in self._placed])
        self._waiting = np.array([r.waiting for r in self._placed])
        self._loads = np.array([r.load for r in self._placed])
        self._full = np.array([r.is_full for r in self._placed], bool)
