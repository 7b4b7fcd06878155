"""The composition root: it builds a server from its settings and runs it.

settings ─▶ base, store, engine, device thread ─▶ services over a database ─▶ observers ─▶ HTTP
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import numpy as np
from fastapi import APIRouter

from jaxlora.checkpoints.load import Found, Opened, find_base, fitted, head_of, load_found, open_source
from jaxlora.config.serving import (
    READ_MEMORY_BYTES,
    AdapterSection,
    RankClassSection,
    ServeConfig,
    SizedConfig,
    SizedTraining,
)
from jaxlora.config.training import TooLong, default_lr
from jaxlora.core.errors import (
    AdapterInvalid,
    AdapterNotFound,
    ConfigInvalid,
    InvalidRequest,
    JaxLoraError,
    StorageFailed,
)
from jaxlora.core.lora import ALL_TARGETS, HEAD_TARGET, AdapterRef, AdapterWeights
from jaxlora.core.progress import Progress
from jaxlora.model import compile_cache
from jaxlora.model.compile_cache import CompileCounter
from jaxlora.model.lora_pool import PoolSpec
from jaxlora.model.machine import machine_of, memory_errors
from jaxlora.model.memory_plan import plan_server
from jaxlora.model.serving_pool import serving_pool_bytes
from jaxlora.model.slot_classes import LEAST_SLOTS, slot_classes
from jaxlora.peft.folder import import_peft
from jaxlora.storage.adapter_store import AdapterStore
from jaxlora.storage.disk_cache import Remote
from jaxlora.storage.followed_adapters import FollowedVersions
from jaxlora.storage.remote_adapters import RemoteVersions
from pallas_kernels.dispatch import cpu_body
from pallas_kernels.gathered_lora.rank_classes import RankClasses
from serve.access.adapter_quota import AdapterQuota
from serve.access.caller import LOCAL_TENANT
from serve.access.keys import Keys, needs_keys
from serve.access.rate_limit import Limiter
from serve.api.adapters.routes import AdaptersRoutes
from serve.api.adapters.service import AdapterService
from serve.api.files.routes import FilesRoutes
from serve.api.files.service import FileStore
from serve.api.gradient.complete import DEFAULT_RANK, GradientConfig
from serve.api.gradient.errors import API, gradient_response
from serve.api.gradient.routes import GradientRoutes
from serve.api.jobs.routes import JobsRoutes
from serve.api.stats import StatsRoutes
from serve.api.tuning import TuningRoutes
from serve.db.database import Database
from serve.db.files import StoredFiles
from serve.db.gradient import StoredGradient
from serve.db.keys import StoredKeys
from serve.db.retention import Retention
from serve.engine.engine import Engine, EngineConfig
from serve.http.drain import Drain
from serve.http.idempotency import Once
from serve.http.request_log import METRICS_PATH, Listener
from serve.jobs.on_demand import Tuner
from serve.observability.logs import log_answered, logging_to
from serve.observability.metrics import HttpMetrics, MetricsRoutes, ServerMetrics
from serve.runtime.device_thread import DeviceThread
from serve.runtime.reload import retuned_by_hangup
from serve.server.announcer import Announcer
from serve.server.app import make_http
from serve.server.build_jobs import JobHost, make_job_host
from serve.server.gate import OPEN_PATHS, AppConfig
from serve.server.instance import Instance, opened_instance, same_base
from serve.server.uvicorn import bound
from train.data.example_cache import KeptExamples
from train.data.file_readers import FileReaders, ReaderLimits
from train.data.load import Loaded

LOG = logging.getLogger("serve")
SIZE_KEYS = "kv_pages, slots, max_rank, rows or the sizes of [training]"
KEPT_EXAMPLES_BYTES = 32 * 2**20  # of training files, read again soon after they came
LANE_TOKENS = 2048  # of a server that does not train: the longest example that a file may hold
PRIVATE = 0o077  # what others may not do with any file or folder that a server makes
LOST_EXIT = 1  # the device is lost: a supervisor starts the server again
STOP_S = 20.0  # for the present step to end, or the device is lost
FLUSH_S = 10.0  # for published versions to reach the disk, when it is


@dataclass(frozen=True, kw_only=True, slots=True)
class Observers:
    """Metrics, log, traces and stats, as the app takes them."""

    routers: Sequence[APIRouter]
    listeners: Sequence[Listener]
    open_paths: Collection[str]
    compiles: CompileCounter  # to be entered when all is compiled: it reports whatever still compiles


@contextlib.contextmanager
def observing(runner: DeviceThread, config: ServeConfig) -> Generator[Observers]:
    """Yields the observers of a runner.

    Raises ConfigInvalid for traces without the extra `otel`.
    """
    runner.watch.hang_s = config.hang_s
    http, compiles = HttpMetrics(), CompileCounter()
    server = ServerMetrics(runner, adapters=config.metrics_adapters, compiles=lambda: compiles.compiles)
    metrics = MetricsRoutes(server, http, is_open=config.metrics_open)
    listeners: list[Listener] = [http.heard, log_answered]
    with contextlib.ExitStack() as stack:
        if config.otel_endpoint is not None:
            try:
                from serve.observability.tracing import tracing_to

                tracing = tracing_to(config.otel_endpoint)
            except ImportError as error:
                raise ConfigInvalid("otel_endpoint needs the extra `otel`; install jaxlora[otel]") from error
            stack.callback(tracing.close)
            listeners.append(tracing.heard)
        yield Observers(
            routers=[metrics.router(), StatsRoutes(runner, runner.watch).router()],
            listeners=listeners,
            open_paths=OPEN_PATHS | {METRICS_PATH} if config.metrics_open else OPEN_PATHS,
            compiles=compiles,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Services:
    """The services of a server as the app takes them, and the jobs, which are started after the runner."""

    app: AppConfig
    jobs: JobHost | None  # None: this server takes none
    is_keyless: Callable[[], bool]  # whether every client may do everything


@contextlib.contextmanager
def services(
    runner: DeviceThread,
    opened: Opened,
    config: SizedConfig,
    database: Database,
    observers: Observers,
    read_head: Callable[[], np.ndarray],
    remote: Remote | None = None,
    drain: Drain | None = None,
) -> Generator[Services]:
    """Opens all services over a runner that has not started; leave after it has ended.

    read_head: see AdapterService.  remote: object storage for files and checkpoints.  drain: None takes requests at once.
    Raises ConfigInvalid for settings that do not go together, Unavailable, StorageFull, StorageFailed.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(Retention(database, config.retention).close)
        keys = Keys(StoredKeys(database), needed=needs_keys(config))
        training, store, drain = config.training, runner.engine.store, drain or Drain()

        readers, load = example_readers(opened, config, config.data / "tokenizer", lane_tokens=longest_tokens(training))
        stack.callback(readers.close)
        files = FileStore(StoredFiles(database), config.data / "files", load=load, limits=config.limits, remote=remote)
        stack.callback(files.close)
        limiter = Limiter(config.limits)
        quota, jobs = AdapterQuota(config.limits, store), None
        if training is not None:
            jobs = make_job_host(opened, config, training, runner, database, files, quota, remote)
            stack.callback(jobs.close)
        adapters = AdapterService(
            runner,
            config=opened.base.config,
            read_head=read_head,
            staging=config.data / "adapters-staging",
            roots=config.lora_roots,
            quota=quota,
            deleted=(lambda tenant, name: None) if jobs is None else jobs.tuner.forget,
        )
        once = Once(database)
        files_routes = FilesRoutes(files, database, once, limiter, max_file_bytes=config.limits.max_file_bytes)
        adapters_routes = AdaptersRoutes(adapters, limiter)
        routers = [files_routes.router(), adapters_routes.router(), TuningRoutes(runner).router()]
        if jobs is not None:
            routers.append(JobsRoutes(jobs.service, once, limiter).router())
        tuner = None if jobs is None else jobs.tuner
        routers.append(gradient_routes(runner, opened, config, database, once, limiter, tuner).router())
        keys.start(drain.shut_out)
        stack.callback(keys.close)
        stack.callback(readers.close)  # first: the other services wait for what they have asked
        app = app_config(
            config,
            observers,
            keys,
            limiter,
            drain,
            routers=routers,
            body_limits=files_routes.body_limits | adapters_routes.body_limits,
        )
        yield Services(app=app, jobs=jobs, is_keyless=lambda: keys.keyless)


