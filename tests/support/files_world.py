"""A server of files without a model; run as a script it serves until it is killed: `files_world.py URL ROOT`."""

import contextlib
import sys
import time
from pathlib import Path

from fake_backend import ByteTokenizer, FakeBackend, serving

from jaxlora.config.serving import LimitsSection
from serve.access.caller import Caller
from serve.access.rate_limit import Limiter
from serve.api.files.routes import FilesRoutes
from serve.api.files.service import FileStore
from serve.db.database import Database
from serve.db.files import StoredFiles
from serve.http.idempotency import Once
from serve.server.app import create_app
from serve.server.gate import AppConfig
from train.data.load import LengthLimit, load_file

GOOD = b'{"prompt": "2+2=", "completion": "4"}\n' * 3
LIMITS = LimitsSection(max_file_bytes=1_000_000)


def load(path, too_long="error"):
    """As the readers of a server."""
    return load_file(path, ByteTokenizer(), limit=LengthLimit(lane_tokens=63, too_long=too_long))


def by_header(connection):
    """A tenant for each key; "admin" is one."""
    key = connection.headers["authorization"].removeprefix("Bearer ")
    return Caller(owner=key, admin=key == "admin")


@contextlib.contextmanager
def opened(database, root, *, limits=LIMITS, load=load, remote=None):
    files = FileStore(StoredFiles(database), root, load=load, limits=limits, remote=remote)
    try:
        yield files
    finally:
        files.close()


@contextlib.contextmanager
def files_server(database, root, *, limits=LIMITS, load=load, caller_of=by_header, **how):
    """(its URL, its files)."""
    with opened(database, root, limits=limits, load=load, **how) as files:
        wire = FilesRoutes(files, database, Once(database), Limiter(limits), max_file_bytes=limits.max_file_bytes)
        app = create_app(
            FakeBackend(),
            AppConfig(
                default_max_tokens=64,
                caller_of=caller_of,
                max_body_bytes=2000,
                body_limits=wire.body_limits,
                routers=[wire.router()],
            ),
        )
        with serving(app) as url:
            yield url, files


def on_disk(root):
    """Every file below the folder, by its path in it."""
    return sorted(str(p.relative_to(root)) for p in Path(root).rglob("*") if p.is_file())


if __name__ == "__main__":
    with files_server(Database(sys.argv[1]), Path(sys.argv[2])) as (url, _):
        print(url, flush=True)
        time.sleep(60)
