"""What the database knows of the names of jobs' models."""

from __future__ import annotations

from collections.abc import Sequence

from serve.db.jobs import StoredJobs
from serve.db.models import CheckpointRecord, JobRecord
from serve.runtime.job_names import JobName, JobNames
from train.jobs.status import ENDED


def know_names(names: JobNames, stored: StoredJobs) -> None:
    """Loads the names of all stored jobs and their checkpoints."""
    for record, checkpoints in stored.history():
        names.add(record.id, record.tenant, record.adapter, record.request.suffix or "")
        names.put(job_name(record, checkpoints))


def job_name(record: JobRecord, checkpoints: Sequence[CheckpointRecord]) -> JobName:
    """Returns the name of a stored job with the versions that it stands for."""
    steps = {checkpoint.step: checkpoint.version for checkpoint in checkpoints}
    final = record.progress.get("final_version")
    return JobName(
        tenant=record.tenant,
        adapter=record.adapter,
        suffix=record.request.suffix or "",
        job_id=record.id,
        steps=steps,
        final=final if isinstance(final, int) and final in steps.values() else None,
        ended=record.status in ENDED,
    )