def example_readers(
    opened: Opened, config: ServeConfig, folder: Path, *, lane_tokens: int
) -> tuple[FileReaders, KeptExamples]:
    """Returns what reads training files, to be closed, and what keeps the ones read last.  folder, lane_tokens: see FileReaders."""
    memory_bytes = config.limits.read_memory_bytes or READ_MEMORY_BYTES
    limits = ReaderLimits(memory_bytes=memory_bytes, cpu_s=config.limits.read_cpu_s)
    readers = FileReaders(opened.tokenizer, folder, lane_tokens=lane_tokens, limits=limits)

    def read(path: Path, too_long: TooLong) -> Loaded:
        return readers.load(path, path.parent.name, too_long)

    return readers, KeptExamples(read, max_bytes=KEPT_EXAMPLES_BYTES)


@contextlib.contextmanager
def reading_services(
    runner: DeviceThread, opened: Opened, config: SizedConfig, database: Database, observers: Observers, drain: Drain
) -> Generator[Services]:
    """Opens the services of a server that answers requests and changes nothing: those over keys and adapters of another.

    Raises ConfigInvalid where a key is needed and there is none, Unavailable.
    """
    keys, limiter = Keys(StoredKeys(database), needed=needs_keys(config)), Limiter(config.limits)
    gradient = gradient_routes(runner, opened, config, database, None, limiter, None)
    keys.start(drain.shut_out)
    try:
        app = app_config(config, observers, keys, limiter, drain, routers=[gradient.router()], body_limits={})
        yield Services(app=app, jobs=None, is_keyless=lambda: keys.keyless)
    finally:
        keys.close()


