"""One tenant's files that cost too much, beside another's small one: what is read, by whom, and what is left of the server."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import replace

import httpx2
import pytest
from fake_backend import serving
from small_world import tiny_path
from whole_world import bearer, joined, whole_config

from jaxlora.checkpoints.tokenizer import Tokenizer
from jaxlora.config.serving import LimitsSection
from jaxlora.core.errors import Unavailable
from jaxlora.storage.adapter_store import AdapterStore
from serve.access.keys import create_key
from serve.api.files.service import FileStore
from serve.db.database import Database
from serve.db.files import StoredFiles
from serve.db.keys import StoredKeys
from train.data.file_readers import FileReaders, ReaderLimits

pytest_plugins = ["serve_fixtures"]

LINE = b'{"text": "abc"}\n'
MEMORY_BYTES = 12 * 2**20
BOMB = LINE * 60_000  # its examples take twice as much


@pytest.mark.slow
def test_a_flood_of_files_leaves_another_tenants_file_its_turn_and_a_bomb_ends_only_itself(world, tmp_path):
    settings = replace(whole_config(tmp_path), limits=LimitsSection(read_memory_bytes=MEMORY_BYTES))
    with closing(Database(settings.database_url)) as database:
        keys = {who: create_key(StoredKeys(database), who)[1] for who in ("hostile", "quiet")}
    store = AdapterStore(settings.adapters, host_bytes=10**8)
    with closing(store), joined(world, settings, store) as server, serving(server.app) as url:

        def upload(who, content):
            form = {"data": {"purpose": "fine-tune"}, "files": {"file": ("a.jsonl", content)}}
            answer = httpx2.post(f"{url}/v1/files", headers=bearer(keys[who]), timeout=20, **form)
            return who, answer.json()["id"]

        def status(who, id):
            return httpx2.get(f"{url}/v1/files/{id}", headers=bearer(keys[who]), timeout=20).json()

        def wait(file):
            while (found := status(*file))["status"] == "uploaded":
                time.sleep(0.02)
            return found

        flood = [upload("hostile", LINE * 10_000) for _ in range(3)] + [upload("hostile", BOMB)]
        assert wait(upload("quiet", LINE))["status"] == "processed"
        assert [status(*file)["status"] for file in flood[1:]] == [
            "uploaded"
        ] * 3  # one at a time, and its turn came before
        assert [wait(file)["status"] for file in flood] == ["processed"] * 3 + ["error"]
        assert "took more than 12 MiB of memory; divide it" in status(*flood[-1])["status_details"]
        assert wait(upload("hostile", LINE))["status"] == "processed"


@pytest.mark.fault("R1")
def test_a_start_that_finds_a_bomb_unchecked_survives_it(tmp_path):
    """As it would each time, when the server itself had read it and been killed."""

    def away(path, too_long):
        raise Unavailable("the server is stopping")

    def checked(load):
        with closing(FileStore(StoredFiles(database), tmp_path / "files", load=load, limits=LimitsSection())) as files:
            if load is away:
                (files.staging() / "x").write_bytes(BOMB)
                files.add("hostile", next((tmp_path / "files/.incoming").glob("*/x")), "bomb.jsonl")
                return "uploaded"
            while (
                record := files.page(None, after=None, limit=1, purpose=None, oldest_first=True).records[0]
            ).status == "uploaded":
                time.sleep(0.02)
            return record.status

    limits = ReaderLimits(memory_bytes=MEMORY_BYTES, cpu_s=60)
    tokenizer = Tokenizer.from_hf(tiny_path("tiny-llama-tied"))
    readers = FileReaders(tokenizer, tmp_path / "tokenizer", lane_tokens=31, limits=limits)
    with closing(Database(f"sqlite:///{tmp_path}/db.sqlite")) as database, closing(readers):
        assert checked(away) == "uploaded"
        assert checked(lambda path, too_long: readers.load(path, path.parent.name, too_long)) == "error"
