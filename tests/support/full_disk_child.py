"""A server's stores on a disk that is full: `unshare -rm python full_disk_child.py FOLDER`.

FOLDER becomes a small file system of its own, seen by this process alone.  What is confirmed before it is full must be
there when it has room again, and what was refused must not; one JSON object on the last line says what happened.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from files_world import GOOD, opened
from store_world import LARGE, make, put

from jaxlora.core.atomic_files import disk_errors
from jaxlora.core.errors import JaxLoraError
from jaxlora.storage.adapter_store import AdapterStore
from serve.access.keys import create_key
from serve.db.database import Database
from serve.db.keys import StoredKeys

SIZE = "4m"


def refused(call: Callable[[], object]) -> str:
    """The code of our error."""
    try:
        call()
    except JaxLoraError as error:
        return error.code
    return "none"


def main(folder: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)], check=True)
    ballast = folder / "ballast"
    said: dict[str, object] = {}

    def upload(files):
        with disk_errors("the upload"):
            moved = files.staging() / "content"
            moved.write_bytes(GOOD)
        return files.add("acme", moved, "a.jsonl")

    with closing(Database(f"sqlite:///{folder}/data.sqlite")) as database:
        store = AdapterStore(folder / "store", host_bytes=LARGE)
        with opened(database, folder / "files") as files:
            kept = upload(files).id
            before = put(store).ref
            store.wait_saved(before)
            late = make(store.mint("acme", "bot"))
            with ballast.open("wb", buffering=0) as file:
                while True:
                    try:
                        file.write(b"x" * 4096)
                    except OSError:
                        break
            said["upload"] = refused(lambda: upload(files))
            said["key"] = refused(lambda: [create_key(StoredKeys(database), "acme") for _ in range(99)])
            store.put(late)
            said["version"] = refused(store.flush)
            said["served meanwhile"] = store.get(late.ref).ref == late.ref
            ballast.unlink()
            store.flush()
            upload(files)
            create_key(StoredKeys(database), "acme")
        store.close()
    with closing(Database(f"sqlite:///{folder}/data.sqlite")) as database:
        store = AdapterStore(folder / "store", host_bytes=LARGE)
        with opened(database, folder / "files") as files:
            page = files.page("acme", after=None, limit=9, purpose=None, oldest_first=True)
            said["files"] = [r.filename for r in page.records]
            said["kept"] = files.get(kept, "acme").filename
            said["parts"] = len(list((folder / "files").glob(".incoming/*")))
        said["versions"] = store.versions("acme", "bot") == [before, late.ref]
        store.close()
    print(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
