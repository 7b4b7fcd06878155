"""A small server whose jobs are real: engine, trainer, database, files; of HTTP it has the jobs' routes and serving."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import openai
from base_shapes import sized
from fake_backend import serving
from serve_world import MODEL, World
from small_world import tiny_path

from jaxlora.checkpoints.load import Opened
from jaxlora.config.base import ModelSection
from jaxlora.config.serving import LimitsSection, ServeConfig, TrainingSection
from jaxlora.core.errors import Unauthorized
from jaxlora.core.progress import Progress
from jaxlora.storage.disk_cache import Remote
from serve.access.adapter_quota import AdapterQuota
from serve.access.caller import Caller
from serve.access.rate_limit import Limiter
from serve.api.files.service import FileStore
from serve.api.jobs.routes import JobsRoutes
from serve.db.database import Database
from serve.db.files import StoredFiles
from serve.http.idempotency import Once
from serve.runtime.device_thread import DeviceThread
from serve.server.app import create_app
from serve.server.build_jobs import JobHost, make_job_host
from serve.server.gate import AppConfig
from train.data.load import LengthLimit, load_file

BASE = "owner/tiny"
LANE_TOKENS = 32
ENDED = ("succeeded", "failed", "cancelled")
LORA = {"r": 2, "alpha": 4, "target_modules": ["q_proj", "down_proj"]}


def lines(count: int = 6, *, wrong: bool = False) -> str:
    """A training file of so many short completions."""
    rows = [{"prompt": f"say {i}", "completion": f" word{i}"} for i in range(count)]
    return "\n".join([json.dumps(r) for r in rows] + (['{"prompt": 3}'] if wrong else []))


def by_key(connection) -> Caller:
    """Each key is a tenant's of that name; `root` is the admin's."""
    key = connection.headers.get("authorization", "").removeprefix("Bearer ")
    if not key:
        raise Unauthorized("give a key")
    return Caller(owner=key, admin=key == "root", key_id=key)


class Server:
    """One running server, on a folder that another may take over when it has ended."""

    def __init__(self, world: World, folder: Path, *, remote: Remote | None = None, database: str = "", **training):
        sizes = {"slots": 1, "max_rank": 4, "lanes": 2, "lane_tokens": LANE_TOKENS, "publish_every": 2}
        self.config = sized(
            ServeConfig(
                model=ModelSection(path="tiny"),
                adapters=folder / "adapters",
                data=folder / "data",
                training=TrainingSection(**sizes | training),
                limits=LimitsSection(jobs=4),
                max_rank=world.spec.rank,
            )
        )
        section = self.config.training
        self.database = Database(database or f"sqlite:///{folder}/jaxlora.sqlite")
        self.files = FileStore(
            StoredFiles(self.database),
            folder / "files",
            load=lambda path, too_long: load_file(
                path,
                world.tokenizer,
                limit=LengthLimit(lane_tokens=LANE_TOKENS, too_long=too_long),
                loss=None,
                name="the training file",
            ),
            limits=LimitsSection(),
            remote=remote,
        )
        self.runner = DeviceThread(world.engine(), base_name=BASE)
        opened = Opened(
            name=BASE,
            path=tiny_path(MODEL),
            base=world.base,
            mesh=world.mesh,
            tokenizer=world.tokenizer,
            base_hash=world.base_hash,
            weights_hash="",
        )
        self.quota = AdapterQuota(self.config.limits, self.runner.engine.store)
        self.host: JobHost = make_job_host(
            opened,
            self.config,
            section,
            self.runner,
            self.database,
            self.files,
            self.quota,
            remote,
        )
        self.host.service.draw = lambda curves: {"png": b"a picture", "svg": b"a drawing"}  # a second of a processor

    def stop(self, *, hard: bool = False) -> None:
        """Ends it; hard: without saving what jobs have learned, as far as a process can do that to itself."""
        self.runner.stop()
        if hard:
            self.host.service.recorder.flush()  # or its thread would open the database again
        else:
            self.host.close()
        self.files.close()
        self.database.close()

    @contextlib.contextmanager
    def running(self, *, hard: bool = False) -> Iterator[str]:
        """Its URL.  hard: as `stop` takes it."""
        self.runner.start()
        self.host.start(Progress(None))
        app = create_app(
            self.runner,
            AppConfig(
                default_max_tokens=16,
                caller_of=by_key,
                routers=[JobsRoutes(self.host.service, Once(self.database), Limiter(self.config.limits)).router()],
            ),
        )
        try:
            with serving(app) as url:
                yield url
        finally:
            self.stop(hard=hard)


def client_of(url, key, **options):
    return openai.OpenAI(base_url=url + "/v1", api_key=key, timeout=20, **{"max_retries": 0} | options)


def file_of(server, client, **how) -> str:
    return server[0].files.keep(client.api_key, "train.jsonl", "fine-tune", lines(**how).encode()).id


def create(server, client, **changes):
    settings = {
        "model": BASE,
        "training_file": changes.get("training_file") or file_of(server, client),
        "seed": 7,
        "method": {
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 2, "learning_rate_multiplier": 1.0}},
        },
        "extra_body": {"lora": LORA, "checkpoint_every": 3} | changes.pop("extra", {}),
    }
    return client.fine_tuning.jobs.create(**settings | changes)


def wait_for(client, id, *states, timeout_s=60):
    end = time.monotonic() + timeout_s
    while (job := client.fine_tuning.jobs.retrieve(id)).status not in states:
        assert time.monotonic() < end, job
        assert job.status not in ENDED, job
        time.sleep(0.05)
    return job


def ask(client, model):
    return client.completions.create(model=model, prompt="say 1", max_tokens=3, temperature=0)
