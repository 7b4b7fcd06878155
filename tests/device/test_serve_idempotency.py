"""A request with an Idempotency-Key is done once: repeated, at the same time, after a failure, after a restart."""

import threading
from concurrent.futures import ThreadPoolExecutor

import httpx2
import openai
import pytest
from files_world import GOOD, files_server, on_disk

from jaxlora.core.errors import StorageAway, StorageFull, Unavailable
from serve.db import idempotency
from serve.db.idempotency import StoredAnswers
from serve.http import idempotency as once

pytest_plugins = ["database_fixtures"]


@pytest.fixture
def root(tmp_path):
    return tmp_path / "files"


@pytest.fixture
def server(database, root):
    with files_server(database, root) as it:
        yield it


def post(url, key, *, content=GOOD, tenant="acme", name="a.jsonl"):
    headers = {"authorization": f"Bearer {tenant}"} | ({} if key is None else {"Idempotency-Key": key})
    form = {"data": {"purpose": "fine-tune"}, "files": {"file": (name, content)}}
    return httpx2.post(url + "/v1/files", headers=headers, timeout=20, **form)


def test_repeated_it_is_answered_as_the_first_time(server, root):
    first, again = post(server[0], "k"), post(server[0], "k")
    assert (first.status_code, again.json()) == (200, first.json())
    assert len(on_disk(root)) == 1
    for other in ({"key": None}, {"key": "l"}, {"key": "k", "tenant": "other"}):
        assert post(server[0], **other).json()["id"] != first.json()["id"]
    assert len(on_disk(root)) == 4


@pytest.mark.fault("C5")
@pytest.mark.parametrize("changed", [{"content": GOOD + b"\n"}, {"name": "b.jsonl"}], ids=["content", "name"])
def test_another_request_with_the_same_key_is_refused_for_good(server, root, changed):
    post(server[0], "k")
    answer = post(server[0], "k", **changed)
    assert (answer.status_code, answer.headers["x-should-retry"]) == (409, "false")
    assert len(on_disk(root)) == 1


@pytest.mark.fault("C5")
def test_at_the_same_time_it_is_done_once_and_the_others_come_again(server, root, monkeypatch):
    begun, go = threading.Event(), threading.Event()
    add = server[1].add

    def slow(*args, **kwargs):
        begun.set()
        assert go.wait(10)
        return add(*args, **kwargs)

    monkeypatch.setattr(server[1], "add", slow)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(post, server[0], "k")
        assert begun.wait(10)
        early = post(server[0], "k")
        assert (early.status_code, early.headers["retry-after"]) == (503, "1")
        client = openai.OpenAI(base_url=server[0] + "/v1", api_key="acme", max_retries=2)
        later = pool.submit(
            lambda: client.files.create(
                file=("a.jsonl", GOOD), purpose="fine-tune", extra_headers={"Idempotency-Key": "k"}
            )
        )
        go.set()
        assert later.result(10).id == first.result(10).json()["id"]
        client.close()
    assert len(on_disk(root)) == 1


def test_after_a_failure_it_is_new(server, root, monkeypatch):
    def full(*args, **kwargs):
        raise StorageFull("no room")

    with monkeypatch.context() as broken:
        broken.setattr(server[1], "add", full)
        assert post(server[0], "k").status_code == 507
    assert post(server[0], "k", content=GOOD * 2).status_code == 200


def test_it_holds_over_a_restart(database, root):
    with files_server(database, root) as (url, _):
        first = post(url, "k").json()
    with files_server(database, root) as (url, _):
        assert post(url, "k").json() == first


def test_a_key_must_be_plain_text(server):
    answer = post(server[0], "x" * 256)
    assert (answer.status_code, "Idempotency-Key" in answer.json()["error"]["message"]) == (400, True)


def test_a_claim_that_timed_out_is_dead_soon_and_the_key_works_again(server, root, monkeypatch):
    """Its client was told 503 while the claim was made all the same: nobody is at work on it."""
    monkeypatch.setattr(idempotency, "CLAIM_S", 0.3)
    claim = StoredAnswers.claim

    def slow(self, *args):
        claim(self, *args)
        raise StorageAway("the server's database does not answer; try again later")

    with monkeypatch.context() as broken:
        broken.setattr(StoredAnswers, "claim", slow)
        assert post(server[0], "k").status_code == 503
    assert on_disk(root) == []
    answers = []
    while not answers or answers[-1].status_code == 503:
        answers.append(post(server[0], "k"))
        assert len(answers) < 1000
    assert (answers[0].status_code, answers[-1].status_code) == (503, 200)
    assert len(on_disk(root)) == 1


def test_a_long_answer_keeps_its_claim(server, root, monkeypatch):
    for module in (idempotency, once):
        monkeypatch.setattr(module, "CLAIM_S", 0.3)
    begun, go, renewed = threading.Event(), threading.Event(), threading.Semaphore(0)
    add, renew, claim, digests = server[1].add, StoredAnswers.renew, StoredAnswers.claim, []

    def slow(*args, **kwargs):
        begun.set()
        assert go.wait(10)
        return add(*args, **kwargs)

    def counted(self, *args):
        renew(self, *args)
        renewed.release()

    def noted(self, tenant, route, key, digest, owner):
        digests.append(digest)
        return claim(self, tenant, route, key, digest, owner)

    monkeypatch.setattr(StoredAnswers, "claim", noted)
    monkeypatch.setattr(server[1], "add", slow)
    monkeypatch.setattr(StoredAnswers, "renew", counted)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(post, server[0], "k")
        assert begun.wait(10)
        for _ in range(6):  # twice its life
            assert renewed.acquire(timeout=10)
        with pytest.raises(Unavailable):  # as another server of this database would find it
            StoredAnswers(server[1]._stored.database).claim("acme", "POST /v1/files", "k", digests[0], "another")
        go.set()
        assert first.result(10).status_code == 200
    assert len(on_disk(root)) == 1


def test_an_answer_that_could_not_be_stored_is_stored_later_and_not_made_again(server, root, monkeypatch):
    monkeypatch.setattr(once, "RETRY_S", 0.02)
    settle, failures = StoredAnswers.settle, [True, True]

    def broken(self, *args):
        if failures:
            failures.pop()
            raise StorageAway("the server's database does not answer; try again later")
        settle(self, *args)

    monkeypatch.setattr(StoredAnswers, "settle", broken)
    answers = [post(server[0], "k")]
    assert answers[0].status_code == 503
    while answers[-1].status_code == 503:
        answers.append(post(server[0], "k"))
        assert len(answers) < 1000
    assert answers[-1].status_code == 200
    assert len(on_disk(root)) == 1
