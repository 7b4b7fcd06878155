"""Chooses whose examples go into the next training batch: fair shares of tokens between tenants, with a bounded wait.

Policy.  A step has G lanes of J positions.  Two rules share them out:

1. The bound.  Every tenant has a deadline: the step by which it must be in a batch again.  Tenants in order of deadline,
   packed into the coming steps next-fit, must all meet theirs; the fewest that have to go now for that to hold, go now.
   Next-fit needs at most N = ceil(K / (G - k + 1)) steps for any order, with K the lanes of all tenants together and
   k those of the largest (and never more than one step a tenant).  So deadlines N + slack_steps apart can always be met,
   also after a tenant joins or leaves: next-fit never gets worse when a tenant is taken out (Murgolo 1988).
   Lanes of one step may differ in length: each tenant's have the length that its examples were checked for.
2. The shares.  Free lanes go to the largest deficit: a tenant is credited its weight's share of the tokens of each
   step and debited the tokens it got.  A tenant that joins starts at zero, so no time spent away is credited.

A tenant that is *held* is evaluated: it has no lanes in steps, but its share goes on, and pays for what is computed for
it between them.  Its turn comes when it is owed tokens, or when it has waited as many steps as any tenant may.

Shape letters: G lanes, J positions in a lane.  Pure: no jax, no clock, no randomness; same calls, same batches.
Source: deficit round robin (Shreedhar and Varghese 1995); earliest deadline first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxlora.core.errors import AlreadyExists, InvalidRequest, NotFound, StateInvalid
from train.data.examples import CheckedExamples, ExampleStream, Lane, Unit, fill_lane, first_fit_decreasing

MAX_BATCH = 4096  # examples of one optimizer step: what the host packs at once


@dataclass(frozen=True, eq=False, slots=True)
class Batches:
    """Checked examples in batches of one size, and the lanes that the largest such batch takes.

    It takes time in proportion to the examples, so it is made where they are read, and passed on.
    Raises InvalidRequest for a batch size out of range.
    """

    examples: CheckedExamples
    batch_size: int  # examples of one optimizer step
    worst: list[np.ndarray] = field(init=False)  # lanes of the largest possible batch: ranks by length

    def __post_init__(self) -> None:
        if not 1 <= self.batch_size <= MAX_BATCH:
            raise InvalidRequest(f"batch_size must be in [1, {MAX_BATCH}], got {self.batch_size}", param="batch_size")
        object.__setattr__(self, "worst", _worst_batch(self.examples, self.batch_size))


@dataclass(frozen=True, slots=True)
class MixedBatch:
    """The lanes of one training step.  A tenant in `due` has the rest of its batch here: apply its optimizer now."""

    lanes: list[tuple[str, Lane]]  # (tenant key, lane); at most G, a tenant's lanes side by side
    due: list[str]  # tenant keys; a tenant with lanes that is not here keeps accumulating (split batches only)
    faults: list[tuple[str, Exception]]  # tenants whose batch could not be made, and why; they are still here


@dataclass(slots=True)
class _Share:
    """What a tenant may have, and what it has had."""

    weight: float
    deadline: int  # step number
    deficit: float = 0.0  # tokens owed to the tenant


@dataclass(slots=True)
class _Tenant:
    key: str
    stream: ExampleStream
    batches: Batches
    split: bool
    share: _Share
    waiting: list[tuple[int, list[Unit]]] = field(default_factory=list)  # lanes of its batch, not yet handed out

    @property
    def lanes(self) -> int:
        """Returns the number of lanes the tenant may need in one step, at worst."""
        return 1 if self.split else len(self.batches.worst)


@dataclass(frozen=True, slots=True)
class _Held:
    """A tenant that is evaluated."""

    share: _Share
    tenant: _Tenant | None  # None: it has done its last step


class Mixer:
    """Mixes the streams of many tenants into steps of `lanes` lanes of at most `length` positions.

    slack_steps is the room for shares to differ: with 0 all tenants take turns; more lets weights and sizes count more
    and a tenant wait longer.
    """

    def __init__(self, lanes: int, length: int, slack_steps: int = 1):
        """Raises InvalidRequest for fewer than one lane or position, or negative slack."""
        if lanes < 1 or length < 1 or slack_steps < 0:
            raise InvalidRequest(
                "a step needs at least one lane and one position, and slack_steps of 0 or more; "
                f"got {lanes} lanes of {length}, slack_steps {slack_steps}"
            )
        self.lanes = lanes
        self.length = length
        self.slack_steps = slack_steps
        self._tenants: dict[str, _Tenant] = {}
        self._held: dict[str, _Held] = {}
        self._step = 0

    def __len__(self) -> int:
        """Returns the number of tenants that a step may train: those who are held do not count."""
        return len(self._tenants)

    @property
    def longest_wait(self) -> int:
        """Returns the steps within which every present tenant is in a batch, whoever joins or leaves meanwhile.

        For tenants of one lane: ceil(tenants / lanes) + slack_steps.
        """
        present = [*self._tenants.values(), *(held.tenant for held in self._held.values())]
        needs = [tenant.lanes for tenant in present if tenant is not None]
        if not needs:
            return 0
        return min(len(needs), math.ceil(sum(needs) / (self.lanes - max(needs) + 1))) + self.slack_steps

    def add(
        self, key: str, batches: Batches, stream: ExampleStream, *, weight: float = 1.0, split: bool = False
    ) -> None:
        """Adds a tenant from the next step on.

        The mixer owns the stream, of the examples of `batches`: its cursor moves when a batch is due; that is the place
        to resume from.

        split: a batch may be spread over several steps, accumulating; it is due with its last lane.
        Raises AlreadyExists for a known key; InvalidRequest for a weight that is not positive and finite, and when a batch
        can need more lanes than a step has and `split` is off.
        """
        if key in self._tenants or key in self._held:
            raise AlreadyExists(f"tenant {key} is already training; remove it first", param="key")
        _check_weight(weight)
        if len(batches.worst) > self.lanes and not split:
            raise InvalidRequest(
                f"a batch of {batches.batch_size} of these examples can need {len(batches.worst)} lanes of {batches.examples.length} "
                f"positions, but a step has {self.lanes}; use a smaller batch, or let it be split over steps",
                param="batch_size",
            )
        tenant = _Tenant(key, stream, batches, split, _Share(weight, deadline=0))
        self._tenants[key] = tenant
        tenant.share.deadline = self._step + self.longest_wait

    def set_weight(self, key: str, weight: float) -> None:
        """Sets the tenant's share from the next step on.  Raises NotFound, and InvalidRequest as `add` does."""
        _check_weight(weight)
        shares = self._shares()
        if key not in shares:
            raise NotFound(f"tenant {key} is not training", param="key")
        shares[key].weight = weight

    def remove(self, key: str) -> int:
        """Removes a tenant, also one that is held, and returns its stream's cursor.

        A split batch that was not yet due is not consumed.  Raises NotFound for an unknown key.
        """
        self.release(key)
        if key not in self._tenants:
            raise NotFound(f"tenant {key} is not training", param="key")
        cursor = self._tenants.pop(key).stream.cursor
        for tenant in self._tenants.values():  # the wait is shorter now; next-fit in any order still meets it
            tenant.share.deadline = min(tenant.share.deadline, self._step + self.longest_wait)
        return cursor

    def _shares(self) -> dict[str, _Share]:
        """Returns everybody's, those of the held included."""
        return {k: t.share for k, t in self._tenants.items()} | {k: h.share for k, h in self._held.items()}

    # ---- tenants that are evaluated -------------------------------------------------------------------------------

    def hold(self, key: str) -> None:
        """Leaves a tenant between two batches out of the steps until `release`; one that is not here gets a share of 1."""
        tenant = self._tenants.pop(key, None)
        self._held[key] = _Held(_Share(1.0, deadline=0) if tenant is None else tenant.share, tenant)
        self._held[key].share.deadline = self._step + self.longest_wait

    def release(self, key: str) -> None:
        """Takes a tenant back that was held; one that had not been here leaves.  Does nothing for another."""
        held = self._held.pop(key, None)
        if held is not None and held.tenant is not None:
            self._tenants[key] = held.tenant
            held.share.deadline = self._step + self.longest_wait

    def held_turn(self) -> list[str]:
        """Returns the keys of those who are held, in the order of their turns, if one goes before the next step; else none."""
        order = sorted(
            self._held,
            key=lambda key: (self._is_late(key), self._held[key].share.deficit / self._held[key].share.weight),
            reverse=True,
        )
        goes = bool(order) and (not self._tenants or self._is_late(order[0]) or self._held[order[0]].share.deficit >= 0)
        return order if goes else []

    def _is_late(self, key: str) -> bool:
        return self._held[key].share.deadline <= self._step

    def charge(self, spent: Mapping[str, int]) -> None:
        """Accounts for tokens that were computed for tenants who are held."""
        self._account(spent)
        for key in spent.keys() & self._held.keys():
            self._held[key].share.deadline = self._step + self.longest_wait

    # ---- steps ----------------------------------------------------------------------------------------------------

    def next(self) -> MixedBatch:
        """Returns the next step's lanes.  Raises StateInvalid when there are no tenants."""
        if not self._tenants:
            raise StateInvalid("no tenants to train; add one first")
        self._step += 1
        faults: list[tuple[str, Exception]] = []
        for tenant in self._tenants.values():
            try:
                tenant.waiting = tenant.waiting or _pack_batch(tenant)
            except Exception as error:
                faults.append((tenant.key, error))
        by_deadline = sorted((t for t in self._tenants.values() if t.waiting), key=lambda t: t.share.deadline)
        urgent = self._urgent(by_deadline)
        by_share = sorted(by_deadline[urgent:], key=lambda t: -t.share.deficit / t.share.weight)
        counts = self._share_out(by_deadline[:urgent] + by_share)
        return self._hand_out(counts, faults)

    def _urgent(self, by_deadline: Sequence[_Tenant]) -> int:
        """Returns how many of the earliest deadlines must go now, so that the others can still meet theirs."""
        room = self.lanes
        for count, tenant in enumerate(by_deadline):
            if self._can_wait(by_deadline[count:]):
                return count
            room -= self._least(tenant)
            if room < 0:
                return count
        return len(by_deadline)

    def _can_wait(self, by_deadline: Sequence[_Tenant]) -> bool:
        """Returns whether these, next-fit in this order from the step after this one, all meet their deadlines."""
        step, room = self._step + 1, self.lanes
        for tenant in by_deadline:
            if tenant.lanes > room:
                step, room = step + 1, self.lanes
            room -= tenant.lanes
            if step > tenant.share.deadline:
                return False
        return True

    def _least(self, tenant: _Tenant) -> int:
        """Returns the number of lanes that must be free for a tenant to go now."""
        return 1 if tenant.split else len(tenant.waiting)

    def _share_out(self, order: Sequence[_Tenant]) -> dict[str, int]:
        """Returns the lanes of each tenant that goes now: each its minimum, in order; the rest extends split ones."""
        counts: dict[str, int] = {}
        room = self.lanes
        for tenant in order:
            if self._least(tenant) <= room:
                counts[tenant.key] = self._least(tenant)
                room -= self._least(tenant)
        for tenant in order:
            if tenant.key in counts:
                more = min(room, len(tenant.waiting) - counts[tenant.key])
                counts[tenant.key] += more
                room -= more
        return counts

    def _hand_out(self, counts: dict[str, int], faults: list[tuple[str, Exception]]) -> MixedBatch:
        """Returns the batch of these lanes; moves deadlines, deficits and cursors on."""
        batch = MixedBatch(lanes=[], due=[], faults=faults)
        spent: dict[str, int] = {}
        for key, count in counts.items():
            tenant = self._tenants[key]
            taken, tenant.waiting = tenant.waiting[:count], tenant.waiting[count:]
            length = tenant.batches.examples.length
            batch.lanes.extend((key, fill_lane(units, length, number)) for number, units in taken)
            spent[key] = sum(unit.predictions for _, units in taken for unit in units)
            tenant.share.deadline = self._step + self.longest_wait
            if not tenant.waiting:
                tenant.stream.take(tenant.batches.batch_size)
                batch.due.append(key)
        self._account(spent)
        return batch

    def _account(self, spent: Mapping[str, int]) -> None:
        """Credits everybody with its share of these tokens, and debits those who got them."""
        shares = self._shares()
        total, weights = sum(spent.values()), sum(share.weight for share in shares.values())
        limit = self.lanes * self.length * self.longest_wait  # bounds the debt of a tenant the bound favours
        for key, share in shares.items():
            owed = share.deficit + total * share.weight / weights - spent.get(key, 0)
            share.deficit = max(-limit, min(limit, owed))


