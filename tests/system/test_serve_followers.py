"""Who follows a job's events, without a device: one look for all, places, deadlines, and going on after the last event."""

import contextlib
import json
import threading
import time
from collections import Counter
from contextlib import closing
from dataclasses import replace

import httpx2
import pytest
from database_world import event, job_record
from edge_world import jobs_wire
from fake_backend import FakeBackend, serving
from files_world import by_header

from jaxlora.config.serving import LimitsSection
from serve.api.jobs import follow
from serve.db.database import Database
from serve.db.jobs import StoredJobs
from serve.server.app import create_app
from serve.server.gate import AppConfig
from train.jobs.status import JobStatus

PATH = "/v1/fine_tuning/jobs/ftjob-1/events"
FOLLOWERS = 4


@pytest.fixture
def stored(tmp_path):
    with closing(Database(f"sqlite:///{tmp_path}/db.sqlite")) as database:
        stored = StoredJobs(database)
        stored.insert(job_record(status=JobStatus.PAUSED), events=[event("one"), event("two")])
        yield stored


@pytest.fixture
def url(stored):
    wire = jobs_wire(stored.database, LimitsSection(followers=FOLLOWERS))
    config = AppConfig(default_max_tokens=16, caller_of=by_header, routers=[wire.router()])
    with serving(create_app(FakeBackend(), config)) as url:
        yield url


def asked(tenant="acme", **headers):
    return {"headers": {"authorization": f"Bearer {tenant}"} | headers, "timeout": 20}


class Follower(threading.Thread):
    """Reads a stream to its end."""

    def __init__(self, url, timeout_s="60", **query):
        super().__init__(daemon=True)
        self.url, self.timeout_s, self.query, self.messages, self.ids, self.whole = url, timeout_s, query, [], [], False
        self.begun = threading.Event()
        self.start()
        assert self.begun.wait(10)

    def run(self):
        with httpx2.stream(
            "GET",
            self.url + PATH,
            params={"stream": "true"} | self.query,
            **asked(**{"x-request-timeout-s": self.timeout_s}),
        ) as answer:
            self.begun.set()
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    found = json.loads(line.removeprefix("data: "))
                    self.messages.append(found["message"])
                    self.ids.append(found["id"])
                self.whole |= line == "data: [DONE]"


def until(holds):
    ends = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.01)


def end(stored):
    return stored.save(replace(stored.get("ftjob-1", None), status=JobStatus.CANCELLED), events=[event("over")])


def test_all_who_follow_a_job_share_one_look_at_the_database(stored, url, monkeypatch):
    """A look takes a while here, so that two who look for themselves are seen inside at once."""
    looks, inside, since = Counter(), [], StoredJobs.events_since

    def counted(self, id, sees, seq, *, limit):
        looks[seq] += 1
        looks["inside"] += 1
        inside.append(looks["inside"])
        time.sleep(0.02)
        looks["inside"] -= 1
        return since(self, id, sees, seq, limit=limit)

    monkeypatch.setattr(StoredJobs, "events_since", counted)
    monkeypatch.setattr(follow, "LOOK_S", 0.01)
    followers = [Follower(url) for _ in range(FOLLOWERS)]
    until(lambda: all(len(f.messages) == 2 for f in followers))
    began = looks[2]
    until(lambda: looks[2] >= began + 10)
    stored.save(stored.get("ftjob-1", None), events=[event("three")])
    end(stored)
    for follower in followers:
        follower.join(10)
        assert (follower.messages, follower.whole) == (["one", "two", "three", "over"], True)
    assert max(inside) == 1
    ended = len(inside)
    time.sleep(0.1)
    assert len(inside) == ended  # nobody follows, nobody looks


def test_a_tenant_has_so_many_followers_and_another_tenant_its_own(stored, url, monkeypatch):
    stored.insert(job_record("ftjob-2", "other", status=JobStatus.PAUSED))
    other = "/v1/fine_tuning/jobs/ftjob-2/events?stream=true"
    with contextlib.ExitStack() as held:
        for _ in range(FOLLOWERS):
            held.enter_context(httpx2.stream("GET", url + PATH + "?stream=true", **asked()))
        with httpx2.stream("GET", url + PATH + "?stream=true", **asked()) as answer:
            assert answer.status_code == 429
            assert answer.headers["retry-after"] == "1"
            assert json.loads(answer.read())["error"]["code"] == "rate_limit_exceeded"
        assert httpx2.get(url + PATH, **asked()).status_code == 200  # the list is no stream
        with httpx2.stream("GET", url + other, **asked("other")) as there:
            assert there.status_code == 200

    def free():
        with httpx2.stream("GET", url + PATH + "?stream=true", **asked()) as answer:
            return answer.status_code == 200

    until(free)  # those who left gave their places back


def test_a_stream_ends_at_its_deadline_and_whoever_goes_on_misses_and_repeats_nothing(stored, url):
    first = Follower(url, "0.3")
    first.join(10)  # the job is paused for ever
    assert (first.messages, first.whole) == (["one", "two"], True)
    again = Follower(url, after=first.ids[0])
    end(stored)
    again.join(10)
    assert again.messages == ["two", "over"]


def test_only_an_event_of_the_job_can_be_gone_on_from(stored, url):
    for query in ("after=ftevent-none", "limit=3"):
        answer = httpx2.get(f"{url}{PATH}?stream=true&{query}", **asked())
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value")
    assert httpx2.get(url + PATH + "?stream=true", **asked("stranger")).status_code == 404


def test_who_is_far_behind_gets_all_events_in_order(stored, url, monkeypatch):
    monkeypatch.setattr(follow, "KEPT", 5)
    stored.save(stored.get("ftjob-1", None), events=[event(str(i)) for i in range(350)])
    early = Follower(url)
    until(lambda: len(early.messages) == 352)
    late = Follower(url)
    end(stored)
    for follower in (early, late):
        follower.join(10)
        assert follower.messages == ["one", "two", *map(str, range(350)), "over"]