def gradient_routes(
    runner: DeviceThread,
    opened: Opened,
    config: SizedConfig,
    database: Database,
    once: Once | None,
    limiter: Limiter,
    tuner: Tuner | None,
) -> GradientRoutes:
    """Makes Gradient's wire; without a tuner it trains nothing."""
    training = config.training
    return GradientRoutes(
        runner,
        GradientConfig(
            default_lr=default_lr(opened.base.config),
            longest=longest_tokens(training) + 1,
            rank=min(DEFAULT_RANK, config.max_rank if training is None else training.max_rank),
        ),
        records=StoredGradient(database),
        once=once,
        tuner=tuner,
        limiter=limiter,
    )


def longest_tokens(training: SizedTraining | None) -> int:
    """Returns the tokens of the longest example that a file may hold."""
    return LANE_TOKENS if training is None else training.longest_tokens


def app_config(
    config: ServeConfig,
    observers: Observers,
    keys: Keys,
    limiter: Limiter,
    drain: Drain,
    *,
    routers: Sequence[APIRouter],
    body_limits: Mapping[str, int],
) -> AppConfig:
    """Makes the settings of the app over these services."""
    return AppConfig(
        default_max_tokens=config.default_max_tokens,
        max_request_s=config.max_request_s,
        routers=[*observers.routers, *routers],
        listeners=observers.listeners,
        open_paths=observers.open_paths,
        caller_of=keys.caller_of,
        limiter=limiter,
        limits=config.limits,
        http=config.http,
        body_limits=body_limits,
        error_shapes={API: gradient_response},
        drain=drain,
    )


def open_store(config: SizedConfig, instance: Instance | None = None) -> AdapterStore:
    """Opens the server's adapters, or another server's to read them.  instance: None keeps them in `config.adapters` alone.

    Raises StorageFailed, StateInvalid, Unavailable.
    """
    host_bytes = int(config.host_adapters_gb * 1e9)
    if instance is None:
        return AdapterStore(config.adapters, host_bytes=host_bytes)
    remote, reads = instance.remote, instance.reads
    kind = FollowedVersions if reads else RemoteVersions
    versions = None if remote is None else kind(remote.blobs, remote.copies)
    return AdapterStore(instance.adapters, host_bytes=host_bytes, remote=versions, reads=reads)


def with_store_classes(config: SizedConfig, opened: Opened, store: AdapterStore) -> SizedConfig:
    """Returns the settings with slots of several ranks, in the same memory, where they are chosen by what the store holds.

    Says in the log what was chosen.  Reads the description of each adapter.
    """
    if not config.classes_from_store or (config.tuning.pin and config.tuning.active_slots is not None):
        return config

    def nbytes(classes: RankClasses) -> int:
        return serving_pool_bytes(opened.base.config, _pool_spec(opened, classes), opened.mesh)

    ranks = []
    for ref in store.list(None):
        with contextlib.suppress(AdapterNotFound, StorageFailed):  # whoever asks for it is told
            ranks.append(store.rank(ref))
    least = max(LEAST_SLOTS, len(config.tuning.pin) + 1)
    (slots, _), *smaller = slot_classes(ranks, config.slots, config.max_rank, least, nbytes)
    sections = tuple(RankClassSection(slots=slots, rank=rank) for slots, rank in smaller)
    config = replace(config, slots=slots, rank_class=sections)
    words = " and ".join(f"{slots} of rank {rank}" for slots, rank in config.rank_classes)
    LOG.info("slots: %s, by the ranks of the %d adapters in the store", words, len(ranks))
    return config


