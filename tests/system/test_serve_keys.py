"""API keys: made, known by heart, revoked within a second, also for streams that are open; and `jaxlora keys`."""

import json
import logging
import threading
import time
from contextlib import closing
from dataclasses import replace

import httpx2
import openai
import pytest
from database_world import key_record
from fake_backend import BASE, HI, FakeBackend, serving
from sqlalchemy import delete
from typer.testing import CliRunner

from jaxlora.config.base import ModelSection
from jaxlora.config.serving import ServeConfig
from jaxlora.core.errors import ConfigInvalid, InvalidRequest, Unavailable
from serve.access.caller import LOCAL
from serve.access.keys import HALF, PREFIX, Keys, create_key, digest, needs_keys
from serve.cli import main as cli
from serve.db.database import Database
from serve.db.keys import StoredKeys
from serve.db.models import KeyRecord
from serve.http.drain import Drain
from serve.server.app import create_app
from serve.server.gate import AppConfig

WITHIN_S = 1.0  # a change holds


@pytest.fixture
def database(tmp_path):
    with closing(Database(f"sqlite:///{tmp_path}/data/jaxlora.sqlite")) as it:
        yield it


@pytest.fixture
def stored(database):
    return StoredKeys(database)


def bearer(key):
    return {"authorization": f"Bearer {key}"}


class Server:
    """A fake backend behind keys that are followed."""

    def __init__(self, stored):
        self.backend, self.drain = FakeBackend(hang_after=3), Drain()
        self.keys = Keys(stored)
        self.app = create_app(
            self.backend,
            AppConfig(
                default_max_tokens=64,
                caller_of=self.keys.caller_of,
                drain=self.drain,
                ping_s=60,
            ),
        )


@pytest.fixture
def server(stored):
    it = Server(stored)
    it.keys.start(it.drain.shut_out)
    with serving(it.app) as url:
        it.url = url
        yield it
    it.keys.close()


def status(server, headers, path="/v1/models"):
    return httpx2.get(server.url + path, headers=headers, timeout=5).status_code


def soon(condition):
    """Whether it holds within a second."""
    ends = time.monotonic() + WITHIN_S
    while time.monotonic() < ends:
        if condition():
            return True
        time.sleep(0.02)
    return False


class Reader(threading.Thread):
    """Reads an open stream to its end."""

    def __init__(self, server, key=None):
        super().__init__(daemon=True)
        self.client = openai.OpenAI(base_url=server.url + "/v1", api_key=key or "none", max_retries=0, timeout=20)
        self.begun, self.texts, self.error = threading.Event(), [], None
        self.start()
        assert self.begun.wait(10)

    def run(self):
        try:
            for chunk in self.client.chat.completions.create(model=BASE, messages=HI, stream=True):
                self.texts.append(chunk.choices[0].delta.content)
                if len(self.texts) == 3:  # the opening and two characters
                    self.begun.set()
        except openai.OpenAIError as error:
            self.error = error
        finally:
            self.client.close()


class TestCreate:
    @pytest.mark.fault("T9")
    def test_the_key_is_told_once_and_only_its_digest_is_kept(self, stored):
        record, key = create_key(stored, "acme", role="admin", label="a laptop")
        assert key.startswith(PREFIX)
        assert len(key) == len(PREFIX) + 43  # 256 bits
        assert stored.all() == [record]
        assert (record.tenant, record.role, record.label, record.digest) == ("acme", "admin", "a laptop", digest(key))
        assert key not in repr(record)
        assert create_key(stored, "acme")[1] != key

    @pytest.mark.parametrize(
        "wrong", [{"tenant": "../x"}, {"tenant": ""}, {"label": "a\nb"}, {"label": "a" * 101}], ids=str
    )
    def test_what_cannot_be_kept_is_refused(self, stored, wrong):
        with pytest.raises(InvalidRequest):
            create_key(stored, **{"tenant": "acme"} | wrong)
        assert stored.all() == []


