"""A trainer: the base and a trainer over it in a process of its own, without an engine, HTTP or a database.

It reads training files and writes the checkpoints of its jobs in the shared folder `data`.  This module knows nothing of what
carries the calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from jaxlora.checkpoints.load import load_found
from jaxlora.config.serving import ServeConfig
from jaxlora.core.lora import ALL_TARGETS
from jaxlora.core.progress import Lines, Progress
from jaxlora.model import compile_cache
from jaxlora.model.lora_pool import PoolSpec, read_finite
from jaxlora.model.machine import memory_errors
from serve.cluster.training.loop import TrainerLoop
from serve.cluster.training.messages import LEASE_S, Carrier, KeeperGone, Terms
from serve.jobs.live_jobs import LiveJobs
from serve.observability.logs import logging_to
from serve.runtime.live_training import small_trainer
from serve.server.build import LOST_EXIT, PRIVATE, SIZE_KEYS, STOP_S, example_readers, planned
from serve.server.build_jobs import Hooks, make_live
from train.jobs.states import Parking
from train.trainer import Trainer

LOG = logging.getLogger("serve")
REACH_S = 0.5  # before a keeper that is not there yet is asked again


class TrainerProcess:
    """The trainer.  Its methods are of one event loop, which is not the thread that makes it."""

    def __init__(self, config: ServeConfig, folder: Path, carrier: Carrier):
        """Waits for the keeper, loads the base and compiles.  folder: that relative paths of the settings begin from.

        Raises ModelInvalid, ConfigInvalid, StorageFull, StorageFailed.
        """
        os.umask(PRIVATE)
        os.chdir(folder)
        compile_cache.enable(None)
        name = carrier.own_name()
        server = name.partition(".")[0]
        with contextlib.ExitStack() as stack:
            stack.enter_context(logging_to(as_json=config.log == "json", level=config.log_level))
            LOG.info("this process trains, as %s", name)
            with ThreadPoolExecutor(1) as elsewhere:  # calls of a carrier wait, which an event loop's thread must not
                terms = elsewhere.submit(_terms, carrier).result()
            training, progress = terms.training, Progress(Lines(LOG.info))
            found, sized = planned(config, LOG.info)
            with memory_errors(f"training over {found.name}", SIZE_KEYS):
                with progress.stage(f"opening {found.name}"):
                    opened = replace(load_found(found, config.model, config.mesh), base_hash=terms.base_hash)
                pool = PoolSpec(slots=training.slots, rank=training.max_rank, dtype="float32", targets=ALL_TARGETS)
                trainer = small_trainer(opened, pool, lanes=training.lanes, lane_tokens=training.lengths)
            readers, load = example_readers(
                opened, config, config.data / f"tokenizer-{server}", lane_tokens=training.longest_tokens
            )
            stack.callback(readers.close)
            jobs_folder = config.data / "jobs"

            parking = Parking(jobs_folder / "parked" / server, host_bytes=int(sized.host_states_gb * 1e9))

            def make(hooks: Hooks) -> LiveJobs:
                return make_live(trainer, training, hooks, jobs_folder / "states", parking, load)

            self._loop = TrainerLoop(name, make, carrier.keeper, _leave, hang_s=max(config.hang_s, LEASE_S))
            with progress.stage("compiling", unit="training programs") as stage:
                trainer.warm_up(stage.at)
                rehearse(trainer)
            self._loop.start()
            self._end = stack.pop_all()

    async def ready(self) -> None:
        """Returns once the trainer takes jobs."""

    async def stop(self) -> None:
        """Ends the trainer: its jobs are saved, and go on elsewhere."""
        await asyncio.to_thread(self._loop.stop, STOP_S)
        await asyncio.to_thread(self._end.close)


def rehearse(trainer: Trainer) -> None:
    """Compiles what a publication runs."""
    for rows in trainer.bucket_rows():
        read_finite(rows)


def _terms(carrier: Carrier) -> Terms:
    """Returns the keeper's terms, waiting for a keeper."""
    while True:
        try:
            return carrier.keeper().terms()
        except KeeperGone as error:
            LOG.info("waiting for the keeper: %s", error.message)
            time.sleep(REACH_S)


def _leave(error: BaseException) -> NoReturn:
    """Ends the process as a kill would: its jobs go on elsewhere from their newest checkpoints."""
    LOG.critical("the trainer has failed (%s); its process ends with exit code %d", type(error).__name__, LOST_EXIT)
    logging.shutdown()
    sys.stdout.flush()
    os._exit(LOST_EXIT)