def _pool_spec(opened: Opened, classes: RankClasses) -> PoolSpec:
    return PoolSpec(
        slots=sum(slots for slots, _ in classes),
        rank=classes[0][1],
        dtype=opened.base.dtype.name,
        targets=ALL_TARGETS,
        classes=classes,
    )


def make_runner(opened: Opened, config: SizedConfig, store: AdapterStore) -> DeviceThread:
    """Makes a runner over this base, not started yet.  It serves LoRA on all seven projections and on the head."""
    pool_spec = _pool_spec(opened, config.rank_classes)
    least_pages = min((size.pages for size in config.sizes), default=config.kv_pages)
    engine_config = EngineConfig(
        sizes=config.sizes,
        rows=config.rows,
        prefill_lanes=config.prefill_lanes,
        prefill_tokens=config.prefill_tokens,
        pages=config.kv_pages,
        page_tokens=config.page_tokens,
        kv_dtype=None if config.kv_dtype == "auto" else config.kv_dtype,
        max_tokens=min(opened.base.config.context, least_pages * config.page_tokens),
        max_waiting=config.max_waiting,
        max_waiting_tokens=config.max_waiting_tokens,
        host_bytes=int(config.host_kv_gb * 1e9),
        quantum_s=config.tuning.quantum_ms / 1000,
    )
    engine = Engine(opened.base, opened.mesh, engine_config, pool_spec, store, opened.tokenizer, opened.base_hash)
    return DeviceThread(engine, base_name=opened.name)


def read_head(opened: Opened) -> np.ndarray:
    """Reads the base's head [V, D] as its checkpoint has it."""
    return head_of(open_source(opened.path))


