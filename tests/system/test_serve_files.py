"""The files' wire over real HTTP with OpenAI's client: uploads, checks, quotas, faults of disk and process."""

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import openai
import pytest
from database_world import job_record
from files_world import GOOD, files_server, on_disk, opened

from jaxlora.config.serving import LimitsSection
from serve.api.files import service as file_store
from serve.db.database import Database
from serve.db.files import StoredFiles
from serve.db.jobs import StoredJobs

pytest_plugins = ["database_fixtures"]


@pytest.fixture
def root(tmp_path):
    return tmp_path / "files"


@pytest.fixture
def server(database, root):
    with files_server(database, root) as (url, files):
        yield url, files


def client_of(url, tenant="acme"):
    return openai.OpenAI(base_url=url + "/v1", api_key=tenant, max_retries=0, timeout=20)


@pytest.fixture
def client(server):
    with client_of(server[0]) as it:
        yield it


def upload(client, content=GOOD, name="train.jsonl", **more):
    return client.files.create(file=(name, content), purpose="fine-tune", **more)


def post(url, *, files=None, data=None, tenant="acme", **more):
    headers = {"authorization": f"Bearer {tenant}"} | more.pop("headers", {})
    return httpx2.post(url + "/v1/files", files=files, data=data, headers=headers, timeout=20, **more)


def soon(condition, within_s=5.0):
    ends = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)


