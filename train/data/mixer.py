"""Chooses whose examples go into the next training batch: fair shares of tokens between tenants, with a bounded wait.

Policy.  A step has G lanes of J positions.  Two rules share them out:

1. The bound.  Every tenant has a deadline: the step by which it must be in a batch again.  Tenants in order of deadline,
   packed into the coming steps next-fit, must all meet theirs; the fewest that have to go now for that to hold, go now.
   Next-fit needs at most N = ceil(K / (G - k + 1)) steps for any order, with K the lanes of all tenants together and
   k those of the largest (and never more than one step a tenant).  So deadlines N + slack_steps apart can always be met,
   also after a tenant joins or leaves: next-fit never gets worse when a tenant is taken out (Murgolo 1988).
2. The shares.  Free lanes go to the largest deficit: a tenant is credited its weight's share of the tokens of each
   step and debited the tokens it got.  A tenant that joins starts at zero, so no time spent away is credited.

Shape letters: G lanes, J positions in a lane.  Pure: no jax, no clock, no randomness; same calls, same batches.
Source: deficit round robin (Shreedhar and Varghese 1995); earliest deadline first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxlora.core.errors import AlreadyExists, InvalidRequest, NotFound, StateInvalid
from train.data.examples import ExampleStream, Lane, Unit, check_length, fill_lane, first_fit_decreasing, real_tokens

MAX_BATCH = 4096  # examples of one optimizer step: what the host packs at once


@dataclass(frozen=True, slots=True)
class MixedBatch:
    """The lanes of one training step.  A tenant in `due` has the rest of its batch here: apply its optimizer now."""

    lanes: list[tuple[str, Lane]]  # (tenant key, lane); at most G, a tenant's lanes side by side
    due: list[str]  # tenant keys; a tenant with lanes that is not here keeps accumulating (split batches only)


@dataclass(slots=True)
class _Tenant:
    key: str
    stream: ExampleStream
    batch_size: int
    weight: float
    split: bool
    worst: list[list[int]]  # lanes of the largest possible batch: ranks by length
    deadline: int  # step number
    deficit: float = 0.0  # tokens owed to the tenant
    waiting: list[Lane] = field(default_factory=list)  # lanes of its current batch, not yet handed out

    @property
    def lanes(self) -> int:
        """Returns the number of lanes the tenant may need in one step, at worst."""
        return 1 if self.split else len(self.worst)


class Mixer:
    """Mixes the streams of many tenants into steps of `lanes` lanes of `length` positions.

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
        self._step = 0

    def __len__(self) -> int:
        return len(self._tenants)

    @property
    def longest_wait(self) -> int:
        """Returns the steps within which every present tenant is in a batch, whoever joins or leaves meanwhile.

        For tenants of one lane: ceil(tenants / lanes) + slack_steps.
        """
        if not self._tenants:
            return 0
        needs = [t.lanes for t in self._tenants.values()]
        return min(len(needs), math.ceil(sum(needs) / (self.lanes - max(needs) + 1))) + self.slack_steps

    def add(
        self, key: str, stream: ExampleStream, *, batch_size: int, weight: float = 1.0, split: bool = False
    ) -> None:
        """Adds a tenant from the next step on; `batch_size` examples make one optimizer step of it.

        The mixer owns the stream from here on: its cursor moves when a batch is due; that is the place to resume from.

        split: a batch may be spread over several steps, accumulating; it is due with its last lane.
        Raises AlreadyExists for a known key; InvalidRequest for a batch size out of range or a weight that is not positive
        and finite; DataInvalid for an example longer than a lane; InvalidRequest when a batch can need more lanes than
        a step has and `split` is off.
        """
        if key in self._tenants:
            raise AlreadyExists(f"tenant {key} is already training; remove it first", param="key")
        _check_weight(weight)
        worst = self.check(stream.examples, batch_size, split=split)
        tenant = _Tenant(key, stream, batch_size, weight, split, worst, deadline=0)
        self._tenants[key] = tenant
        tenant.deadline = self._step + self.longest_wait

    def check(self, examples: Sequence[Unit], batch_size: int, *, split: bool = False) -> list[list[int]]:
        """Returns the lanes of the largest batch of these examples.  Raises as `add` does.  Thread-safe."""
        if not 1 <= batch_size <= MAX_BATCH:
            raise InvalidRequest(f"batch_size must be in [1, {MAX_BATCH}], got {batch_size}", param="batch_size")
        check_length(examples, self.length)
        worst = _worst_batch(examples, batch_size, self.length)
        if len(worst) > self.lanes and not split:
            raise InvalidRequest(
                f"a batch of {batch_size} of these examples can need {len(worst)} lanes of {self.length} positions, but a "
                f"step has {self.lanes}; use a smaller batch, or let it be split over steps",
                param="batch_size",
            )
        return worst

    def set_weight(self, key: str, weight: float) -> None:
        """Sets the tenant's share from the next step on.  Raises NotFound, and InvalidRequest as `add` does."""
        _check_weight(weight)
        if key not in self._tenants:
            raise NotFound(f"tenant {key} is not training", param="key")
        self._tenants[key].weight = weight

    def remove(self, key: str) -> int:
        """Removes a tenant and returns its stream's cursor.  A split batch that was not yet due is not consumed.

        Raises NotFound for an unknown key.
        """
        if key not in self._tenants:
            raise NotFound(f"tenant {key} is not training", param="key")
        cursor = self._tenants.pop(key).stream.cursor
        for tenant in self._tenants.values():  # the wait is shorter now; next-fit in any order still meets it
            tenant.deadline = min(tenant.deadline, self._step + self.longest_wait)
        return cursor

    def next(self) -> MixedBatch:
        """Returns the next step's lanes.  Raises StateInvalid when there are no tenants."""
        if not self._tenants:
            raise StateInvalid("no tenants to train; add one first")
        self._step += 1
        for tenant in self._tenants.values():
            if not tenant.waiting:
                tenant.waiting = _pack_batch(tenant, self.length)
        by_deadline = sorted(self._tenants.values(), key=lambda t: t.deadline)
        urgent = self._urgent(by_deadline)
        by_share = sorted(by_deadline[urgent:], key=lambda t: -t.deficit / t.weight)
        counts = self._share_out(by_deadline[:urgent] + by_share)
        return self._hand_out(counts)

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
            if step > tenant.deadline:
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

    def _hand_out(self, counts: dict[str, int]) -> MixedBatch:
        """Returns the batch of these lanes; moves deadlines, deficits and cursors on."""
        batch = MixedBatch(lanes=[], due=[])
        spent: dict[str, int] = {}
        for key, count in counts.items():
            tenant = self._tenants[key]
            lanes, tenant.waiting = tenant.waiting[:count], tenant.waiting[count:]
            batch.lanes.extend((key, lane) for lane in lanes)
            spent[key] = real_tokens(lanes)
            tenant.deadline = self._step + self.longest_wait
            if not tenant.waiting:
                tenant.stream.take(tenant.batch_size)
                batch.due.append(key)
        total, weights = sum(spent.values()), sum(t.weight for t in self._tenants.values())
        limit = self.lanes * self.length * self.longest_wait  # bounds the debt of a tenant the bound favours
        for tenant in self._tenants.values():
            owed = tenant.deficit + total * tenant.weight / weights - spent.get(tenant.key, 0)
            tenant.deficit = max(-limit, min(limit, owed))
        return batch


