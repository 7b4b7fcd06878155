"""Every wire over the fake backend, without a model and without jobs that run; as a script, behind `make_http` in a process.

python edge_world.py DESCRIPTORS HEADER_TIMEOUT_S
"""

from __future__ import annotations

import contextlib
import resource
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from database_world import job_record
from fake_backend import FakeBackend, serving
from fake_tuner import FakeTuner
from files_world import opened

from jaxlora.config.serving import HttpSection, LimitsSection
from jaxlora.core.errors import AdapterInvalid, Unavailable
from serve.access.rate_limit import Limiter
from serve.api.adapters.routes import AdaptersRoutes
from serve.api.files.routes import FilesRoutes
from serve.api.gradient.complete import GradientConfig
from serve.api.gradient.errors import API, gradient_response
from serve.api.gradient.routes import GradientRoutes
from serve.api.jobs.routes import JobsRoutes
from serve.db.database import Database
from serve.db.gradient import StoredGradient
from serve.db.jobs import StoredJobs
from serve.http.idempotency import Once
from serve.runtime.job_names import JobNames
from serve.server.app import create_app, make_http
from serve.server.gate import AppConfig
from serve.server.uvicorn import bound


@dataclass
class StoredOnly:
    """A service of jobs that are in the database and run nowhere."""

    stored: StoredJobs
    names: JobNames = field(default_factory=lambda: JobNames("base"))

    def create(self, caller, asked):
        record = job_record(f"ftjob-{len(self.stored.unfinished())}", caller.owner)
        self.stored.insert(record)
        self.names.add(record.id, record.tenant, record.adapter, "")
        return record

    def size(self, record):
        return None

    def slot_bytes(self, record):
        return 0


class NoAdapters:
    """A service of adapters that finds each of them wrong."""

    limits = SimpleNamespace(total_bytes=10_000)

    def place(self, caller, name):
        return name

    def refuse(self, *args, **kwargs):
        raise AdapterInvalid("there is none")

    add_folder = delete = card = refuse


def jobs_wire(database: Database, limits: LimitsSection) -> JobsRoutes:
    return JobsRoutes(StoredOnly(StoredJobs(database)), Once(database), Limiter(limits))


def gradient_wire(backend: FakeBackend, database: Database) -> GradientRoutes:
    return GradientRoutes(
        backend,
        GradientConfig(default_lr=3e-4, longest=50),
        records=StoredGradient(database),
        once=Once(database),
        tuner=FakeTuner(backend),
    )


@contextlib.contextmanager
def every_wire(folder: Path) -> Iterator[str]:
    """The URL of a server whose caller is everybody."""
    backend, limits = FakeBackend(context=4000), LimitsSection()
    with (
        contextlib.closing(Database(f"sqlite:///{folder}/db.sqlite")) as database,
        opened(database, folder / "files") as files,
    ):
        wires = [
            FilesRoutes(files, database, Once(database), Limiter(limits), max_file_bytes=2**20),
            gradient_wire(backend, database),
            jobs_wire(database, limits),
            AdaptersRoutes(NoAdapters(), Limiter(limits)),
        ]
        config = AppConfig(
            default_max_tokens=16,
            routers=[wire.router() for wire in wires],
            error_shapes={API: gradient_response},
            max_body_bytes=2**18,
        )
        with serving(create_app(backend, config)) as url:
            yield url


class Device(FakeBackend):
    """The fake backend as a server's process needs it."""

    lost = False

    def end_all(self) -> None:
        pass

    def end_error(self) -> Unavailable:
        return Unavailable("the server stopped")


def main(descriptors: int, header_timeout_s: float) -> None:
    """Serves on this machine until it is killed, with so many descriptors; answers never end."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
    config = AppConfig(default_max_tokens=10_000, http=HttpSection(header_timeout_s=header_timeout_s))
    http = make_http(
        Device(pace_s=0.2, reply=lambda request: "x" * 100, context=20_000),
        config,
        listening=bound("127.0.0.1", 0),
        grace_s=0,
    )
    http.start()
    print(http.url, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