def _check_weight(weight: float) -> None:
    if not (weight > 0 and math.isfinite(weight)):
        raise InvalidRequest(f"weight must be positive and finite, got {weight}", param="weight")


def _worst_batch(examples: CheckedExamples, batch_size: int) -> list[np.ndarray]:
    """Returns the lanes, as ranks by length, of a batch at least as long, rank by rank, as any the stream can give.

    A batch may span several epochs, and then holds an example once for each.
    """
    epochs = math.ceil((batch_size - 1) / len(examples)) + 1
    longest_N = np.sort(examples.size_N)[::-1][:batch_size]
    sizes = np.sort(np.tile(longest_N, epochs))[::-1][:batch_size]
    return first_fit_decreasing(sizes, examples.length)


def _pack_batch(tenant: _Tenant) -> list[tuple[int, list[Unit]]]:
    """Returns the lanes of a tenant's next batch, (number, what it holds), at most as many as its worst one has.

    First-fit decreasing can need one lane more for smaller examples; then they take the worst batch's places,
    which always fits.
    """
    examples = sorted(tenant.stream.peek(tenant.batches.batch_size), key=lambda e: -e.predictions)
    groups = first_fit_decreasing([e.predictions for e in examples], tenant.batches.examples.length)
    if len(groups) > len(tenant.batches.worst):
        groups = tenant.batches.worst
    return [(n, [examples[i] for i in group]) for n, group in enumerate(groups)]