class TestWithOpenAIsClient:
    def test_life_of_a_file(self, client):
        file = upload(client, name="Grüße 🌍.jsonl")
        assert (file.bytes, file.filename, file.purpose) == (len(GOOD), "Grüße 🌍.jsonl", "fine-tune")
        assert file.id.startswith("file-")
        assert abs(file.created_at - time.time()) < 5
        done = client.files.wait_for_processing(file.id, poll_interval=0.02)
        assert (done.status, done.status_details, done.expires_at) == ("processed", None, None)
        assert [f.id for f in client.files.list()] == [file.id]
        answer = client.files.content(file.id)
        assert answer.content == GOOD
        assert answer.response.headers["content-type"] == "application/octet-stream"
        gone = client.files.delete(file.id)
        assert (gone.id, gone.object, gone.deleted) == (file.id, "file", True)
        for call in (client.files.retrieve, client.files.content, client.files.delete):
            with pytest.raises(openai.NotFoundError) as caught:
                call(file.id)
            assert (caught.value.code, caught.value.param) == ("not_found", "id")

    def test_a_bad_file_is_told_line_by_line_and_without_our_paths(self, client, root):
        file = upload(client, GOOD + b"nonsense\n" + b'{"prompt": 1, "completion": "x"}\n', name="bad.jsonl")
        done = client.files.wait_for_processing(file.id, poll_interval=0.02)
        assert done.status == "error"
        assert "line 4: not JSON" in done.status_details
        assert "line 5, prompt" in done.status_details
        assert "bad.jsonl" in done.status_details
        assert str(root) not in done.status_details
        assert client.files.content(file.id).content.startswith(GOOD)

    def test_pages(self, client):
        ids = [upload(client).id for _ in range(5)]
        assert [f.id for f in client.files.list(limit=2)] == ids[::-1]
        assert [f.id for f in client.files.list(limit=2, order="asc")] == ids
        assert [f.id for f in client.files.list(purpose="fine-tune-results")] == []
        page = client.files.list(limit=2, after=ids[3])
        assert ([f.id for f in page.data], page.has_more) == ([ids[2], ids[1]], True)

    def test_a_large_file_is_kept_as_it_came(self, client, server):
        content = os.urandom(900_000)
        file = upload(client, content)
        assert client.files.content(file.id).content == content
        _, path = server[1].find(file.id, "acme")
        assert (path.read_bytes(), path.name, path.parent.name) == (content, file.id, "acme")
        assert client.files.wait_for_processing(file.id, poll_interval=0.02).status == "error"

    @pytest.mark.parametrize(
        ("asked", "status", "content"),
        [
            ("bytes=0-3", 206, b"0123"),
            ("bytes=5-", 206, b"56789"),
            ("bytes=-3", 206, b"789"),
            ("bytes=8-99999999999999", 206, b"89"),
            ("BYTES=-99", 206, b"0123456789"),
            ("bytes=0-3, 90-99", 206, b"0123"),  # the other has nothing
            ("bytes=0-1,4-5", 206, None),
            ("bytes=3-1", 200, b"0123456789"),
            ("bytes=", 200, b"0123456789"),
            ("bytes=,", 200, b"0123456789"),
            ("bytes=-", 200, b"0123456789"),
            ("bytes=a-b", 200, b"0123456789"),
            ("bytes=1-2-3", 200, b"0123456789"),
            ("bytes=1-2,x", 200, b"0123456789"),
            ("bytes=" + "9" * 5000 + "-", 200, b"0123456789"),
            ("lines=0-3", 200, b"0123456789"),
            ("nonsense", 200, b"0123456789"),
            ("bytes=10-", 416, None),
            ("bytes=-0", 416, None),
            ("bytes=10-11,90-", 416, None),
        ],
    )
    def test_ranges(self, client, server, asked, status, content):
        file = upload(client, b"0123456789")
        url, headers = f"{server[0]}/v1/files/{file.id}/content", {"authorization": "Bearer acme", "range": asked}
        answer = httpx2.get(url, headers=headers)
        assert answer.status_code == status, answer.text
        if content is not None:
            assert answer.content == content
        if status == 416:
            assert answer.headers["content-range"] == "bytes */10"
            error = answer.json()["error"]
            assert (error["type"], error["code"]) == ("invalid_request_error", "range_not_satisfiable")
        elif content is None:
            assert answer.headers["content-type"].startswith("multipart/byteranges")
            assert b"\r\n\r\n01\r\n" in answer.content
        headers["if-range"] = '"another"'
        assert httpx2.get(url, headers=headers).content == b"0123456789"

    def test_a_path_is_no_name(self, server):
        for sent in ("../../etc/passwd", "C:\\data\\passwd"):
            answer = post(server[0], data={"purpose": "fine-tune"}, files={"file": (sent, GOOD)})
            assert answer.json()["filename"] == "passwd"

    def test_a_file_goes_when_its_time_is_over(self, client, server, root, monkeypatch):
        file = upload(client, expires_after={"anchor": "created_at", "seconds": 3600})
        other = upload(client)
        assert file.expires_at == file.created_at + 3600
        client.files.wait_for_processing(file.id, poll_interval=0.02)
        now = time.time()
        monkeypatch.setattr(file_store.time, "time", lambda: now + 3601)
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(file.id)
        assert [f.id for f in client.files.list()] == [other.id]
        server[1].sweep()
        assert on_disk(root) == [f"acme/{other.id}"]

    def test_a_file_that_a_job_needs_stays(self, client, database):
        file = upload(client)
        StoredJobs(database).insert(replace(job_record(), created_s=time.time()), files=[file.id])
        with pytest.raises(openai.ConflictError) as caught:
            client.files.delete(file.id)
        assert caught.value.response.headers["x-should-retry"] == "false"
        assert client.files.retrieve(file.id).id == file.id

    def test_a_file_of_the_servers_own(self, client, server):
        record = server[1].keep("acme", "results.csv", "fine-tune-results", b"step,train_loss\n")
        assert client.files.retrieve(record.id).status == "processed"
        assert client.files.content(record.id).text == "step,train_loss\n"
        assert [f.id for f in client.files.list(purpose="fine-tune-results")] == [record.id]


FORM = {"data": {"purpose": "fine-tune"}, "files": {"file": ("a.jsonl", GOOD)}}
ANCHOR, SECONDS = "expires_after[anchor]", "expires_after[seconds]"
REFUSED = {
    "no purpose": ({"data": {}}, "purpose"),
    "another purpose": ({"data": {"purpose": "assistants"}}, "purpose"),
    "results are ours": ({"data": {"purpose": "fine-tune-results"}}, "purpose"),
    "unknown field": ({"data": {"purpose": "fine-tune", "color": "red"}}, "color"),
    "no file": ({"files": {"purpose": (None, "fine-tune")}, "data": {}}, "file"),
    "two files": ({"files": [("file", ("a", b"x")), ("file", ("b", b"x"))]}, "file"),
    "name of two lines": ({"files": {"file": ("a\u2028b", GOOD)}}, "file"),
    "long name": ({"files": {"file": ("a" * 256, GOOD)}}, "file"),
    "anchor alone": ({"data": {"purpose": "fine-tune", ANCHOR: "created_at"}}, SECONDS),
    "seconds alone": ({"data": {"purpose": "fine-tune", SECONDS: "3600"}}, ANCHOR),
    "too soon": ({"data": {"purpose": "fine-tune", ANCHOR: "created_at", SECONDS: "3599"}}, SECONDS),
    "too late": ({"data": {"purpose": "fine-tune", ANCHOR: "created_at", SECONDS: "2592001"}}, SECONDS),
    "no number": ({"data": {"purpose": "fine-tune", ANCHOR: "created_at", SECONDS: "1e4"}}, SECONDS),
    "JSON": ({"json": {"purpose": "fine-tune"}, "data": None, "files": None}, None),
}


