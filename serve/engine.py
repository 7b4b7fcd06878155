"""The engine: plans become arrays, one jitted program per shape runs them, tokens become text.

Owned by one thread.  A step is at most one prefill program and one decode program; both are the same function (`step`),
and every shape it will ever see is compiled by `warm_up`.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, replace

import jax
import numpy as np
from jax.sharding import Mesh

from jaxlora.errors import AdapterInvalid, AlreadyExists, BaseMismatch, ContextLengthExceeded
from jaxlora.kvcache import empty_pages
from jaxlora.lora import AdapterRef
from jaxlora.mesh import check_lanes, place_rows
from jaxlora.model import Base
from jaxlora.pool import PoolSpec, Rows, empty_pool, host_rows, write_slot
from jaxlora.slots import SlotTable
from jaxlora.store import AdapterStore
from jaxlora.tokenizer import Detokenizer, Tokenizer
from serve.adapter_loads import LOADS, AdapterLoads
from serve.offload import PageMover, page_bytes
from serve.pages import HostPages, PageAllocator
from serve.request import Delta, FinishReason, Request, TokenLogprob
from serve.sampling import StepOutput
from serve.scheduler import Limits, Scheduler
from serve.sequence import Chunk, Plan, Sequence
from serve.step import StepBatch, step_program
from serve.stops import StopStrings

SHORT_LANES = 4  # divides a full program into a small one: a few rows should not pay for many
MIN_ROWS = 2  # XLA:CPU has no fast path for a bfloat16 product with one row


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """The shapes that are compiled.  Nothing a request says changes them."""

    rows: int  # sequences that run at once
    prefill_lanes: int  # lanes of a prefill program
    prefill_tokens: int  # prompt tokens of a lane
    pages: int  # KV pages
    page_tokens: int
    max_tokens: int  # longest sequence, prompt included
    max_waiting: int  # requests in line before new ones are refused
    max_waiting_tokens: int  # tokens they may come to, prompt and max_tokens together
    host_bytes: int  # of KV that parked requests may keep on the host; what has no room there is computed again
    quantum_s: float  # how long an adapter keeps its slot while others wait


@dataclass(slots=True)
class TextState:
    """What a running sequence has said so far."""

    detokenizer: Detokenizer
    stops: StopStrings


class Engine:
    """All running sequences on one base and one pool.  Not thread-safe: one thread owns it."""

    def __init__(
        self,
        base: Base,
        mesh: Mesh,
        config: EngineConfig,
        pool_spec: PoolSpec,
        store: AdapterStore,
        tokenizer: Tokenizer,
        base_hash: str,
    ):
        for rows, what in ((config.rows, "rows"), (config.prefill_lanes, "prefill lanes")):
            check_lanes(mesh, rows, what)
        self.base, self.mesh, self.config, self.pool_spec = base, mesh, config, pool_spec
        self.store, self.tokenizer, self.base_hash = store, tokenizer, base_hash
        self.slots = SlotTable(pool_spec.slots)
        allocator = PageAllocator(config.pages, config.page_tokens)
        self._columns = allocator.needed(config.max_tokens)
        self._pool = empty_pool(base.config, pool_spec, mesh)
        self._kv = empty_pages(base.config, mesh, pages=config.pages, page_tokens=config.page_tokens, dtype=base.dtype)
        self.scheduler = Scheduler(
            self.slots,
            allocator,
            Limits(
                rows=config.rows,
                lanes=config.prefill_lanes,
                lane_tokens=config.prefill_tokens,
                waiting=config.max_waiting,
                waiting_tokens=config.max_waiting_tokens,
                host_pages=config.host_bytes // page_bytes(self._kv),
            ),
            quantum_s=config.quantum_s,
            active=pool_spec.slots,
        )
        in_place = jax.tree.map(lambda x: x.sharding, self._pool)
        self._write_slot = jax.jit(write_slot, donate_argnums=0, out_shardings=in_place)
        self._program = step_program(mesh)
        self._loads = AdapterLoads(self._read)
        self._sequences: dict[str, Sequence] = {}
        self._texts: dict[str, TextState] = {}
        self._seeds: dict[str, int] = {}
        self._saved: dict[str, HostPages] = {}  # KV of parked requests
        self._mover = PageMover(mesh)
        self.clock = time.monotonic
        self.decoded_tokens = 0  # generated since the start
        self.prefilled_tokens = 0

    def shapes(self) -> list[tuple[int, int]]:
        """Every (lanes, tokens per lane) this engine runs."""
        return [(g, self.config.prefill_tokens) for g in self._ladder(self.config.prefill_lanes)] + [
            (g, 1) for g in self._ladder(self.config.rows)
        ]

    def _ladder(self, full: int) -> list[int]:
        parts = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        small = full // SHORT_LANES
        return [small, full] if small >= MIN_ROWS and small % parts == 0 else [full]

    def warm_up(self) -> None:
        """Compiles and runs every program once, on padding that is written nowhere, and the loading of an adapter."""
        for lanes, tokens in self.shapes():
            self._run(StepBatch.idle(lanes, tokens, self._columns))
        self._kv = self._mover.warm_up(self._kv)
        empty = jax.tree.map(lambda p: np.zeros(p.shape[:1] + p.shape[2:], np.float32), self._pool)
        self._write(0, empty)
        jax.block_until_ready(self._pool)

    # ---- requests -------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Puts the request in line.

        Raises ContextLengthExceeded, Overloaded, InvalidRequest when it can never fit, AlreadyExists for an id in use.
        """
        if request.id in self._sequences:
            raise AlreadyExists(f"a request of the id {request.id} is under way; give each its own")
        total = len(request.prompt) + request.params.max_tokens
        if total > self.config.max_tokens:
            raise ContextLengthExceeded(
                f"the prompt has {len(request.prompt)} tokens and max_tokens is {request.params.max_tokens}; together "
                f"they must be at most {self.config.max_tokens}",
                param="max_tokens",
            )
        if request.follow and (ref := request.adapter) is not None:  # a version may have come since it was resolved
            request = replace(request, adapter=self.store.latest(ref.tenant, ref.name) or ref)
        sequence = self.scheduler.add(request, self.clock())
        p = request.params
        self._sequences[request.id] = sequence
        self._texts[request.id] = TextState(self.tokenizer.detokenizer(), StopStrings(p.stop, p.include_stop))
        self._seeds[request.id] = secrets.randbits(63) if p.seed is None else p.seed

    def cancel(self, request_id: str) -> None:
        """Frees all the request holds; does nothing when it has ended."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._end(sequence)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._sequences)

    @property
    def urgent(self) -> bool:
        """Whether a request waits for its first token."""
        return self.scheduler.counts()[2] > 0 or any(s.generated == 0 for s in self.scheduler.running)

    def step(self) -> list[Delta]:
        """One step for everyone who can run: adapters that have been read get slots, then prompt chunks, then one token for
        each decoding sequence.  Waits for a disk only when nobody can run, and then for a moment.
        """
        deltas = self._read_ahead()
        plan = self.scheduler.plan(self.clock(), self._loads.ready())
        self._move(plan)
        if plan.empty and self._loads:
            self._loads.wait()
        if prefill := [c for c in plan.prefill if c.sequence.request.id in self._sequences]:
            deltas += self._prefill(prefill)
        if decode := [s for s in plan.decode if s.request.id in self._sequences]:
            deltas += self._decode(decode)
        return deltas

    def _move(self, plan: Plan) -> None:
        """Copies of a plan: KV to the host, adapters into slots, KV back."""
        for s, pages in plan.save:
            self._saved[s.request.id] = self._mover.save(self._kv, pages)
        for ref, slot in plan.load:
            self._load(ref, slot)
        for s, pages in plan.restore:
            self._kv = self._mover.restore(self._kv, pages, self._saved.pop(s.request.id))

    # ---- adapters -------------------------------------------------------------------------------------------------

    def install(self, ref: AdapterRef, rows: Rows) -> int | None:
        """Copies a new version's device rows into a slot: no disk, no host, no compile.  Who follows the adapter goes on
        under it.

        The slot, or None when every slot has running requests: the version is then loaded when it is first asked for.
        """
        self.scheduler.follow(ref)
        slot = self.slots.find(ref)
        if slot is not None:
            return slot  # a request asked for it first and had it loaded
        self.scheduler.settle()
        slot = self.slots.choose()
        if slot is not None:
            self._write(slot, rows)
            self.slots.place(slot, ref)
        return slot

    def release(self, ref: AdapterRef) -> bool:
        """Gives up the slot of a version, unless a request uses it or waits for it; whether nobody does."""
        if any(s.adapter == ref for s in self._sequences.values()):
            return False
        self.scheduler.settle()
        self.slots.drop(ref)
        return True

    def rehearse_install(self, rows: Rows) -> None:
        """Compiles `install` for rows of this shape, on a pool that is thrown away: every slot may be in use."""
        self._write_slot(empty_pool(self.base.config, self.pool_spec, self.mesh), *self._on_device(0, rows))

    def _read_ahead(self) -> list[Delta]:
        """Has the adapters read that are next in line; ends the requests of those that cannot be."""
        deltas = []
        for ref, error in self._loads.want(self.scheduler.wanted(LOADS)):
            users = [s for s in self._sequences.values() if s.adapter == ref]
            for s in users:
                self._end(s)
            deltas += [Delta(request_id=s.request.id, error=error) for s in users]
        return deltas

    def _read(self, ref: AdapterRef) -> Rows:
        """The stored version as a slot's rows on the host.  Runs on a thread of its own: it may read the disk."""
        adapter = self.store.get(ref)
        if adapter.base_hash != self.base_hash:
            raise BaseMismatch(f"adapter {ref.name} was made for another base model; serve it on that one")
        return host_rows(self.base.config, self.pool_spec, adapter)

    def _load(self, ref: AdapterRef, slot: int) -> None:
        """Copies a version that has been read into its slot."""
        self._write(slot, self._loads.take(ref))

    def _on_device(self, slot: int, rows: Rows) -> tuple[jax.Array, Rows]:
        return jax.device_put(np.int32(slot)), jax.device_put(rows)

    def _write(self, slot: int, rows: Rows) -> None:
        self._pool = self._write_slot(self._pool, *self._on_device(slot, rows))

    # ---- programs -------------------------------------------------------------------------------------------------

    def _run(self, batch: StepBatch) -> StepOutput:
        """The step's output on the host."""
        on_device = place_rows(self.mesh, batch)
        self._kv, out = self._program(self.base, self._pool, self._kv, on_device)
        return jax.device_get(out)

    def _fill(self, batch: StepBatch, lane: int, sequence: Sequence, start: int, tokens: list[int]) -> None:
        count = len(tokens)
        batch.token_GJ[lane, :count] = tokens
        batch.position_GJ[lane, :count] = np.arange(start, start + count)
        batch.slot_G[lane] = sequence.slot
        batch.page_GC[lane, : len(sequence.pages)] = sequence.pages
        batch.last_G[lane] = count - 1
        request = sequence.request
        batch.sampling.fill(lane, request.params, self._seeds[request.id], start + count)

    def _smallest(self, full: int, needed: int) -> int:
        return next(size for size in self._ladder(full) if size >= needed)

    def _prefill(self, chunks: list[Chunk]) -> list[Delta]:
        lanes = self._smallest(self.config.prefill_lanes, len(chunks))
        batch = StepBatch.idle(lanes, self.config.prefill_tokens, self._columns)
        for lane, c in enumerate(chunks):
            self._fill(batch, lane, c.sequence, c.start, c.sequence.tokens[c.start : c.start + c.count])
        out = self._run(batch)
        deltas = []
        for lane, c in enumerate(chunks):
            c.sequence.done = c.start + c.count
            self.prefilled_tokens += c.count
            if c.sequence.prompt_left > 0:
                continue
            self.scheduler.computed(c.sequence)
            if c.sequence.generated == 0:  # else it was computed again, and what comes next is known
                deltas += self._advance(c.sequence, out, lane)
        return deltas

    def _decode(self, sequences: list[Sequence]) -> list[Delta]:
        batch = StepBatch.idle(self._smallest(self.config.rows, len(sequences)), 1, self._columns)
        for row, s in enumerate(sequences):
            self._fill(batch, row, s, s.done, [s.tokens[s.done]])
        out = self._run(batch)
        deltas = []
        for row, s in enumerate(sequences):
            s.done += 1
            deltas += self._advance(s, out, row)
        return deltas

    # ---- tokens to text -------------------------------------------------------------------------------------------

    def _advance(self, sequence: Sequence, out: StepOutput, row: int) -> list[Delta]:
        """What the sequence's new token means to its client."""
        request, params = sequence.request, sequence.request.params
        if not out.finite_B[row]:
            self._end(sequence)
            error = AdapterInvalid("the model gave non-finite numbers for this request; check its adapter")
            return [Delta(request_id=request.id, error=error)]
        token = int(out.token_B[row])
        sequence.tokens.append(token)
        self.decoded_tokens += 1
        text_state = self._texts[request.id]
        ended = (token in self.tokenizer.eos_ids and not params.ignore_eos) or token in params.stop_token_ids
        text, hit = ("", False) if ended else text_state.stops.push(text_state.detokenizer.push(token))
        finish = None
        if ended or hit:
            finish = FinishReason.STOP
        elif sequence.generated >= params.max_tokens:
            finish = FinishReason.LENGTH
        if finish is not None and not hit:
            tail, hit = text_state.stops.push(text_state.detokenizer.flush())
            text += tail + ("" if hit else text_state.stops.flush())
        if finish is not None:
            self._end(sequence)
        logprobs = () if params.logprobs is None else (self._logprob(out, row, params.logprobs),)
        return [
            Delta(
                request_id=request.id,
                text=text,
                tokens=(token,),
                adapter=sequence.adapter,
                logprobs=logprobs,
                finish=finish,
            )
        ]

    def _logprob(self, out: StepOutput, row: int, count: int) -> TokenLogprob:
        top = zip(out.top_token_BM[row, :count].tolist(), out.top_logprob_BM[row, :count].tolist(), strict=True)
        return TokenLogprob(token=int(out.token_B[row]), logprob=float(out.logprob_B[row]), top=tuple(top))

    def _end(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        for table in (self._sequences, self._texts, self._seeds, self._saved):
            table.pop(sequence.request.id, None)