def load_peft(runner: DeviceThread, opened: Opened, section: AdapterSection) -> AdapterRef:
    """Puts the adapter of a PEFT folder into the store, as a new version if it differs from the newest one.

    Logs the notes of the import.  Raises what `import_peft` does when the folder cannot be held exactly, InvalidRequest
    for the base's name.
    """
    runner.catalog.check_name(LOCAL_TENANT, section.name)
    engine = runner.engine
    newest = engine.store.latest(LOCAL_TENANT, section.name)
    weights, report = import_peft(
        section.path,
        opened.base.config,
        base_hash=opened.base_hash,
        base_name=opened.name,
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


def load_all(
    runner: DeviceThread, opened: Opened, sections: Sequence[AdapterSection], at: Callable[[int], None]
) -> None:
    """Loads the configured adapters; `at` hears the number of each.  Raises AdapterInvalid for all that cannot be loaded."""
    refused: list[tuple[str, JaxLoraError]] = []
    for number, section in enumerate(sections, 1):
        at(number)
        try:
            ref = load_peft(runner, opened, section)
        except (AdapterInvalid, InvalidRequest) as error:
            refused.append((f"[[load]] {section.name} ({section.path})", error))
        else:
            print(f"loaded {section.name} as version {ref.version}", flush=True)
    if refused:
        more = f"; so are {len(refused) - 1} more of [[load]]" if len(refused) > 1 else ""
        what, first = refused[0]
        details = [f"{what}: {detail}" for what, error in refused for detail in error.details or (error.message,)]
        raise AdapterInvalid(f"{what}: {first.message}{more}", details=tuple(details) if len(details) > 1 else ())


def _same(one: AdapterWeights, other: AdapterWeights) -> bool:
    """Whether two adapters compute the same."""
    return (
        one.spec == other.spec
        and one.base_hash == other.base_hash
        and one.weights.keys() == other.weights.keys()
        and all(
            np.array_equal(x, y) for t in one.weights for x, y in zip(one.weights[t], other.weights[t], strict=True)
        )
    )


def main(config: ServeConfig, file: Path | None, *, adopt: bool = False, new_base: bool = False) -> None:
    """`jaxlora serve`: serves until SIGTERM or Ctrl-C, and then until open requests are complete.

    file: where the settings came from; SIGHUP has its tuning read again.  adopt: see opened_instance.  new_base: see
    same_base.  Ends the process itself when the device is lost.
    """
    os.umask(PRIVATE)
    compile_cache.enable(None)
    with (
        logging_to(as_json=config.log == "json", level=config.log_level),
        contextlib.closing(bound(config.host, config.port)) as listening,  # a port that is taken is told at once
        Announcer(grace_s=config.grace_s, as_json=config.log == "json").until_stopped() as announcer,
        opened_instance(config, adopt=adopt) as instance,
    ):
        found, sized = planned(config, announcer.say)
        with memory_errors(f"serving {found.name}", SIZE_KEYS):
            with announcer.progress.stage(f"opening {found.name}"):
                opened = load_found(found, config.model, config.mesh)
            if opened.mesh.devices.flat[0].platform == "cpu":
                LOG.info("kernels: %s", cpu_body())
            opened = same_base(instance.database, config, opened, take=new_base)
            _serve(sized, file, instance, opened, listening, announcer)


def planned(config: ServeConfig, say: Callable[[str], None]) -> tuple[Found, SizedConfig]:
    """Finds the base, chooses the sizes that the settings leave out, and says the plan; loads nothing.

    Raises ModelInvalid, and ConfigInvalid for what does not fit.
    """
    machine = machine_of(config.mesh, config.memory_gb)
    found, plan = fitted(
        find_base(config.model), config.model, config.kv_dtype, lambda base: plan_server(config, base, machine)
    )
    for line in plan.lines():
        say(line)
    return found, plan.config


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """A server without HTTP, which `begin` starts."""

    store: AdapterStore
    runner: DeviceThread
    own: Services
    compiles: CompileCounter  # to be entered once it has begun


@contextlib.contextmanager
def assembled(config: SizedConfig, instance: Instance, opened: Opened, drain: Drain) -> Generator[Server]:
    """Joins a server over what is open; ends its device thread and saves what is not on disk yet on leaving.

    Raises as `open_store` and `services` do.
    """
    store = open_store(config, instance)
    try:
        config = with_store_classes(config, opened, store)
        runner = make_runner(opened, config, store)
        with contextlib.ExitStack() as stack:
            observers = stack.enter_context(observing(runner, config))
            if instance.reads:
                joined = reading_services(runner, opened, config, instance.database, observers, drain)
            else:
                head = functools.partial(read_head, opened)
                joined = services(runner, opened, config, instance.database, observers, head, instance.remote, drain)
            own = stack.enter_context(joined)
            stack.callback(runner.stop)
            yield Server(store=store, runner=runner, own=own, compiles=observers.compiles)
    finally:
        store.close()


def _serve(
    config: SizedConfig,
    file: Path | None,
    instance: Instance,
    opened: Opened,
    listening: socket.socket,
    announcer: Announcer,
) -> None:
    drain = Drain(waits_for=lambda: str(announcer.progress))
    with assembled(config, instance, opened, drain) as server:
        runner, own = server.runner, server.own
        ending = functools.partial(announcer.ending, runner.watch)
        http = make_http(runner, own.app, listening=listening, grace_s=config.grace_s, ending=ending)
        try:
            http.start()  # from now on /ready says what it waits for
            begin(runner, opened, config, own, announcer.progress)
            announcer.ready()
            retuned = contextlib.nullcontext() if file is None else retuned_by_hangup(runner, file)
            with server.compiles, retuned, http.ended_by_signals():
                drain.waits_for = None  # requests are taken from the next line on
                if own.is_keyless():
                    print("there are no keys: anyone on this machine may do everything (see jaxlora keys --help)")
                count = len(server.store.list(None))
                print(f"serving {opened.name} and {count} adapters on {http.url}/v1", flush=True)
                announcer.say(f"now: jaxlora chat --url {http.url}")
                try:
                    http.wait()
                finally:
                    if not runner.end(STOP_S):
                        leave(server.store)
        finally:
            http.stop()


def leave(store: AdapterStore) -> NoReturn:
    """Ends the process as a kill would, but waits for published versions to reach the disk.

    Jobs go on from their newest checkpoints in the next process: their later updates lie on a device that cannot be
    read, and the last may be half done.
    """
    LOG.critical("the device is lost; the server ends with exit code %d, to be started again", LOST_EXIT)
    saving = threading.Thread(target=store.flush, daemon=True)
    saving.start()
    saving.join(FLUSH_S)
    logging.shutdown()
    sys.stdout.flush()
    os._exit(LOST_EXIT)


def begin(runner: DeviceThread, opened: Opened, config: ServeConfig, own: Services, progress: Progress) -> None:
    """Loads the configured adapters, compiles all programs and resumes the jobs of an earlier process."""
    if config.load:
        with progress.stage("loading", of=len(config.load), unit="adapters") as stage:
            load_all(runner, opened, config.load, stage.at)
    runner.tune(config.tuning)
    with progress.stage("compiling", unit=f"serving programs in {opened.base.dtype.name}") as stage:
        runner.start(stage.at)
    if own.jobs is not None:
        own.jobs.start(progress)


def stop(runner: DeviceThread, store: AdapterStore) -> None:
    """Ends the device thread and saves what is not on disk yet, even if the thread failed."""
    try:
        runner.stop()
    finally:
        store.close()
