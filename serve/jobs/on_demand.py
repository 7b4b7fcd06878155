"""On-demand training: calls that make one update of an adapter and return when its new version is served.

    fine_tune ─▶ its state (kept, or from disk, or new moments for its newest version) ─▶ LiveJobs.train_once ─▶ version n + 1

The store holds the weights of every version.  The moments are kept in RAM for a few adapters, and written in the
background for all; where they are of another version than the newest, new ones begin.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jaxlora.config.training import CROSS_ENTROPY, Optimizer
from jaxlora.core.adapter_size import adapter_size
from jaxlora.core.errors import AdapterNotFound, InvalidRequest, JaxLoraError, StorageAway
from jaxlora.core.lora import AdapterRef, LoraSpec
from jaxlora.model.lora_pool import Rows
from jaxlora.storage.checkpoint_writer import CheckpointWriter, Snapshot
from jaxlora.storage.checkpoints import read_meta, restore_state
from jaxlora.storage.remote_states import StateCopies
from serve.access.adapter_quota import AdapterQuota
from serve.jobs.live_jobs import GuestCall, LiveJobs
from serve.runtime.device_thread import DeviceThread
from serve.runtime.publisher import Publisher
from train.data.examples import Example
from train.data.mixer import Batches
from train.step.state import SlotState, fresh_adapter
from train.trainer import StepReport, Trainer

LOG = logging.getLogger("serve")
KEPT_STATES = 8  # in RAM
KEPT_VERSIONS = 16  # of an adapter


@dataclass(frozen=True, kw_only=True, slots=True)
class FineTuned:
    """The result of one call."""

    tokens: int  # trained, target tokens
    sum_loss: float  # nats of all of them under the weights before the update
    ref: AdapterRef  # the version after


@dataclass(frozen=True, slots=True)
class _Tuned:
    """The optimizer state of an adapter after some calls."""

    version: int
    calls: int
    state: SlotState


class _Waiting:
    """A caller on an event loop, which the device thread resumes."""

    def __init__(self, publisher: Publisher, before: AdapterRef, spec: LoraSpec, keep: int):
        """before: the version that is updated.  keep: versions of the adapter that stay."""
        self._publisher, self._before, self._spec, self._keep = publisher, before, spec, keep
        self._loop = asyncio.get_running_loop()
        self.done: asyncio.Future[tuple[FineTuned, SlotState]] = self._loop.create_future()

    def updated(self, report: StepReport, rows: Rows, state: SlotState) -> None:
        """Publishes the update, unless the adapter was deleted meanwhile.  Device thread only."""
        tenant, name = self._before.tenant, self._before.name
        try:
            ref = self._publisher.publish(tenant, name, self._spec, rows, keep=self._keep, after=self._before)
        except (JaxLoraError, OSError) as error:
            self.failed(error)
            return
        done = FineTuned(tokens=report.targets, sum_loss=report.nll, ref=ref)
        self._settle(self.done.set_result, (done, state))

    def failed(self, error: Exception) -> None:
        """Raises the error at the caller.  Device thread only."""
        self._settle(self.done.set_exception, error)

    def _settle[T](self, settle: Callable[[T], None], value: T) -> None:
        self._loop.call_soon_threadsafe(lambda: None if self.done.done() else settle(value))


class Tuner:
    """Creates, trains and deletes adapters call by call.  On one event loop, but for `forget` and `close`."""

    def __init__(
        self,
        runner: DeviceThread,
        live: LiveJobs,
        trainer: Trainer,
        states: Path,
        quota: AdapterQuota,
        copies: StateCopies | None = None,
        *,
        call_tokens: int,
    ):
        """states: folder of the moments.  copies: object storage behind it.  call_tokens: most that one call trains on."""
        self._runner, self._live, self._trainer, self._store = runner, live, trainer, runner.engine.store
        self._states, self._quota, self._copies = states.absolute(), quota, copies
        self._call_tokens = call_tokens
        self._writer = CheckpointWriter(copies=copies)
        self._kept: OrderedDict[tuple[str, str], _Tuned] = OrderedDict()
        self._guard = threading.Lock()
        self._turns: dict[tuple[str, str], asyncio.Lock] = {}

    def is_made_by_job(self, tenant: str, name: str) -> bool:
        """Returns whether an unfinished job makes the tenant's adapter of this name.  Waits for nothing."""
        return self._runner.catalog.jobs.makes(tenant, name)

    async def create(self, tenant: str, name: str, spec: LoraSpec, seed: int) -> AdapterRef:
        """Creates an adapter that changes nothing yet, as version 1.

        Raises AdapterInvalid for a rank or targets that no slot holds, InvalidRequest for a bad name, QuotaExceeded,
        StorageFailed.
        """

        def make() -> AdapterRef:
            trainer = self._trainer
            trainer.seats.check(spec)
            self._quota.check(tenant, adapter_size(trainer.base.config, spec).nbytes, another=True)
            self._runner.catalog.check_name(tenant, name)
            ref = self._store.add(tenant, name, fresh_adapter(trainer.base.config, spec, seed, trainer.base_hash))
            self._store.wait_saved(ref)
            return ref

        return await asyncio.to_thread(make)

    async def fine_tune(self, tenant: str, name: str, examples: Sequence[Example], optimizer: Optimizer) -> FineTuned:
        """Makes one update by all these examples; their loss is divided by the number of their target tokens.

        Calls for one adapter run in the order they came.  One whose caller goes away runs all the same.
        optimizer: its numbers; the schedule is constant.
        Raises AdapterNotFound, also when it is deleted meanwhile; InvalidRequest for too many tokens; DataInvalid for
        examples that cannot be trained on; AdapterNotFinite, and changes
        nothing, when the loss or its gradient is not finite; StorageFailed or OSError when the version cannot be stored.
        """
        return await asyncio.shield(self._in_turn(tenant, name, examples, optimizer))

    async def _in_turn(self, tenant: str, name: str, examples: Sequence[Example], optimizer: Optimizer) -> FineTuned:
        key = tenant, name
        async with self._turns.setdefault(key, asyncio.Lock()):
            spec, tuned = await asyncio.to_thread(self._state_of, tenant, name)
            batches = await asyncio.to_thread(self._checked, spec, examples)
            keep = await asyncio.to_thread(self._kept_versions, tenant, name)
            before = AdapterRef(tenant, name, tuned.version)
            waiting = _Waiting(self._runner.publisher, before, spec, keep)
            call = GuestCall(
                name=f"call-{uuid.uuid4().hex}",
                owner=tenant,
                spec=spec,
                optimizer=replace(optimizer, schedule="constant", warmup_steps=0, total_steps=tuned.calls + 1),
                examples=batches,
                state=tuned.state,
                step=tuned.calls,
                caller=waiting,
            )
            await asyncio.to_thread(self._runner.call, lambda: self._live.train_once(call))
            done, state = await waiting.done
            self._keep(key, _Tuned(done.ref.version, tuned.calls + 1, state), spec)
            if self._store.latest(tenant, name) is None:  # deleted just now
                self.forget(tenant, name)
            await asyncio.to_thread(self._store.wait_saved, done.ref)  # what is answered survives a kill
            return done

    def _checked(self, spec: LoraSpec, examples: Sequence[Example]) -> Batches:
        """Returns the examples of a call as one batch.  Raises InvalidRequest, DataInvalid."""
        tokens = sum(example.predictions for example in examples)
        if tokens > self._call_tokens:
            raise InvalidRequest(
                f"this call trains on {tokens} tokens, this server takes at most {self._call_tokens} in one call "
                "(training.call_tokens); send fewer samples",
                param="samples",
            )
        return self._trainer.check(spec, examples, len(examples), CROSS_ENTROPY)

    async def delete(self, tenant: str, name: str) -> None:
        """Deletes the adapter at once; running requests end on it.  Raises AdapterNotFound."""
        async with self._turns.setdefault((tenant, name), asyncio.Lock()):
            await asyncio.to_thread(self._store.delete, tenant, name)
            self.forget(tenant, name)
        self._turns.pop((tenant, name), None)

    def forget(self, tenant: str, name: str) -> None:
        """Drops the optimizer state of a deleted adapter; its files are removed soon.  From any thread."""
        with self._guard:
            self._kept.pop((tenant, name), None)
        self._writer.discard(f"{tenant}/{name}", self._states / tenant / name)

    def close(self) -> None:
        """Waits until all moments are on disk."""
        self._writer.close()

    def _kept_versions(self, tenant: str, name: str) -> int:
        """Returns how many versions may stay after this call; where the tenant's bytes are used up, as many as there are."""
        versions = self._store.versions(tenant, name)
        if not versions or self._quota.has_room(versions[-1]):
            return KEPT_VERSIONS
        return min(len(versions), KEPT_VERSIONS)

    def _state_of(self, tenant: str, name: str) -> tuple[LoraSpec, _Tuned]:
        """Returns the spec and the optimizer state of the newest version.  Reads the disk."""
        ref = self._store.latest(tenant, name)
        if ref is None:
            raise AdapterNotFound(f"no adapter named {name!r}", param="name")
        adapter = self._store.get(ref)
        with self._guard:
            kept = self._kept.get((tenant, name))
        if kept is None:
            kept = self._stored(tenant, name, adapter.spec)
        if kept is None or kept.version != ref.version:
            kept = _Tuned(ref.version, 0, self._trainer.seat_of(adapter))
        return adapter.spec, kept

    def _stored(self, tenant: str, name: str, spec: LoraSpec) -> _Tuned | None:
        """Reads the optimizer state from the disk; None where there is none of this base and spec."""
        self._writer.flush()
        folder, trainer = self._states / tenant / name, self._trainer
        wanted = {"base": trainer.base_hash, "spec": spec.to_json(), "moments": trainer.moments}
        try:
            if self._copies is not None:
                self._copies.bring(folder)
            meta = read_meta(folder)
            if meta is None or any(meta.get(k) != v for k, v in wanted.items()):
                return None
            found = restore_state(folder, trainer.fresh(spec, 0))
        except StorageAway:
            raise
        except JaxLoraError as error:
            LOG.warning("the moments of %s/%s begin anew: %s", tenant, name, error)
            return None
        if found is None:
            return None
        assert isinstance(found.arrays, SlotState)
        return _Tuned(int(meta["version"]), int(meta["calls"]), found.arrays)

    def _keep(self, key: tuple[str, str], tuned: _Tuned, spec: LoraSpec) -> None:
        trainer = self._trainer
        with self._guard:
            self._kept[key] = tuned
            self._kept.move_to_end(key)
            while len(self._kept) > KEPT_STATES:
                self._kept.popitem(last=False)
        meta = {"base": trainer.base_hash, "spec": spec.to_json(), "moments": trainer.moments}
        snapshot = Snapshot(
            folder=self._states / key[0] / key[1],
            step=tuned.version,
            arrays=tuned.state,
            meta=meta | {"version": tuned.version, "calls": tuned.calls},
            keep=1,
            best=None,
        )
        self._writer.submit("/".join(key), snapshot)