class TestWithoutKeys:
    def test_anyone_may_come_in_unless_keys_are_needed(self, stored):
        assert Keys(stored).keyless
        with pytest.raises(ConfigInvalid, match="jaxlora keys create"):
            Keys(stored, needed=True)
        create_key(stored, "acme")
        assert not Keys(stored, needed=True).keyless

    @pytest.mark.parametrize(
        ("host", "keys", "needed"),
        [
            *((host, "auto", False) for host in ("127.0.0.1", "localhost", "[::1]")),
            *((host, "auto", True) for host in ("0.0.0.0", "192.168.1.2", "::", "example.org")),
            ("127.0.0.1", "required", True),
        ],
    )
    def test_where_others_reach_the_server_or_the_settings_say_so_keys_are_needed(self, host, keys, needed):
        config = ServeConfig(model=ModelSection(path="tiny"), host=host, keys=keys)
        assert needs_keys(config) is needed

    def test_the_first_key_shuts_out_who_has_none(self, server, stored):
        assert status(server, {}) == 200
        reader = Reader(server)
        _, key = create_key(stored, "acme")
        assert soon(lambda: status(server, {}) == 401)
        assert status(server, bearer(key)) == 200
        reader.join(WITHIN_S)
        assert reader.error is not None

    def test_a_key_table_that_is_emptied_lets_nobody_in(self, server, stored, database, caplog):
        """As by another process, or when another file is put in the database's place."""
        _, key = create_key(stored, "acme")
        assert soon(lambda: status(server, {}) == 401)
        reader = Reader(server, key)
        with caplog.at_level(logging.ERROR, "serve"):
            database.write(lambda session: session.execute(delete(KeyRecord)))
            assert soon(lambda: status(server, bearer(key)) == 401)
        assert status(server, {}) == 401
        assert not server.keys.keyless
        assert "has no API keys any more" in caplog.text
        reader.join(WITHIN_S)
        assert reader.error is not None
        _, new = create_key(stored, "acme")
        assert soon(lambda: status(server, bearer(new)) == 200)

    def test_revoking_the_last_key_lets_nobody_in(self, stored):
        record, _ = create_key(stored, "acme")
        stored.revoke(record.id, 2.0)
        with serving(Server(stored).app) as url:
            assert httpx2.get(url + "/v1/models").status_code == 401
            assert httpx2.get(url + "/health").status_code == 200


class TestWithKeys:
    def test_says_who_asks(self, stored):
        mine, key = create_key(stored, "acme")
        _, boss = create_key(stored, "ops", role="admin")
        keys = Keys(stored)

        def caller(key):
            connection = httpx2.Request("GET", "http://x", headers=bearer(key))
            return keys.caller_of(connection)

        assert (caller(key).owner, caller(key).sees, caller(key).key_id) == ("acme", "acme", mine.id)
        assert (caller(boss).owner, caller(boss).sees) == ("ops", None)
        assert caller(key) != LOCAL

    @pytest.mark.fault("T9")
    def test_every_other_key_is_told_the_same(self, server, stored):
        _, key = create_key(stored, "acme")
        gone, revoked = create_key(stored, "acme")
        stored.revoke(gone.id, 2.0)
        assert soon(lambda: status(server, {}) == 401)
        wrong = [
            {},
            bearer(revoked),
            bearer(key[:-1]),
            {"authorization": "Bearer"},
            {"authorization": key},
            {"authorization": f"Basic {key}"},
            {"authorization": "Bearer ü".encode()},
            {"x-api-key": key},
        ]
        answers = [httpx2.get(server.url + "/v1/models", headers=h) for h in wrong]
        answers += [httpx2.get(f"{server.url}/v1/models?{name}={key}") for name in ("key", "api_key", "access_token")]
        assert {a.status_code for a in answers} == {401}
        assert len({a.content for a in answers}) == 1
        assert answers[0].json()["error"]["code"] == "invalid_api_key"
        assert answers[0].headers["www-authenticate"] == "Bearer"
        assert status(server, {"authorization": f"bearer {key}"}) == 200

    def test_the_whole_digest_counts(self, stored):
        _, key = create_key(stored, "acme")
        other = replace(key_record("key-2"), digest=digest("jl-other")[:HALF] + digest(key)[HALF:])
        stored.insert(other)
        keys = Keys(stored)
        with pytest.raises(Exception, match="valid API key"):
            keys.caller_of(httpx2.Request("GET", "http://x", headers=bearer("jl-other")))

    @pytest.mark.fault("T9")
    def test_revoked_by_another_process_ends_open_streams_and_no_others(self, server, stored, database, tmp_path):
        first, key = create_key(stored, "acme")
        _, other = create_key(stored, "acme")
        assert soon(lambda: status(server, {}) == 401)
        reader, untouched = Reader(server, key), Reader(server, other)
        with closing(Database(f"sqlite:///{tmp_path}/data/jaxlora.sqlite")) as elsewhere:
            StoredKeys(elsewhere).revoke(first.id, time.time())
        reader.join(WITHIN_S)
        assert isinstance(reader.error, openai.APIError)
        assert reader.error.code == "invalid_api_key"
        assert status(server, bearer(key)) == 401
        assert soon(server.backend.streams[0].cancelled.is_set)
        assert untouched.is_alive()
        assert not server.backend.streams[1].cancelled.is_set()
        server.drain.shut_out(next(iter(server.keys._known.ids)))
        untouched.join(WITHIN_S)
        assert not untouched.is_alive()

    def test_revoked_before_the_answer_began_is_a_plain_401(self, server, stored):
        first, key = create_key(stored, "acme")
        assert soon(lambda: status(server, {}) == 401)
        answers = []

        def ask():
            body = {"model": BASE, "messages": HI}
            answers.append(httpx2.post(server.url + "/v1/chat/completions", json=body, headers=bearer(key), timeout=20))

        thread = threading.Thread(target=ask)
        thread.start()
        assert soon(lambda: server.backend.streams)
        stored.revoke(first.id, time.time())
        thread.join(WITHIN_S)
        assert answers[0].status_code == 401
        assert server.backend.streams[0].cancelled.is_set()

    @pytest.mark.fault("C6")
    def test_a_database_that_is_away_shuts_nobody_out(self, server, stored, monkeypatch, caplog):
        _, key = create_key(stored, "acme")
        assert soon(lambda: status(server, {}) == 401)

        def away():
            raise Unavailable("the server's database does not answer; try again later")

        with caplog.at_level(logging.WARNING, "serve"):
            monkeypatch.setattr(stored, "counts", away)
            time.sleep(1.0)
        assert status(server, bearer(key)) == 200
        assert [r.message for r in caplog.records if "API keys stay" in r.message] != []
        monkeypatch.undo()
        _, new = create_key(stored, "acme")
        assert soon(lambda: status(server, bearer(new)) == 200)


