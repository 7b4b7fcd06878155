"""Who runs in the next step.  Pure host code: state in, plan out.

First come, first served: the oldest waiting request is admitted as soon as there is a row, a slot for its adapter and
pages for its prompt and all the tokens it may generate, and its adapter has been read: only then does another adapter
leave its slot.  Nobody overtakes it, so nobody starves, and an admitted sequence never has to give anything back before
it ends.  Its adapter stays pinned until then.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from jaxlora.errors import InvalidRequest, Overloaded
from jaxlora.lora import AdapterRef
from jaxlora.slots import SlotTable
from pallas_kernels import NO_ADAPTER
from serve.pages import PageAllocator
from serve.request import Request


@dataclass(slots=True, eq=False)
class Sequence:
    """How far a request is.  `tokens` is the prompt and what was generated; `done` of them are in the KV pages."""

    request: Request
    tokens: list[int]
    done: int = 0
    slot: int = NO_ADAPTER
    pages: list[int] = field(default_factory=list)

    @property
    def prompt_left(self) -> int:
        """Prompt tokens that are not in the KV pages yet."""
        return max(len(self.request.prompt) - self.done, 0)

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - len(self.request.prompt)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of prompt tokens of one sequence: `count` of them from place `start`."""

    sequence: Sequence
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What the next step does, in this order."""

    load: list[tuple[AdapterRef, int]]  # adapters to copy into slots
    prefill: list[Chunk]  # one lane each
    decode: list[Sequence]  # one row each

    @property
    def empty(self) -> bool:
        """Nothing to do."""
        return not (self.load or self.prefill or self.decode)


class Scheduler:
    """All sequences, from the waiting line to their end."""

    def __init__(
        self, slots: SlotTable, pages: PageAllocator, *, rows: int, lanes: int, lane_tokens: int, max_waiting: int
    ):
        self.slots, self.pages = slots, pages
        self.rows, self.lanes, self.lane_tokens, self.max_waiting = rows, lanes, lane_tokens, max_waiting
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, request: Request) -> Sequence:
        """The request's sequence, at the end of the line.

        Raises InvalidRequest when it can never fit the KV pages, Overloaded when the line is full.
        """
        tokens = len(request.prompt) + request.params.max_tokens
        if self.pages.needed(tokens) > self.pages.pages:
            limit = self.pages.pages * self.pages.page_tokens
            raise InvalidRequest(
                f"prompt and max_tokens are {tokens} tokens, this server holds {limit}; ask for fewer",
                param="max_tokens",
            )
        if len(self.waiting) >= self.max_waiting:
            raise Overloaded(f"{self.max_waiting} requests are waiting already; retry later")
        sequence = Sequence(request, list(request.prompt))
        self.waiting.append(sequence)
        return sequence

    def wanted(self, count: int) -> list[AdapterRef]:
        """Adapters to read now: those of the first in line that no slot holds, at most `count`."""
        refs = dict.fromkeys(s.request.adapter for s in itertools.islice(self.waiting, self.rows))
        return [ref for ref in refs if ref is not None and self.slots.find(ref) is None][:count]

    def plan(self, ready: Callable[[AdapterRef], bool]) -> Plan:
        """Admits what fits and says what the next step computes.  `ready`: an adapter has been read and can be copied."""
        load = self._admit(ready)
        prefill: list[Chunk] = []
        for s in self.running:
            start, left = s.done, s.prompt_left
            while left > 0 and len(prefill) < self.lanes:
                count = min(left, self.lane_tokens)
                prefill.append(Chunk(s, start, count))
                start, left = start + count, left - count
        return Plan(load, prefill, [s for s in self.running if s.prompt_left == 0])

    def finish(self, sequence: Sequence) -> None:
        """The sequence ends or is cancelled, wherever it is: its pages, row and pin are free.  Repeating it is harmless."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        elif sequence in self.running:
            self.running.remove(sequence)
            self.pages.give_back(sequence.pages)
            sequence.pages = []
            if sequence.slot != NO_ADAPTER:
                self.slots.unpin(sequence.slot)

    def check(self) -> None:
        """Asserts that rows, pages and pins add up."""
        assert len(self.running) <= self.rows
        self.pages.check([p for s in self.running for p in s.pages])
        self.slots.check()

    def _admit(self, ready: Callable[[AdapterRef], bool]) -> list[tuple[AdapterRef, int]]:
        load: list[tuple[AdapterRef, int]] = []
        while self.waiting and len(self.running) < self.rows:
            s = self.waiting[0]
            need = self.pages.needed(len(s.request.prompt) + s.request.params.max_tokens)
            if need > self.pages.free:
                break
            ref = s.request.adapter
            if ref is not None:
                slot = self.slots.pin(ref)
                if slot is None:
                    slot = self.slots.choose() if ready(ref) else None
                    if slot is None:
                        break  # every slot has running requests, of which one will end; or it is being read
                    self.slots.place(slot, ref)
                    self.slots.pin(ref)
                    load.append((ref, slot))
                s.slot = slot
            pages = self.pages.take(need)
            assert pages is not None
            s.pages = pages
            self.running.append(self.waiting.popleft())
        return load