class TestRefused:
    @pytest.mark.parametrize(("form", "param"), REFUSED.values(), ids=REFUSED)
    def test_form(self, server, root, form, param):
        answer = post(server[0], **{**FORM, **form})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == param
        assert on_disk(root) == []

    @pytest.mark.parametrize(
        "query", ["limit=0", "limit=10001", "order=up", "purpose=x", "before=x", "after=file-none"]
    )
    def test_query(self, server, query):
        answer = httpx2.get(f"{server[0]}/v1/files?{query}", headers={"authorization": "Bearer acme"})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == query.partition("=")[0]

    def test_a_file_over_the_limit(self, server, root):
        for headers, nbytes in (({}, 1_000_001), ({}, 2_000_000), ({"transfer-encoding": "chunked"}, 1_000_001)):
            answer = post(server[0], **{**FORM, "files": {"file": ("a", b"x" * nbytes)}}, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
            assert "at most 1000000 bytes" in answer.json()["error"]["message"]
        assert on_disk(root) == []

    def test_other_paths_keep_their_small_limit(self, server):
        answer = httpx2.post(server[0] + "/tokenize", content=b"x" * 2001, headers={"authorization": "Bearer acme"})
        assert answer.status_code == 413

    def test_over_quota(self, database, root):
        with files_server(database, root, limits=LimitsSection(file_bytes=300)) as (url, _), client_of(url) as client:
            first = upload(client)
            for content in (GOOD * 2, b"x" * 100_000):
                with pytest.raises(openai.RateLimitError) as caught:
                    upload(client, content)
                assert caught.value.code == "insufficient_quota"
                assert caught.value.response.headers["x-should-retry"] == "false"
            with client_of(url, "other") as other:
                upload(other)
            client.files.delete(first.id)
            upload(client, GOOD * 2)
            assert len(on_disk(root)) == 2


class TestFaults:
    @pytest.mark.fault("R9")
    @pytest.mark.parametrize("place", ["write", "move", "database"])
    def test_a_full_disk_leaves_nothing_and_is_over_when_there_is_room(
        self, client, database, root, monkeypatch, place
    ):
        def full(*args, **kwargs):
            raise OSError(errno.ENOSPC, "No space left on device")

        def full_database(session, tenant):
            session.connection().exec_driver_sql("PRAGMA max_page_count = 1")
            session.connection().exec_driver_sql("CREATE TABLE filler AS SELECT randomblob(100000)")

        with monkeypatch.context() as broken:
            if place == "write":
                broken.setattr("serve.http.multipart._FormReader._take_data", full)
            elif place == "move":
                broken.setattr(Path, "rename", full)
            elif database.read(lambda s: s.get_bind().dialect.name) == "sqlite":
                broken.setattr("serve.db.files.used_bytes", full_database)
            else:
                pytest.skip("a full PostgreSQL is a matter of its SQLSTATE alone")
            with pytest.raises(openai.InternalServerError) as caught:
                upload(client)
        assert (caught.value.status_code, caught.value.code) == (507, "storage_full")
        assert caught.value.response.headers["x-should-retry"] == "false"
        assert on_disk(root) == []
        assert list(client.files.list()) == []
        upload(client)

    def test_a_client_that_goes_leaves_nothing(self, server, root):
        half = half_an_upload(server[0])
        soon(lambda: on_disk(root) != [])
        half.close()
        soon(lambda: on_disk(root) == [])

    def test_what_a_killed_server_had_half_is_gone(self, database_url, root):
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(str(Path(__file__).parents[2] / folder) for folder in ("tests/support", ""))
        }
        command = [
            sys.executable,
            str(Path(__file__).parents[1] / "support" / "files_world.py"),
            database_url,
            str(root),
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
            url = child.stdout.readline().strip()
            with client_of(url) as client:
                whole = upload(client).id
            with half_an_upload(url):
                soon(lambda: len(on_disk(root)) == 2)
                child.send_signal(signal.SIGKILL)
                child.wait()
        assert len(on_disk(root)) == 2
        database = Database(database_url)
        with opened(database, root) as files:
            assert [r.id for r in files.page(None, after=None, limit=9, purpose=None, oldest_first=False).records] == [
                whole
            ]
            assert on_disk(root) == [f"acme/{whole}"]
        database.close()

    def test_killed_between_the_bytes_and_their_record_or_before_the_check(self, database, root):
        with opened(database, root) as files:
            (root / "acme").mkdir()
            (root / "x").write_bytes(GOOD)
            stored = StoredFiles(database)
            stored.insert(replace(files.add("acme", root / "x", "a.jsonl"), id="file-unchecked"), most_bytes=None)
            (root / "acme" / "file-unchecked").write_bytes(GOOD)
            (root / "acme" / "file-unknown").write_bytes(GOOD)
        with opened(database, root) as files:
            assert "acme/file-unknown" in on_disk(root), "the database may be the wrong one"
            soon(lambda: files.get("file-unchecked", None).status == "processed")
        with opened(database, root, limits=LimitsSection(keep_days=0)):
            assert "acme/file-unknown" not in on_disk(root)

    def test_a_deletion_that_was_cut_short_is_done_at_the_start(self, database, root):
        with opened(database, root) as files:
            (root / "x").write_bytes(GOOD)
            record = files.add("acme", root / "x", "a.jsonl")
        StoredFiles(database).delete(record.id, None, time.time())
        assert on_disk(root) == [f"acme/{record.id}"]
        with opened(database, root):
            assert on_disk(root) == []
            assert StoredFiles(database).known() == set()

    def test_a_reader_that_breaks_is_told_as_such(self, database, root, caplog):
        def broken(path, too_long):
            raise RuntimeError("a bug")

        with files_server(database, root, load=broken) as (url, _), client_of(url) as client:
            done = client.files.wait_for_processing(upload(client).id, poll_interval=0.02)
        assert (done.status, "a bug" in done.status_details) == ("error", False)
        assert "could not be checked" in caplog.text

    def test_a_tenant_at_its_uploads_waits_and_others_get_in(self, server):
        """The hostile one's bodies never end; the server's places are not its own to fill."""
        with contextlib.ExitStack() as held:
            for _ in range(20):
                held.enter_context(half_an_upload(server[0]))
            soon(lambda: post(server[0], **FORM).status_code == 429)
            answer = post(server[0], **FORM)
            assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limit_exceeded")
            assert answer.headers["retry-after"] == "1"
            assert post(server[0], **FORM, tenant="other").status_code == 200
        soon(lambda: post(server[0], **FORM).status_code == 200)

    def test_all_places_taken_is_the_servers_own_want(self, database, root, monkeypatch):
        monkeypatch.setattr("serve.api.files.routes.MAX_UPLOADS", 0)
        with files_server(database, root) as (url, _):
            answer = post(url, **FORM)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")

    def test_an_upload_that_is_refused_for_want_of_room_counts_as_a_request(self, database, root, monkeypatch):
        monkeypatch.setattr("serve.api.files.routes.MAX_UPLOADS", 0)
        with files_server(database, root, limits=LimitsSection(requests_per_minute=2)) as (url, _):
            assert [post(url, **FORM).status_code for _ in range(3)] == [503, 503, 429]


def half_an_upload(url):
    """A connection that has sent the first half of a file."""
    at = urlsplit(url)
    connection = socket.create_connection((at.hostname, at.port))
    head = (
        f"POST /v1/files HTTP/1.1\r\nHost: {at.netloc}\r\nAuthorization: Bearer acme\r\nContent-Length: 100000\r\n"
        "Content-Type: multipart/form-data; boundary=xx\r\n\r\n"
        '--xx\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        '--xx\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    )
    connection.sendall(head.encode() + GOOD * 100)
    return connection