class TestCommands:
    @pytest.fixture
    def run(self, tmp_path):
        def run(*arguments, data=True):
            where = ["--data", str(tmp_path / "data")] if data else []
            return CliRunner(env={"NO_COLOR": "1", "COLUMNS": "200"}).invoke(cli.app, ["keys", *arguments, *where])

        return run

    def test_create_list_revoke(self, run, tmp_path):
        made = run("create", "acme", "--label", "a laptop")
        key = made.stdout.strip()
        assert (made.exit_code, key[:3]) == (0, PREFIX)
        assert "not shown again" in made.stderr
        with closing(Database(f"sqlite:///{tmp_path}/data/jaxlora.sqlite")) as database:
            record = StoredKeys(database).all()[0]
        assert (record.digest, record.tenant, record.role) == (digest(key), "acme", "tenant")
        run("create", "ops", "--role", "admin")
        listed = [json.loads(line) for line in run("list", "--json").stdout.splitlines()]
        assert [(r["tenant"], r["role"], r["revoked_s"]) for r in listed] == [
            ("acme", "tenant", None),
            ("ops", "admin", None),
        ]
        assert "digest" not in listed[0]
        assert record.id in run("revoke", record.id).stderr
        assert "revoked" in run("list").stdout.splitlines()[0]

    @pytest.mark.parametrize("command", [["list"], ["revoke", "key-1"]], ids=lambda c: c[0])
    def test_a_folder_without_a_database_is_told(self, run, tmp_path, command):
        answer = run(*command)
        assert (answer.exit_code, "there is no database" in answer.stderr) == (2, True)
        assert not (tmp_path / "data").exists()

    @pytest.mark.parametrize(
        "wrong", [["create", "a/b"], ["create", "acme", "--role", "root"], ["list", "--config", "x.toml"]], ids=" ".join
    )
    def test_errors_are_one_line(self, run, wrong):
        answer = run(*wrong)
        assert answer.exit_code == 2
        assert len(answer.stderr.strip().splitlines()) == 1

    def test_each_help_shows_an_example(self, run):
        for command in ("create", "list", "revoke"):
            assert f"Example:  jaxlora keys {command}" in run(command, "--help", data=False).output
