"""What stands beside the runner in a server: database, keys, limits, files, adapters, jobs, and their wires."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fastapi import APIRouter
from starlette.requests import HTTPConnection

from jaxlora.checkpoints.load import Opened
from jaxlora.config.serving import ServeConfig
from jaxlora.config.training import default_lr
from jaxlora.storage.disk_cache import Remote
from serve.adapter_quota import AdapterQuota
from serve.adapters import AdapterService
from serve.adapters_api import AdaptersWire
from serve.auth import Caller
from serve.database import Database
from serve.door import Door
from serve.error_shapes import Shape
from serve.file_store import FileStore
from serve.files_api import FilesWire
from serve.gradient_api import GradientWire
from serve.gradient_errors import API, gradient_response
from serve.gradient_house import DEFAULT_RANK, GradientConfig
from serve.idempotency import Once
from serve.job_host import JobHost, make_job_host
from serve.jobs_api import JobsWire
from serve.keys import Keys
from serve.limits import Limiter
from serve.runner import Runner
from serve.stored_answers import StoredAnswers
from serve.stored_files import StoredFiles
from serve.stored_gradient import StoredGradient
from serve.stored_keys import StoredKeys
from train.data.example_cache import KeptExamples
from train.data.examples import Unit
from train.data.jsonl import load_jsonl

KEPT_EXAMPLES_BYTES = 32 * 2**20  # of training files, read again soon after they came
LANE_TOKENS = 2048  # of a server that does not train: the longest example that a file may hold


def nothing_more(tenant: str, name: str) -> None:
    """Nobody else keeps anything of an adapter that is deleted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Services:
    """What the app needs of them, and the jobs to be started when the runner has."""

    caller_of: Callable[[HTTPConnection], Caller]
    limiter: Limiter
    routers: Sequence[APIRouter]
    body_limits: Mapping[str, int]
    error_shapes: Mapping[str, Shape]
    door: Door
    jobs: JobHost | None  # None: this server takes none
    keyless: bool  # whoever reaches the server may do everything


@contextlib.contextmanager
def services(
    runner: Runner,
    opened: Opened,
    config: ServeConfig,
    read_head: Callable[[], np.ndarray],
    remote: Remote | None = None,
) -> Generator[Services]:
    """All of them, over a runner that has not started; leave when it has ended.  read_head: see AdapterService.

    remote: object storage for files and checkpoints.

    Raises ConfigInvalid for settings that do not go together, Unavailable, StorageFull, StorageFailed.
    """
    with contextlib.ExitStack() as stack:
        database = Database(config.database_url)
        stack.callback(database.close)
        keys = Keys(StoredKeys(database))
        keys.check_bind(config.host)
        training, store, door = config.training, runner.engine.store, Door()
        longest = LANE_TOKENS if training is None else training.lane_tokens

        def read(path: Path) -> Sequence[Unit]:
            return load_jsonl(path, opened.tokenizer, max_tokens=longest + 1, loss=None, name="the file")

        load = KeptExamples(read, max_bytes=KEPT_EXAMPLES_BYTES)
        files = FileStore(StoredFiles(database), config.data / "files", load=load, limits=config.limits, remote=remote)
        stack.callback(files.close)
        limiter = Limiter(config.limits)
        most_rank = config.max_rank if training is None or training.max_rank is None else training.max_rank
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
            deleted=nothing_more if jobs is None else jobs.tuner.forget,
        )
        once = Once(database)
        files_wire = FilesWire(files, database, once, limiter, max_file_bytes=config.limits.max_file_bytes)
        adapters_wire = AdaptersWire(adapters, limiter)
        routers = [files_wire.router(), adapters_wire.router()]
        if jobs is not None:
            routers.append(JobsWire(jobs.service, once, limiter).router())
        gradient = GradientWire(
            runner,
            GradientConfig(
                default_lr=default_lr(opened.base.config), longest=longest + 1, rank=min(DEFAULT_RANK, most_rank)
            ),
            records=StoredGradient(database),
            answers=StoredAnswers(database),
            tuner=None if jobs is None else jobs.tuner,
            limiter=limiter,
        )
        routers.append(gradient.router())
        keys.start(door.shut_out)
        stack.callback(keys.close)
        yield Services(
            caller_of=keys.caller_of,
            limiter=limiter,
            routers=routers,
            body_limits=files_wire.body_limits | adapters_wire.body_limits,
            error_shapes={API: gradient_response},
            door=door,
            jobs=jobs,
            keyless=keys.keyless,
        )