def _check_weight(weight: float) -> None:
    if not (weight > 0 and math.isfinite(weight)):
        raise InvalidRequest(f"weight must be positive and finite, got {weight}", param="weight")


def _worst_batch(examples: Sequence[Unit], batch_size: int, length: int) -> list[list[int]]:
    """Returns the lanes, as ranks by length, of a batch at least as long, rank by rank, as any the stream can give.

    A batch may span several epochs, and then holds an example once for each.
    """
    epochs = math.ceil((batch_size - 1) / len(examples)) + 1
    longest = sorted((e.predictions for e in examples), reverse=True)[:batch_size]
    sizes = sorted(longest * epochs, reverse=True)[:batch_size]
    return first_fit_decreasing(sizes, length)


def _pack_batch(tenant: _Tenant, length: int) -> list[Lane]:
    """Returns the lanes of a tenant's next batch, at most as many as its worst one.

    First-fit decreasing can need one lane more for smaller examples; then they take the worst batch's places,
    which always fits.
    """
    examples = sorted(tenant.stream.peek(tenant.batch_size), key=lambda e: -e.predictions)
    groups = first_fit_decreasing([e.predictions for e in examples], length)
    if len(groups) > len(tenant.worst):
        groups = tenant.worst
    return [fill_lane([examples[i] for i in group], length, n) for n, group in enumerate(groups)]
