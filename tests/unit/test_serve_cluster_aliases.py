"""What the front finds in the database of models that are named by an id, and what it keeps of it."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from database_world import checkpoint_record, gradient_record, job_record

from serve.cluster.aliases import Aliases
from serve.cluster.relay import Alias
from serve.db.gradient import StoredGradient
from serve.db.jobs import StoredJobs
from serve.runtime.job_names import JobName
from train.jobs.status import JobStatus

pytest_plugins = ["database_fixtures"]
JOB = "ftjob-" + "0123456789ab" + "c" * 20
ALIAS = "ft:base:acme:x:0123456789ab"
GRADIENT = "a" * 50


@pytest.fixture
def jobs(database):
    it = StoredJobs(database)
    it.insert(job_record("ftjob-" + "0123456789aa" + "c" * 20))
    it.insert(job_record(JOB))
    return it


@pytest.fixture
def aliases(jobs):
    gradient = StoredGradient(jobs.database)
    gradient.insert(gradient_record(GRADIENT))
    return Aliases(jobs, gradient)


def find(aliases, *names):
    """What it finds, on a loop of its own, as the front has one."""

    async def work():
        return [await aliases.find(name) for name in names]

    found = asyncio.run(work())
    return found[0] if len(found) == 1 else found


def saved(jobs, status, *versions, **progress):
    checkpoints = [checkpoint_record(version, job=JOB) for version in versions]
    jobs.save(replace(job_record(JOB), status=status, progress=progress), checkpoints=checkpoints)


def test_a_job_is_read_again_until_it_has_ended(aliases, jobs):
    def alias(steps, final=None, ended=False):
        name = JobName("acme", "support", "", JOB, steps, final, ended)
        return Alias(tenant="acme", adapter="support", job=name)

    assert find(aliases, ALIAS) == alias({})
    saved(jobs, JobStatus.RUNNING, 1)
    assert find(aliases, ALIAS, ALIAS + ":ckpt-step-10") == [alias({10: 1})] * 2
    saved(jobs, JobStatus.SUCCEEDED, 2, final_version=2)
    assert find(aliases, ALIAS) == alias({10: 1, 20: 2}, 2, True)
    jobs.database.close()
    assert find(aliases, ALIAS + ":ckpt-step-10") == alias({10: 1, 20: 2}, 2, True)


def test_gradients_adapters_have_their_names(aliases, jobs):
    assert find(aliases, GRADIENT) == Alias(tenant="acme", adapter="gradient-1", job=None)
    jobs.database.close()
    assert find(aliases, GRADIENT).adapter == "gradient-1"


def test_what_nobody_has_is_none_and_is_looked_for_again(aliases, jobs):
    assert find(aliases, "ft:base:acme:x:ffffffffffff", "b" * 50, "\x00", "%") == [None] * 4
    StoredGradient(jobs.database).insert(gradient_record("b" * 50))
    assert find(aliases, "b" * 50) is not None
