"""From settings to a running server: base, store, engine, device thread, HTTP.  Everything is joined here."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Generator
from pathlib import Path
from typing import NoReturn

import numpy as np

from jaxlora.checkpoints.load import Opened, open_base
from jaxlora.config.serving import AdapterSection, ServeConfig
from jaxlora.core.lora import ALL_TARGETS, HEAD_TARGET, AdapterRef, AdapterWeights
from jaxlora.model import compile_cache
from jaxlora.model.lora_pool import PoolSpec
from jaxlora.peft.folder import import_peft
from jaxlora.storage.adapter_store import AdapterStore
from jaxlora.storage.disk_cache import DiskCopies, Remote
from jaxlora.storage.lease import Lease
from jaxlora.storage.object_store import Blobs
from jaxlora.storage.remote_adapters import RemoteVersions
from serve.auth import LOCAL_TENANT
from serve.engine import Engine, EngineConfig
from serve.http_server import HttpServer, make_http
from serve.observe import Observers, observing
from serve.retune import retuned_by_hangup
from serve.runner import Runner
from serve.services import Services, services

LOG = logging.getLogger("serve")
LOST_EXIT = 1  # the device is lost: whoever keeps the server running starts it again
STOP_S = 20.0  # for the present step to end, or the device is lost
FLUSH_S = 10.0  # for published versions to reach the disk, when it is


@contextlib.contextmanager
def opened_remote(config: ServeConfig) -> Generator[Remote | None]:
    """Object storage, if there is one, with the right to write to it.  Raises as Blobs and Lease do."""
    if config.blobs is None:
        yield None
        return
    most_bytes = None if config.blobs.disk_gb is None else int(config.blobs.disk_gb * 1e9)
    blobs = Blobs(config.blobs.url, timeout_s=config.blobs.timeout_s)
    with contextlib.closing(Lease(blobs, config.data, waiting=_tell_waiting)):
        yield Remote(blobs=blobs, copies=DiskCopies(most_bytes))


def _tell_waiting(who: str) -> None:
    print(f"object storage was written by {who} a moment ago; waiting until that is over", flush=True)


def open_store(config: ServeConfig, remote: Remote | None = None) -> AdapterStore:
    """The server's adapters.  Raises StorageFailed, StateInvalid, Unavailable as AdapterStore does."""
    versions = None if remote is None else RemoteVersions(remote.blobs, remote.copies)
    return AdapterStore(config.adapters, host_bytes=int(config.host_adapters_gb * 1e9), remote=versions)


def make_runner(opened: Opened, config: ServeConfig, store: AdapterStore) -> Runner:
    """A runner over this base that is not started yet.  Serves LoRA on all seven projections and on the head."""
    pool_spec = PoolSpec(slots=config.slots, rank=config.max_rank, dtype=opened.base.dtype.name, targets=ALL_TARGETS)
    engine_config = EngineConfig(
        rows=config.rows,
        prefill_lanes=config.prefill_lanes,
        prefill_tokens=config.prefill_tokens,
        pages=config.kv_pages,
        page_tokens=config.page_tokens,
        kv_dtype=None if config.kv_dtype == "auto" else config.kv_dtype,
        max_tokens=min(opened.base.config.context, config.kv_pages * config.page_tokens),
        max_waiting=config.max_waiting,
        max_waiting_tokens=config.max_waiting_tokens,
        host_bytes=int(config.host_kv_gb * 1e9),
        quantum_s=config.tuning.quantum_ms / 1000,
    )
    engine = Engine(opened.base, opened.mesh, engine_config, pool_spec, store, opened.tokenizer, opened.base_hash)
    return Runner(engine, base_name=opened.name)


def read_head(opened: Opened) -> np.ndarray:
    """The base's head [V, D], copied from the device."""
    arrays = opened.base.arrays
    return np.asarray(arrays["embed"]) if opened.base.config.tied else np.asarray(arrays["head"]).T


