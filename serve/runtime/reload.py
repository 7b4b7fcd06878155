"""Reloads `[tuning]` of the server's TOML file on SIGHUP and applies it to the running server."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import queue
import signal
import threading
from collections.abc import Generator
from pathlib import Path

from jaxlora.config.serving import ServeConfig
from jaxlora.config.toml import load
from jaxlora.core.errors import JaxLoraError
from serve.runtime.device_thread import DeviceThread

LOG = logging.getLogger("serve")


@contextlib.contextmanager
def retuned_by_hangup(runner: DeviceThread, file: Path) -> Generator[None]:
    """Applies the file's tuning at each SIGHUP while it is entered.  Main thread only.

    The file is read on a thread of its own, as a signal interrupts the event loop.  An error is logged, and the server
    goes on as it was.
    """
    asked: queue.SimpleQueue[bool] = queue.SimpleQueue()  # may be put by a handler that interrupts a put

    def work() -> None:
        known = load(file, ServeConfig)
        while asked.get():
            known = retune(runner, file, known)

    reader = threading.Thread(target=work, name="jaxlora-retune", daemon=True)
    reader.start()
    before = signal.signal(signal.SIGHUP, lambda *_: asked.put(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)
        asked.put(False)
        reader.join()


def retune(runner: DeviceThread, file: Path, known: ServeConfig) -> ServeConfig:
    """Applies the file's tuning and returns its settings; on an error logs it and returns the known settings."""
    try:
        config = load(file, ServeConfig)
        runner.call(lambda: runner.tune(config.tuning))
    except JaxLoraError as error:
        LOG.error("not tuned: %s", error.message)
        return known
    names = [f.name for f in dataclasses.fields(ServeConfig) if f.name != "tuning"]
    if other := [n for n in names if getattr(config, n) != getattr(known, n)]:
        LOG.warning("%s: %s changed; start the server again for that", file, ", ".join(other))
    print(f"tuned by {file}", flush=True)
    return config
