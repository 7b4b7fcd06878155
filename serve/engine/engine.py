"""The engine: it turns plans into arrays, runs them with one jitted program per shape and hands out the tokens.

Owned by one thread.  A step is at most one prefill program and one decode program; where the base's weights are what a step
reads most, one program computes both (`Engine.mixes`).  All are the same function (`StepPrograms`), and every shape it will
ever see is compiled by `warm_up`.

On an accelerator a step is launched before the tokens of the one before it are read (`Engine.runs_ahead`), so the device
never waits for the host.  A row's token then goes from program to program on the device.  What a step does not know yet is
which rows have just ended: what it computes for these is dropped.  Their pages and slots may be given to others at once, as
whatever writes there is launched later.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxlora.checkpoints.tokenizer import Tokenizer
from jaxlora.config.serving import SlotSize, Tuning
from jaxlora.core.errors import AlreadyExists, BaseMismatch, ContextLengthExceeded, JaxLoraError
from jaxlora.core.host_memory import give_back
from jaxlora.core.lora import AdapterRef
from jaxlora.core.progress import Counted, uncounted
from jaxlora.model.decoder import Base
from jaxlora.model.kv_cache import KVPages, empty_pages
from jaxlora.model.kv_offload import HostPages, PageMover, page_bytes
from jaxlora.model.lora_pool import PoolSpec, Rows, host_rows
from jaxlora.model.mesh import check_lanes, place_rows
from jaxlora.model.serving_pool import ServingPool, empty_serving_pool, read_slot, slot_bytes, slot_writer, zero_rows
from jaxlora.model.slot_classes import row_ranks
from jaxlora.storage.adapter_store import AdapterStore
from pallas_kernels import NO_ADAPTER
from pallas_kernels.gathered_lora.rank_classes import slot_ranks
from serve.engine.adapter_loads import READERS, AdapterLoads
from serve.engine.batch import IdleBatches, RowTable, fill_lane
from serve.engine.logit_edits import EditArrays, LogitEdits
from serve.engine.output import OutputProcessor
from serve.engine.page_cache import PageAllocator
from serve.engine.request import Delta, Request
from serve.engine.sampling import StepOutput, Work
from serve.engine.scheduler import Limits, Scheduler, apply
from serve.engine.sequence import Chunk, Plan, Sequence, Status
from serve.engine.slots import SlotPolicy, SlotTable
from serve.engine.step import Needs, PackedBatches, StepPrograms, no_tokens
from serve.engine.telemetry import Telemetry

LOG = logging.getLogger("serve")

SHORT_LANES = 4  # divides a full program into a small one: a few rows should not pay for many
BASE_ALONE = ("gpu", "tpu")  # where steps of base requests alone run a program without LoRA; CPUs keep one program
Shapes = tuple[tuple[int, int], ...]  # (lanes, tokens per lane) of each batch of a program
RANKS = 2**14  # versions whose rank is remembered, where slots differ in rank
MIN_ROWS = 2  # XLA:CPU has no fast path for a bfloat16 product with one row


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """The shapes that are compiled.  No request changes them."""

    sizes: tuple[SlotSize, ...] = ()  # numbers of slots and pages that it may change to, the first ones among them
    rows: int  # sequences that run at once
    prefill_lanes: int  # lanes of a prefill program
    prefill_tokens: int  # prompt tokens of a lane
    pages: int  # KV pages
    page_tokens: int
    kv_dtype: str | None = None  # None: the base's
    max_tokens: int  # longest sequence, prompt included
    max_waiting: int  # requests in the queue before new ones are refused
    max_waiting_tokens: int  # tokens they may come to, prompt and max_tokens together
    host_bytes: int  # of KV that preempted requests may keep on the host; what has no room there is computed again
    quantum_s: float  # how long an adapter keeps its slot while others wait, until `tune` says otherwise


@dataclass(frozen=True, kw_only=True, slots=True)
class Launched:
    """A program that was launched, and whose output the host has not read."""

    out: StepOutput  # on the device
    chosen: list[tuple[int, Sequence, AdapterRef | None]]  # lanes that chose a token: for whom, by which version
    chunks: list[Chunk]  # one a lane, where the scores of prompts are wanted; else none
    prefilled: int  # prompt tokens computed


class Engine:
    """Runs all sequences on one base and one pool.  Not thread-safe: one thread owns it."""

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
        self.size = SlotSize(slots=pool_spec.slots, pages=config.pages)  # the present one
        self.sizes = config.sizes or (self.size,)
        self.base, self.mesh, self.config, self.pool_spec = base, mesh, config, pool_spec
        # A CPU computes with what the host would use meanwhile: there is nothing to gain.
        self.runs_ahead = mesh.devices.flat[0].platform != "cpu"
        # Weights are read once for prompt chunks and decode rows together.  A CPU is bound by the products of the chunks, and
        # where lanes are split over devices, so would be the tokens of both, at other places.
        self.mixes = self.runs_ahead and self._lane_parts() == 1
        # Whether it waits for the tokens of each step all the same, as training runs beside; may change between two steps.
        self.waits = False
        self.store, self.tokenizer, self.base_hash = store, tokenizer, base_hash
        self.slots = SlotTable(pool_spec.slots, slot_ranks(pool_spec.rank_classes).tolist())
        allocator = PageAllocator(config.pages, config.page_tokens)
        self._columns = allocator.needed(config.max_tokens)
        fewest = min((size.pages for size in config.sizes), default=self._columns)
        assert self._columns <= fewest, f"the longest request needs {self._columns} pages, one size has {fewest}"
        self._pool = empty_serving_pool(base.config, pool_spec, mesh)
        self.slot_bytes = {rank: slot_bytes(self._pool, rank) for _, rank in pool_spec.rank_classes}  # by class
        self._kv = self._empty_pages()
        self._newest = no_tokens(mesh, config.rows)
        self._idle = IdleBatches(self._columns)
        self._rows = RowTable(config.rows, self._idle)
        self._launched: list[Launched] = []  # of the newest step, if it was not read
        self.scheduler = Scheduler(
            self.slots,
            allocator,
            Limits(
                rows=config.rows,
                lanes=config.prefill_lanes,
                few_lanes=self._ladder(config.prefill_lanes)[0],
                lane_tokens=config.prefill_tokens,
                waiting=config.max_waiting,
                waiting_tokens=config.max_waiting_tokens,
                host_pages=config.host_bytes // page_bytes(self._kv),
            ),
            quantum_s=config.quantum_s,
            active=pool_spec.slots,
            rank_of=functools.lru_cache(RANKS)(self._rank_of),
        )
        self._read_slot = jax.jit(read_slot, static_argnums=2)
        self._policy = SlotPolicy(self.sizes, self.size)
        self._tuning = Tuning(quantum_ms=1000 * config.quantum_s)
        self._programs = StepPrograms(mesh)
        self.base_alone = mesh.devices.flat[0].platform in BASE_ALONE
        ends = len(tokenizer.eos_ids)
        self._edits = EditArrays(mesh, max_tokens=config.max_tokens, vocab=base.config.vocab, ends=ends)
        # Ranks that rows from the store are padded to, rising.  Each has a program that writes it for each class of slots.
        self.row_ranks = row_ranks(pool_spec.rank_classes, finely=self.runs_ahead)
        self._loads = AdapterLoads(self._read, store.is_here, lambda: self.clock())
        one = sum(x.nbytes for x in jax.tree.leaves(zero_rows(base.config, pool_spec)))  # of an adapter that was read
        most = max(size.slots for size in self.sizes)
        # An exchange may replace every adapter at once: their successors are read by then, as far as memory allows.
        self.ahead = max(READERS, min(most, store.host_memory().limit // 2 // one))
        self.ahead_bytes = self.ahead * one
        store.set_aside(self.ahead_bytes)
        self._sequences: dict[str, Sequence] = {}
        self._processors: dict[str, OutputProcessor] = {}
        self._saved: dict[str, HostPages] = {}  # KV of preempted requests
        self._mover = PageMover(mesh)
        self.clock = time.monotonic
        self.decoded_tokens = 0  # generated since the start
        self.prefilled_tokens = 0
        self.resizes = 0  # changes of the number of slots and pages
        self.telemetry = Telemetry()

    def shapes(self) -> list[tuple[int, int]]:
        """Returns every (lanes, tokens per lane) of a batch that this engine runs."""
        return [(g, self.config.prefill_tokens) for g in self._ladder(self.config.prefill_lanes)] + [
            (g, 1) for g in self._ladder(self.config.rows)
        ]

    def programs(self) -> list[Shapes]:
        """Returns the shapes of the batches of every step program: of one batch each, and where the engine mixes, of two."""
        alone, full = [(shape,) for shape in self.shapes()], (self.config.rows, 1)
        return alone + [(*shapes, full) for shapes in alone if self.mixes and shapes[0][1] > 1]

    def _ladder(self, full: int) -> list[int]:
        small = full // SHORT_LANES
        return [small, full] if small >= MIN_ROWS and small % self._lane_parts() == 0 else [full]

    def _lane_parts(self) -> int:
        """Returns over how many groups of devices lanes are split."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def warm_up(self, compiling: Counted = uncounted) -> None:
        """Compiles and runs every program once, on padding that is written nowhere, and the loading of an adapter.

        The adapters that lie in slots, and the KV of requests, stay as they are; where there are several sizes, each is
        taken in turn.
        compiling: called before each program of each shape of the step; the copies of KV and adapters count as one more, all
        for each size.
        """
        programs = [(shapes, needs) for shapes in self.programs() for needs in self._programs.needs(shapes[0][1])]
        number, of = 0, len(self.sizes) * (len(programs) + 1)
        for _ in self._every_size():
            for shapes, needs in programs:
                compiling(number := number + 1, of)
                for slot in {NO_ADAPTER, 0} if self.base_alone else {NO_ADAPTER}:
                    packed = tuple(self._idle.make(lanes, tokens) for lanes, tokens in shapes)
                    for batch in packed:
                        batch.fields.slot_G[:] = slot
                        needs.ask(batch.fields)
                    edited = needs.work is Work.EDITED
                    edits = self._edits.make(sum(b.lanes for b in packed), tokens=edited, allowed=edited)
                    jax.device_get(self._run(packed, edits))
            compiling(number := number + 1, of)
            self._kv = self._mover.warm_up(self._kv)
            for rank in self.row_ranks:
                self._rehearse(zero_rows(self.base.config, self._rows_spec(rank)), rank)
            if len(self.sizes) > 1:
                self._rehearse(self._copy(0))
            jax.block_until_ready(self._pool)
        give_back()

    def _every_size(self) -> Iterator[None]:
        """Changes to each other size, and back to the present one."""
        present = self.size
        for size in [*(s for s in self.sizes if s != present), present]:
            if size != self.size:
                self._change_to(size)
            yield

    def _rehearse(self, rows: Rows, least: int = 1) -> None:
        """Writes rows to a free slot of each class of this rank at least; where all are in use, to a pool that is thrown away."""
        free = set(range(self.slots.count)) - set(self.slots.resident().values())
        for rank in (rank for rank in self.slots.classes if rank >= least):
            slot = min((s for s in free if self.slots.rank(s) == rank), default=None)
            if slot is not None:
                self._write(slot, rows)
            else:
                pool = empty_serving_pool(self.base.config, self.pool_spec, self.mesh)
                self._write_slot(pool, *self._on_device(0, rows), rank)

    def _empty_pages(self) -> KVPages:
        kv_dtype = self.base.dtype if self.config.kv_dtype is None else jnp.dtype(self.config.kv_dtype)
        return empty_pages(
            self.base.config, self.mesh, pages=self.size.pages, page_tokens=self.config.page_tokens, dtype=kv_dtype
        )

    # ---- slots and pages ------------------------------------------------------------------------------------------

    def resize(self, size: SlotSize) -> None:
        """Changes to another of `sizes` between two steps.  Compiles nothing, ends no request and changes no answer.

        Every sequence is preempted, and goes on at the same token.  The prefix cache is emptied.  Adapters stay in slots, the
        active ones first.
        """
        start, before = time.monotonic(), self.size
        self._change_to(size)
        self._policy.set(self.clock(), size)
        self.resizes += 1
        LOG.info(
            "slots %d → %d, KV pages %d → %d, in %.2f s",
            before.slots,
            size.slots,
            before.pages,
            size.pages,
            time.monotonic() - start,
        )

    def _change_to(self, size: SlotSize) -> None:
        """Adapters are copied while the memory of the KV is free, so that no more is held than before and after."""
        jax.block_until_ready([program.out for program in self._launched])  # it uses that memory
        for s, pages in self.scheduler.vacate():
            self._saved[s.request.id] = self._mover.save(self._kv, pages)
        _free(self._kv)
        limit = min(self._tuning.active_slots or size.slots, size.slots)
        moves = self.scheduler.resize(size, limit, self.clock())
        kept = [(new, self._copy(old)) for old, new in moves.items()]
        jax.block_until_ready(kept)
        _free(self._pool)
        self.size, self.pool_spec = size, replace(self.pool_spec, slots=size.slots)
        with jax.transfer_guard_host_to_device("allow"):  # of a zero
            self._pool = empty_serving_pool(self.base.config, self.pool_spec, self.mesh)
        for slot, rows in kept:
            self._write(slot, rows)
        jax.block_until_ready(self._pool)
        _free([rows for _, rows in kept])
        self._kv = self._empty_pages()

    def _better_size(self) -> SlotSize | None:
        """Returns the size to change to before the next step; None: none."""
        if len(self.sizes) == 1 or self._tuning.slots is not None:
            return None
        now = self.clock()
        return self._policy.choose(now, self.scheduler.demand(now), self.scheduler.active.quantum_s)

    # ---- requests -------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Puts the request in the queue.

        Raises ContextLengthExceeded, Overloaded, RateLimited for more than a tenant's share of the queue, InvalidRequest
        when it can never fit, AlreadyExists for an id in use.
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
        processor = OutputProcessor(request, self.tokenizer, self.base.config.vocab)
        self._sequences[request.id] = sequence = self.scheduler.add(request, self.clock())
        self._processors[request.id] = processor
        sequence.waits = processor.waits
        if sequence.adapter is not None:
            self.store.borrow(sequence.adapter)  # its owner may delete it meanwhile

    def cancel(self, request_id: str) -> None:
        """Frees everything the request holds; does nothing when it has ended."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self.telemetry.ended["abort"] += 1
            self._end(sequence)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._sequences)

    @property
    def urgent(self) -> bool:
        """Whether a request waits for its first token."""
        return self.scheduler.counts()[2] > 0 or any(s.generated == 0 for s in self.scheduler.running)

    def step(self, deliver: Callable[[list[Delta]], None] | None = None) -> list[Delta]:
        """Launches one step and reads one: the same, or with `runs_ahead` the one before.  Returns its tokens.

        Adapters that have been read are copied into slots; then prompt chunks are computed, and one token for each
        decoding sequence.  Waits for a disk only when no sequence can run, and then for a moment.  A change of size is a step
        by itself.

        deliver: takes what is there before the last program has ended, first tokens above all; the rest is returned.
        """
        if (size := self._better_size()) is not None:
            self.resize(size)
            return []
        plan = self.scheduler.plan(self.clock(), self._loads.ready())
        self._move(plan)
        due, launched = self._launched, self._launch(plan)
        if self.runs_ahead and launched and not self.waits:
            self._launched = launched
        else:
            due, self._launched = due + launched, []
        # Programs are running; the adapters that enter next are read meanwhile, and what each has given is processed while
        # the next one runs.
        deltas = self._read_ahead()
        if plan.empty and not due and self._loads:
            self._loads.wait()
        for program in due:
            if deltas and deliver is not None:
                deliver(deltas)
                deltas = []
            deltas += self._take(program)
        return deltas

    def _move(self, plan: Plan) -> None:
        """Makes the copies of a plan: KV to the host, adapters into slots, KV back."""
        for s, pages in plan.save:
            self._saved[s.request.id] = self._mover.save(self._kv, pages)
        for ref, slot in plan.load:
            self._load(ref, slot)
        for s, pages in plan.restore:
            self._kv = self._mover.restore(self._kv, pages, self._saved.pop(s.request.id))

    # ---- adapters -------------------------------------------------------------------------------------------------

    def install(self, ref: AdapterRef, rows: Rows) -> int | None:
        """Copies a new version's device rows into a slot and announces it: no disk, no host, no compile.

        Returns the slot, or None when every slot has running requests: the version is then loaded for its first request.
        """
        self.announce(ref)
        slot = self.slots.find(ref)
        if slot is not None:
            return slot  # a request came first and had it loaded
        self.scheduler.settle()
        slot = self.slots.choose(self.scheduler.active.home(ref))
        if slot is not None:
            self._write(slot, rows)
            self.slots.place(slot, ref)
        return slot

    def announce(self, ref: AdapterRef) -> None:
        """Moves pins and followers of the adapter to a version that is new in the store; it is read when it is needed."""
        self.scheduler.active.succeed(ref)
        for old in self.scheduler.follow(ref):
            self.store.borrow(ref)
            self.store.give_back(old)

    def tune(self, tuning: Tuning, pins: Collection[AdapterRef]) -> None:
        """Applies these settings from the next step on; see `serve.engine.scheduler.apply`.  Compiles nothing."""
        slot_sizes = [size.slots for size in self.config.sizes]
        apply(tuning, self.scheduler, slots=self.size.slots, slot_sizes=slot_sizes, pins=pins)
        self._tuning = tuning
        if tuning.slots is not None and tuning.slots != self.size.slots:
            self.resize(self.sizes[slot_sizes.index(tuning.slots)])

    def release(self, ref: AdapterRef) -> bool:
        """Gives up the slot of a version.  Returns False, and does nothing, when a request uses it or waits for it."""
        if any(s.adapter == ref for s in self._sequences.values()):
            return False
        self.scheduler.settle()
        self.slots.drop(ref)
        self.scheduler.forget(ref)
        return True

    def rehearse_install(self, rows: Rows) -> None:
        """Compiles `install` for rows of this shape, at every size; a slot in use stays as it is."""
        for _ in self._every_size():
            self._rehearse(rows)

    def _read_ahead(self) -> list[Delta]:
        """Reads the adapters that enter next; ends the requests of those that cannot be read."""
        deltas = []
        for ref, error in self._loads.want(self.scheduler.wanted(self.ahead)):
            users = [s for s in self._sequences.values() if s.adapter == ref]
            for s in users:
                self.telemetry.ended["error"] += 1
                self._end(s)
            deltas += [Delta(request_id=s.request.id, error=error) for s in users]
            if ref in self.scheduler.active.pinned:  # else it would be read again at every step
                LOG.error("adapter %s cannot be read, and is pinned no more: %s", ref.name, error.message)
                self.scheduler.active.unpin(ref)
        return deltas

    def _read(self, ref: AdapterRef) -> Rows:
        """Reads a stored version as a slot's rows on the host.  Runs on a thread of its own: it may read the disk."""
        adapter = self.store.get(ref, self.pool_spec.dtype)
        if adapter.base_hash != self.base_hash:
            raise BaseMismatch(f"adapter {ref.name} was made for another base model; serve it on that one")
        rank = next((r for r in self.row_ranks if r >= adapter.spec.max_rank), self.pool_spec.rank)
        return host_rows(self.base.config, self._rows_spec(rank), adapter)

    def _rows_spec(self, rank: int) -> PoolSpec:
        """Returns what rows on the host are padded to, on their way to a slot."""
        return replace(self.pool_spec, slots=1, rank=rank, classes=())

    def _rank_of(self, ref: AdapterRef) -> int:
        """Returns the version's rank; the largest where it cannot be told, as its reader will say why."""
        try:
            return self.store.rank(ref)
        except JaxLoraError:
            return self.pool_spec.rank

    def _load(self, ref: AdapterRef, slot: int) -> None:
        """Copies a version that has been read into its slot."""
        self._write(slot, self._loads.take(ref))
        self.telemetry.loads += 1

    def _on_device(self, slot: int, rows: Rows) -> tuple[jax.Array, Rows]:
        return _index(slot), jax.device_put(rows)

    def _write(self, slot: int, rows: Rows) -> None:
        self._pool = self._write_slot(self._pool, *self._on_device(slot, rows), self.slots.rank(slot))

    def _write_slot(self, pool: ServingPool, slot: jax.Array, rows: Rows, owned: int) -> ServingPool:
        return slot_writer(self.base.config, self.pool_spec, self.mesh)(pool, slot, rows, owned)

    def _copy(self, slot: int) -> Rows:
        """Returns a copy of a slot's rows on the device, where slots are of one class."""
        return self._read_slot(self._pool, _index(slot), self.pool_spec.rank)

    # ---- programs -------------------------------------------------------------------------------------------------

    def _edits_of(self, lanes: int, chosen: list[tuple[int, Sequence]]) -> LogitEdits:
        """Returns the edits of a program of so many lanes, in some of which sequences choose a token."""
        waiting = [(lane, self._processors[s.request.id]) for lane, s in chosen if s.waits]
        tokens, allowed = any(p.edits_tokens for _, p in waiting), any(p.has_grammar for _, p in waiting)
        edits = self._edits.make(lanes, tokens=tokens, allowed=allowed)
        for lane, processor in waiting:
            processor.edit(edits, lane)
        return edits

    def _run(self, packed: PackedBatches, edits: LogitEdits) -> StepOutput:
        """Starts a program of the step and returns its output, which is on the device when the program has ended."""
        fields = [batch.fields for batch in packed]
        needs = Needs.of(*fields, edited=not self._edits.are_idle(edits))
        if self.mesh.size > 1:  # on one device the call copies them itself, in a tenth of the time of device_put
            packed = place_rows(self.mesh, packed)
        placed = self._edits.place(edits)
        alone = self.base_alone and all((batch.slot_G == NO_ADAPTER).all() for batch in fields)
        with jax.transfer_guard_host_to_device("allow"):
            self._kv, self._newest, out = self._programs.launch(
                self.base, {} if alone else self._pool, self._kv, self._newest, packed, placed, needs
            )
        return out

    def _smallest(self, full: int, needed: int) -> int:
        return next(size for size in self._ladder(full) if size >= needed)

    def _launch(self, plan: Plan) -> list[Launched]:
        if plan.prefill and plan.decode and self.mixes:
            launched = [self._start(plan.prefill, plan.decode)]
        else:
            parts = (plan.prefill, []), ([], plan.decode)
            launched = [self._start(*part) for part in parts if any(part)]
        if self.runs_ahead:
            for x in jax.tree.leaves([program.out for program in launched]):
                x.copy_to_host_async()
        for program in launched:
            for _, s, _ in program.chosen:
                s.pending += 1
        return launched

    def _start(self, chunks: list[Chunk], sequences: list[Sequence]) -> Launched:
        """Starts one program for prompt chunks, for the next tokens of running sequences, or for both.

        Beside chunks there is always the full number of rows: it is one program less, and padding costs next to nothing there.
        """
        packed: PackedBatches = ()
        chosen: list[tuple[int, Sequence]] = []
        lanes, scored = 0, False
        if chunks:
            lanes = self._smallest(self.config.prefill_lanes, len(chunks))
            packed = (self._idle.make(lanes, self.config.prefill_tokens),)
            fields = packed[0].fields
            for lane, c in enumerate(chunks):
                fill_lane(fields, lane, c, self._processors[c.sequence.request.id])
            chosen = [(lane, c.sequence) for lane, c in enumerate(chunks) if c.chooses]
            scored = bool((fields.target_GJ >= 0).any())
        if sequences:
            rows = self.config.rows if chunks else self._smallest(self.config.rows, len(sequences))
            processors = [self._processors[s.request.id] for s in sequences]
            packed += (self._rows.batch(rows, sequences, processors),)
            chosen += [(lanes + row, s) for row, s in enumerate(sequences)]
            lanes += rows
        out = self._run(packed, self._edits_of(lanes, chosen))
        for c in chunks:
            c.sequence.done = c.start + c.count
            if c.sequence.prompt_left == 0:
                self.scheduler.computed(c.sequence)
        for s in sequences:
            s.done += 1
        return Launched(
            out=out if scored or out.scores is None else replace(out, scores=None),
            chosen=[(lane, s, s.adapter) for lane, s in chosen],
            chunks=chunks if scored else [],
            prefilled=sum(c.count for c in chunks),
        )

    def _take(self, program: Launched) -> list[Delta]:
        """Waits for a program and processes its tokens into what clients get.  Those of ended sequences are dropped."""
        out, deltas = jax.device_get(program.out), []
        now = self.clock()
        self.prefilled_tokens += program.prefilled
        for lane, c in enumerate(program.chunks):
            if out.scores is not None and c.sequence.status is not Status.FINISHED:
                self._processors[c.sequence.request.id].score(out.scores, lane, c.start, c.count)
        for lane, s, adapter in program.chosen:
            s.pending -= 1
            if s.status is Status.FINISHED:
                continue
            cached_tokens = s.cached_tokens if s.generated == 0 else 0
            delta = self._processors[s.request.id].take(out, lane, adapter, cached_tokens)
            self.telemetry.took(s, delta, now)
            s.tokens += delta.tokens
            self.decoded_tokens += len(delta.tokens)
            deltas.append(delta)
            if delta.finish is not None or delta.error is not None:
                self._end(s)
        return deltas

    def _end(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        if sequence.adapter is not None:
            self.store.give_back(sequence.adapter)
        for table in (self._sequences, self._processors, self._saved):
            table.pop(sequence.request.id, None)
        if not self._sequences:
            self._launched = []  # nobody waits for it


def _index(slot: int) -> jax.Array:
    return jax.device_put(np.int32(slot))


def _free(arrays: object) -> None:
    """Frees the memory of device arrays, whoever still refers to them."""
    for x in jax.tree.leaves(arrays):
        x.delete()
