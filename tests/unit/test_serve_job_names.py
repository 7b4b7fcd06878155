"""Names of what jobs make: a tenant's own, OpenAI's aliases, those of the first releases, and one for a job without any."""

from __future__ import annotations

import pytest

from jaxlora.core.errors import AlreadyExists
from jaxlora.core.lora import NAME_PATTERN
from serve.db.job_spec import JobSpec, LoraChoice
from serve.jobs.resolve import spec_of
from serve.jobs.service import free_name
from serve.runtime.job_names import JobName, JobNames, Target

ONE, TWO = "ftjob-" + "1" * 32, "ftjob-" + "2" * 32
ALIAS = "ft:org--base:acme:harbor:111111111111"


@pytest.fixture
def names():
    names = JobNames("org/base")
    names.claim(ONE, "acme", "harbor", "harbor")
    return names


def test_an_alias_means_the_adapter_of_its_job(names):
    assert names.find("acme", ALIAS) is None, "it has no checkpoint"
    assert names.find("acme", ALIAS + ":latest") == Target("acme", "harbor", None)
    names.checkpoint(ONE, 10, 3, final=False)
    names.checkpoint(ONE, 20, 5, final=True)
    assert names.find("acme", ALIAS) == Target("acme", "harbor", (5, 5, 3))
    assert names.find("acme", ALIAS + ":ckpt-step-10") == Target("acme", "harbor", (3,))
    assert names.find("other", ALIAS) is None
    assert (names.full(ONE), names.full(ONE, 10), names.adapter(ONE)) == (ALIAS, ALIAS + ":ckpt-step-10", "harbor")


def test_a_name_is_one_jobs_until_it_ends(names):
    with pytest.raises(AlreadyExists, match=f"job {ONE} makes harbor") as caught:
        names.claim(TWO, "acme", "harbor", "harbor")
    assert (caught.value.param, caught.value.status) == ("suffix", 409)
    names.claim(TWO, "other", "harbor", "harbor")  # another tenant's
    assert names.makes("acme", "harbor")
    names.end(ONE)
    assert not names.makes("acme", "harbor")


def test_an_alias_does_not_mean_what_a_later_job_makes_under_the_name(names):
    names.checkpoint(ONE, 10, 3, final=True)
    names.end(ONE)
    names.claim(TWO, "acme", "harbor", "harbor")
    assert names.find("acme", ALIAS + ":latest") is None
    assert names.find("acme", ALIAS) == Target("acme", "harbor", (3, 3))  # which no other job makes
    assert names.find("acme", ALIAS.replace("1" * 12, "2" * 12) + ":latest") == Target("acme", "harbor", None)


def test_what_another_process_knows_is_added_and_older_news_take_nothing_back(names):
    there = JobNames("org/base")
    old = JobName("acme", "harbor", "harbor", ONE, {10: 3})
    there.put(JobName("acme", "harbor", "harbor", ONE, {10: 4, 20: 5}, final=5, ended=True))
    there.put(old)
    assert there.find("acme", ALIAS) == Target("acme", "harbor", (5, 5, 4))
    assert there.find("acme", ALIAS + ":ckpt-step-10") == Target("acme", "harbor", (4,))
    assert there.find("other", ALIAS) is None
    assert old.steps == {10: 3}
    assert not there.makes("acme", "harbor")


def test_a_job_that_is_forgotten_leaves_its_name_free(names):
    names.forget(ONE)
    assert not names.makes("acme", "harbor")
    assert names.find("acme", ALIAS + ":latest") is None
    names.claim(TWO, "acme", "harbor", "harbor")


def test_adapters_of_the_first_releases_are_listed_under_their_alias(names):
    names.add(TWO, "acme", "ft-222222222222", "bot")
    assert names.shown("acme", "ft-222222222222") == "ft:org--base:acme:bot:222222222222"
    assert names.shown("acme", "harbor") is None
    names.add(TWO, "acme", "another", "bot")
    assert names.adapter(TWO) == "ft-222222222222", "a job that is known keeps its name"


@pytest.mark.parametrize(
    ("filename", "stem"),
    [
        ("train.jsonl", "train"),
        ("Our notes (v2).csv.jsonl", "our-notes-v2"),
        ("../../etc/passwd", "job"),
        ("Grüße 🌍.jsonl", "gr-e"),
        ("🌍", "job"),
        ("x" * 90 + ".jsonl", "x" * 32),
        ("-" * 40 + "a", "a"),
    ],
)
def test_a_job_without_a_name_gets_one_of_its_file(filename, stem):
    name = free_name(filename, "ftjob-3f9a1c" + "0" * 26)
    assert name == f"{stem}-3f9a1c"
    assert NAME_PATTERN.fullmatch(name)


@pytest.mark.parametrize(("asked", "most", "rank"), [(None, 4, 4), (None, 64, 16), (2, 4, 2), (8, 4, 8)])
def test_the_usual_rank_is_lowered_to_the_servers_and_one_that_is_asked_for_is_not(asked, most, rank):
    spec = JobSpec(model="m", training_file="f", lora=None if asked is None else LoraChoice(r=asked))
    assert spec_of(spec, most).rank == rank
