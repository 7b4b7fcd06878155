"""From settings to a running server: base, store, engine, device thread, HTTP.  Everything is joined here."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import uvicorn

from jaxlora import compile_cache
from jaxlora.errors import ConfigInvalid
from jaxlora.lora import ALL_TARGETS, HEAD_TARGET, Adapter, AdapterRef
from jaxlora.opened import Opened, open_base
from jaxlora.peft import import_peft
from jaxlora.pool import PoolSpec
from jaxlora.serve_config import AdapterSection, ServeConfig
from jaxlora.store import AdapterStore
from serve.app import create_app, hosts_for
from serve.engine import Engine, EngineConfig
from serve.house import LOCAL_TENANT
from serve.retune import retuned_by_hangup
from serve.runner import Runner

LOG = logging.getLogger("serve")
BACKLOG = 2048  # connections that may wait to be accepted


def open_store(config: ServeConfig) -> AdapterStore:
    """The server's adapters.  Raises StorageFailed, StateInvalid as AdapterStore does."""
    return AdapterStore(config.adapters, host_bytes=int(config.host_adapters_gb * 1e9))


def make_runner(opened: Opened, config: ServeConfig, store: AdapterStore) -> Runner:
    """A runner over this base that is not started yet.  Serves LoRA on all seven projections and on the head."""
    pool_spec = PoolSpec(slots=config.slots, rank=config.max_rank, dtype=opened.base.dtype.name, targets=ALL_TARGETS)
    engine_config = EngineConfig(
        rows=config.rows,
        prefill_lanes=config.prefill_lanes,
        prefill_tokens=config.prefill_tokens,
        pages=config.kv_pages,
        page_tokens=config.page_tokens,
        max_tokens=min(opened.base.config.context, config.kv_pages * config.page_tokens),
        max_waiting=config.max_waiting,
        max_waiting_tokens=config.max_waiting_tokens,
        host_bytes=int(config.host_kv_gb * 1e9),
        quantum_s=config.tuning.quantum_ms / 1000,
    )
    engine = Engine(opened.base, opened.mesh, engine_config, pool_spec, store, opened.tokenizer, opened.base_hash)
    return Runner(engine, base_name=opened.name)


def load_peft(runner: Runner, opened: Opened, section: AdapterSection) -> AdapterRef:
    """The adapter of a PEFT folder in the store; a new version only when it differs from the newest one.

    Logs what its owner should know.  Raises AdapterInvalid when the folder cannot be held exactly, InvalidRequest for
    the base's name.
    """
    runner.check_name(LOCAL_TENANT, section.name)
    engine = runner.engine
    newest = engine.store.latest(LOCAL_TENANT, section.name)
    arrays = opened.base.arrays
    head = np.asarray(arrays["embed"]) if opened.base.config.tied else np.asarray(arrays["head"]).T
    adapter, report = import_peft(
        section.path,
        opened.base.config,
        ref=newest or AdapterRef(LOCAL_TENANT, section.name, 1),
        base_hash=opened.base_hash,
        max_rank=engine.pool_spec.rank,
        head_supported=HEAD_TARGET in engine.pool_spec.targets,
        base_head_VD=head,
    )
    for note in report.notes:
        LOG.warning("adapter %s: %s", section.name, note)
    if report.ignored:
        LOG.warning("adapter %s: these settings have no effect here: %s", section.name, ", ".join(report.ignored))
    if newest is not None and _same(engine.store.get(newest), adapter):
        return newest
    ref = engine.store.mint(LOCAL_TENANT, section.name)
    engine.store.put(Adapter(ref=ref, spec=adapter.spec, base_hash=adapter.base_hash, weights=adapter.weights))
    return ref


def _same(one: Adapter, other: Adapter) -> bool:
    """Equal but for the version."""
    return (
        one.spec == other.spec
        and one.base_hash == other.base_hash
        and one.weights.keys() == other.weights.keys()
        and all(
            np.array_equal(x, y) for t in one.weights for x, y in zip(one.weights[t], other.weights[t], strict=True)
        )
    )


@dataclass(slots=True)
class HttpServer:
    """An HTTP server on a bound socket, run by a thread of its own or by the caller."""

    server: uvicorn.Server
    listening: socket.socket
    thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Where it answers."""
        host, port = self.listening.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def listen(self) -> None:
        """From now on a client waits for its answer; before, it is refused."""
        self.listening.listen(BACKLOG)

    def run(self) -> None:
        """Answers until interrupted."""
        self.server.run(sockets=[self.listening])

    def start(self) -> None:
        """Answers in the background, from now on."""
        self.listen()
        self.thread = threading.Thread(target=self.run, name="jaxlora-http", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Ends the background server; open streams get a moment to finish."""
        self.server.should_exit = True
        if self.thread is not None:
            self.thread.join()


def make_http(runner: Runner, *, host: str, port: int, default_max_tokens: int) -> HttpServer:
    """The runner behind HTTP, on a socket that is bound already.  An IPv6 host may stand in brackets.

    Raises ConfigInvalid when the address is taken or not ours.
    """
    host = host.removeprefix("[").removesuffix("]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise ConfigInvalid(f"cannot listen on {host} port {port} ({error.strerror}); choose another --port") from error
    app = create_app(runner, default_max_tokens=default_max_tokens, hosts=hosts_for(host))
    settings = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)
    return HttpServer(uvicorn.Server(settings), listening)


def main(config: ServeConfig, file: Path | None) -> None:
    """`jaxlora serve`: answers until interrupted.  file: where the settings came from; SIGHUP has its tuning read again."""
    compile_cache.enable(None)
    opened = open_base(config.model, config.mesh)
    store = open_store(config)
    runner = make_runner(opened, config, store)
    http = make_http(runner, host=config.host, port=config.port, default_max_tokens=config.default_max_tokens)
    for section in config.load:
        ref = load_peft(runner, opened, section)
        print(f"loaded {section.name} as version {ref.version}")
    runner.tune(config.tuning)
    print(f"compiling {len(runner.engine.shapes())} programs for {opened.name} ({opened.base.dtype.name})", flush=True)
    runner.start()
    http.listen()  # who reads the next line may ask at once
    print(f"serving {opened.name} and {len(store.list(None))} adapters on {http.url}/v1", flush=True)
    try:
        with contextlib.nullcontext() if file is None else retuned_by_hangup(runner, file):
            http.run()
    finally:
        stop(runner, store)


def stop(runner: Runner, store: AdapterStore) -> None:
    """Ends the device thread and saves what is not on disk yet, whatever the thread ended with."""
    try:
        runner.stop()
    finally:
        store.close()