def load_peft(runner: Runner, opened: Opened, section: AdapterSection) -> AdapterRef:
    """The adapter of a PEFT folder in the store; a new version only when it differs from the newest one.

    Logs what its owner should know.  Raises AdapterInvalid when the folder cannot be held exactly, InvalidRequest for
    the base's name.
    """
    runner.catalog.check_name(LOCAL_TENANT, section.name)
    engine = runner.engine
    newest = engine.store.latest(LOCAL_TENANT, section.name)
    weights, report = import_peft(
        section.path,
        opened.base.config,
        base_hash=opened.base_hash,
        max_rank=engine.pool_spec.rank,
        head_supported=HEAD_TARGET in engine.pool_spec.targets,
        read_head=lambda: read_head(opened),
    )
    for note in report.notes:
        LOG.warning("adapter %s: %s", section.name, note)
    if report.ignored:
        LOG.warning("adapter %s: these settings have no effect here: %s", section.name, ", ".join(report.ignored))
    if newest is not None and _same(engine.store.get(newest), weights):
        return newest
    return engine.store.add(LOCAL_TENANT, section.name, weights)


def _same(one: AdapterWeights, other: AdapterWeights) -> bool:
    """Whether they compute the same."""
    return (
        one.spec == other.spec
        and one.base_hash == other.base_hash
        and one.weights.keys() == other.weights.keys()
        and all(
            np.array_equal(x, y) for t in one.weights for x, y in zip(one.weights[t], other.weights[t], strict=True)
        )
    )


def main(config: ServeConfig, file: Path | None) -> None:
    """`jaxlora serve`: answers until SIGTERM or Ctrl-C, and then until what is open is complete.  file: where the settings came from; SIGHUP has its tuning read again.

    Ends the process itself when the device is lost.
    """
    compile_cache.enable(None)
    with opened_remote(config) as remote:
        _serve(config, file, remote)


def _serve(config: ServeConfig, file: Path | None, remote: Remote | None) -> None:
    opened = open_base(config.model, config.mesh)
    store = open_store(config, remote)
    runner = make_runner(opened, config, store)
    try:
        with (
            observing(runner, config) as observers,
            services(runner, opened, config, lambda: read_head(opened), remote) as own,
        ):
            http = make_server(runner, config, observers, own)
            try:
                begin(runner, opened, config, own)
                http.listen()  # who reads the next line may ask at once
                if own.keyless:
                    print("there are no keys: anyone on this machine may do everything (see jaxlora keys --help)")
                print(f"serving {opened.name} and {len(store.list(None))} adapters on {http.url}/v1", flush=True)
                retuned = contextlib.nullcontext() if file is None else retuned_by_hangup(runner, file)
                with observers.compiles, retuned:
                    try:
                        http.run()
                    finally:
                        if not runner.end(STOP_S):
                            leave(store)
            finally:
                runner.stop()
    finally:
        store.close()


def leave(store: AdapterStore) -> NoReturn:
    """Ends the process as a kill would, but that versions which were published reach the disk.

    Jobs go on from their newest checkpoints in the next process: what they have learned since lies on a device that
    cannot be read, and an update may be half done.
    """
    LOG.critical("the device is lost; the server ends with exit code %d, to be started again", LOST_EXIT)
    saving = threading.Thread(target=store.flush, daemon=True)
    saving.start()
    saving.join(FLUSH_S)
    logging.shutdown()
    sys.stdout.flush()
    os._exit(LOST_EXIT)


def make_server(runner: Runner, config: ServeConfig, observers: Observers, own: Services) -> HttpServer:
    """Everything behind HTTP.  Raises ConfigInvalid when the address is taken or not ours."""
    return make_http(
        runner,
        host=config.host,
        port=config.port,
        default_max_tokens=config.default_max_tokens,
        max_request_s=config.max_request_s,
        grace_s=config.grace_s,
        routers=[*observers.routers, *own.routers],
        listeners=observers.listeners,
        open_paths=observers.open_paths,
        caller_of=own.caller_of,
        limiter=own.limiter,
        body_limits=own.body_limits,
        error_shapes=own.error_shapes,
        door=own.door,
    )


def begin(runner: Runner, opened: Opened, config: ServeConfig, own: Services) -> None:
    """Loads what the settings name, compiles all programs and goes on with the jobs of an earlier process."""
    for section in config.load:
        ref = load_peft(runner, opened, section)
        print(f"loaded {section.name} as version {ref.version}")
    runner.tune(config.tuning)
    print(f"compiling {len(runner.engine.shapes())} programs for {opened.name} ({opened.base.dtype.name})", flush=True)
    runner.start()
    if own.jobs is not None:
        print("compiling the training step", flush=True)
        own.jobs.start()


def stop(runner: Runner, store: AdapterStore) -> None:
    """Ends the device thread and saves what is not on disk yet, whatever the thread ended with."""
    try:
        runner.stop()
    finally:
        store.close()
